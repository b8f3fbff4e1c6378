"""Param groups by the usual rule: matrices in the middle of a model apart from all else."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

Named: TypeAlias = list[tuple[str, nn.Parameter]]


def split_matrices(model: nn.Module, head: nn.Module | None = None) -> tuple[Named, Named]:
    """The hidden matrices of a model, and its other parameters, for a stack of `Muon` and another.

    By the usual rule (Jordan et al. 2024) the others are embeddings, the head, biases, norms, and
    whatever else is not a matrix.

        hidden, rest = split_matrices(model)
        optimizer = HyperOptimizer([
            {"params": hidden, "stack": "Muon(0.02) / SGD(1e-4)"},
            {"params": rest, "stack": "AdamW(3e-4) / SGD(1e-5)"},
        ])

    Args:
        head: the output layer; by default the last `nn.Linear` of the model. One that shares its
            matrix with an embedding needs no mention.

    Returns:
        two lists of names and parameters, each parameter once, in the order of the model.
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
