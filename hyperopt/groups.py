"""Split the hidden matrices of a model from its other parameters, for `Muon`."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

Named: TypeAlias = list[tuple[str, nn.Parameter]]


def split_matrices(model: nn.Module, head: nn.Module | None = None) -> tuple[Named, Named]:
    """Split a model's parameters into hidden matrices, for `Muon`, and the rest.

    By the usual rule (Jordan et al. 2024) the rest are embeddings, the output layer, biases, norms,
    and all other parameters that are not matrices.

        hidden, rest = split_matrices(model)
        optimizer = HyperOptimizer([
            {"params": hidden, "stack": "Muon(0.02) / SGD(1e-4)"},
            {"params": rest, "stack": "AdamW(3e-4) / SGD(1e-5)"},
        ])

    Args:
        model: the model.
        head: the output layer. By default it is the last `nn.Linear` of the model. An output layer
            that shares its matrix with an embedding can be left out.

    Returns:
        two lists of (name, parameter). Each parameter occurs once, in the order of the model.
    """
    modules = [*model.modules()]
    outer = [module for module in modules if isinstance(module, nn.Embedding)]
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    heads = [head] if head is not None else linears[-1:]
    outside = {p for module in [*outer, *heads] for p in module.parameters()}
    hidden: Named = []
    rest: Named = []
    for name, p in model.named_parameters():
        (hidden if p.ndim == 2 and p not in outside else rest).append((name, p))
    return hidden, rest
