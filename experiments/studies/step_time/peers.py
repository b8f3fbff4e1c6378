"""Rules on matrices, learning rates per element and `Auto`, beside torch.optim and other packages.

    python -m experiments.studies step_time peers

The optimizers of a group take turns on the same random gradients. The first is what the others are
compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import pandas as pd
import torch
from torch import nn

from hyperopt import Auto, HyperOptimizer, split_matrices
from models.transformer import Transformer

Maker: TypeAlias = Callable[[Iterable[nn.Parameter]], Any]
WIDTH = 384


def ours(stack: str) -> Maker:
    return lambda params: HyperOptimizer(params, stack, compile=True)


def torch_optim(name: str, **how: Any) -> Maker:
    return lambda params: getattr(torch.optim, name)(params, lr=1e-6, **how)


def heavyball(name: str) -> Maker:
    def make(params: Iterable[nn.Parameter]) -> Any:
        import heavyball

        return getattr(heavyball, name)(params, lr=1e-6)

    return make


def schedulefree(params: Iterable[nn.Parameter]) -> Any:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params, lr=1e-6)
    optimizer.train()
    return optimizer


def matrices() -> list[nn.Parameter]:
    """The four hidden matrices of one transformer block: Muon's cost grows with their number."""
    return [p for _, p in split_matrices(Transformer(82, WIDTH, layers=1))[0]]


def everything() -> list[nn.Parameter]:
    return list(Transformer(82, WIDTH, layers=6).parameters())


# Of each group: its title, its parameters, its optimizers.
GROUPS: Mapping[str, tuple[str, Callable[[], list[nn.Parameter]], Mapping[str, Maker]]] = {
    "muon": (
        f"The hidden matrices of a transformer block of width {WIDTH}",
        matrices,
        {
            "torch.optim.Muon": torch_optim("Muon"),
            "Muon": ours("Muon(1e-6)"),
            "Muon / SGD": ours("Muon(1e-6) / SGD(1e-12)"),
            "heavyball.Muon": heavyball("Muon"),
        },
    ),
    "soap": (
        f"The hidden matrices of a transformer block of width {WIDTH}",
        matrices,
        {
            "heavyball.SOAP": heavyball("SOAP"),
            "SOAP": ours("SOAP(1e-6)"),
            "SOAP / SGD": ours("SOAP(1e-6) / SGD(1e-12)"),
        },
    ),
    "adafactor": (
        f"A transformer of 6 blocks of width {WIDTH}",
        everything,
        {
            "torch.optim.Adafactor (foreach)": torch_optim("Adafactor", foreach=True),
            "Adafactor": ours("Adafactor(1e-6)"),
            "Adafactor / SGD": ours("Adafactor(1e-6) / SGD(1e-12)"),
        },
    ),
    "adam": (
        f"A transformer of 6 blocks of width {WIDTH}",
        everything,
        {
            "torch.optim.Adam (foreach)": torch_optim("Adam", foreach=True),
            "torch.optim.Adam (fused)": torch_optim("Adam", fused=True),
            "Adam": ours("Adam(1e-6)"),
            "Adam[lr: per element] / SGD": ours("Adam(1e-6)[lr: per element] / SGD(1e-12)"),
            "Auto": lambda params: Auto(params, lr=1e-6, compile=True),
            "heavyball.AdamW": heavyball("AdamW"),
            "heavyball.SFAdamW": heavyball("SFAdamW"),
            "schedulefree.AdamWScheduleFree": schedulefree,
        },
    ),
}


def measure(group: str, rounds: Callable[..., dict[str, list[float]]]) -> list[dict[str, Any]]:
    """The seconds of `step()` of all optimizers of one group, by `rounds`."""
    torch.set_num_threads(1)
    _, make_parameters, makers = GROUPS[group]
    steps = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        parameters = make_parameters()
        for p in parameters:
            p.grad = torch.randn_like(p) * 1e-3
        steps[name] = in_turn(make(parameters), parameters)
    rows = []
    for name, times in rounds(steps, 15, 0.02).items():
        low, middle, high = (1e6 * pd.Series(times)).quantile([0.25, 0.5, 0.75]).round(2)
        rows.append(
            {
                "group": group,
                "optimizer": name,
                "step_us": middle,
                "step_us_q25": low,
                "step_us_q75": high,
            }
        )
    return rows


def in_turn(optimizer: Any, parameters: list[nn.Parameter]) -> Callable[[], None]:
    """A step of an optimizer that may free its gradients, as HeavyBall's do."""
    gradients = [p.grad for p in parameters]

    def step() -> None:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        optimizer.step()

    return step


def table(rows: pd.DataFrame) -> list[str]:
    """The lines of the page: each group with its times, relative to its first optimizer."""
    lines = []
    for group, (title, *_) in GROUPS.items():
        own = rows[rows.group == group]
        if own.empty:
            continue
        first = own.iloc[0]
        lines += [
            "",
            f"{title}:",
            "",
            f"| optimizer | `step()` µs | times that of {first.optimizer} |",
            "|---|---|---|",
        ]
        for row in own.itertuples():
            spread = f"{row.step_us:,.0f} ({row.step_us_q25:,.0f} to {row.step_us_q75:,.0f})"
            lines.append(f"| {row.optimizer} | {spread} | {row.step_us / first.step_us:.2f} |")
    return lines
