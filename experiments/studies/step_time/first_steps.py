"""The cost of the first steps: seconds and compiled kernels, for models of many shapes.

    python -m experiments.studies step_time first

A kernel depends on the rule, not on sizes. So all cases have the same number of kernels, and no
kernel is compiled after the second step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt import Auto, HyperOptimizer, kernel_count
from models.mlp import MLP

STEPS = 12
TOWER = "Adam(0.001)[lr: log per tensor] / SGD(1e-5)"


def resnet(layers: int) -> nn.Module:
    import torchvision  # takes seconds, and every command imports this file

    return getattr(torchvision.models, f"resnet{layers}")()


def blocks() -> nn.Module:
    """Sixteen blocks of unequal widths."""
    widths = [7 + 3 * i for i in range(16)]
    return nn.ModuleList(
        nn.Sequential(nn.Linear(24, n), nn.ReLU(), nn.Linear(n, 24)) for n in widths
    )


def in_groups(model: nn.Module, count: int = 10) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[i::count], "weight_decay": i * 1e-3} for i in range(count)]


def auto(model: nn.Module) -> Any:
    return Auto(model.parameters(), compile=True)


# The model, its optimizer, and whether half of the steps skip each block.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], bool]] = {
    "mlp": (MLP, auto, False),
    "resnet18": (lambda: resnet(18), auto, False),
    "resnet50": (lambda: resnet(50), auto, False),
    "lr per tensor": (
        lambda: resnet(18),
        lambda m: HyperOptimizer(m.parameters(), TOWER, compile=True),
        False,
    ),
    "ten param groups": (lambda: resnet(18), lambda m: Auto(in_groups(m), compile=True), False),
    "stochastic depth": (blocks, auto, True),
}


def measure(case: str) -> dict[str, Any]:
    """Measure the seconds of the first steps and count the kernels, in this process.

    Gradients are random. Use a new process: an old one reuses its kernels.
    """
    make, optimizer_of, leaves_out = CASES[case]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = make()
    optimizer = optimizer_of(model)
    seconds, counts = [], []
    for _ in range(STEPS):
        for p in parts(model, leaves_out, generator):
            p.grad = torch.randn(p.shape, generator=generator)
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()
        counts.append(kernel_count())
    return {
        "case": case,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_s": round(seconds[0], 2),
        "further_s": round(sum(seconds[1:]), 2),
        "kernels": counts[-1],
        "kernels_after_two_steps": counts[1],
    }


def parts(model: nn.Module, leaves_out: bool, generator: torch.Generator) -> Iterator[Tensor]:
    """The parameters that have a gradient in one step."""
    for block in model.children():
        if not leaves_out or torch.rand((), generator=generator) < 0.5:
            yield from block.parameters()


def table(rows: Sequence[Any]) -> list[str]:
    """The lines of the page."""
    return [
        f"The first of {STEPS} steps in a new process, including the import of the compiler.",
        "A kernel depends on the rule, not on sizes.",
        "",
        "| what | parameters | first step, cold | from the cache on disk | kernels "
        "| compiled after the second step |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.case} | {row.parameters:,} | {row.first_s:.1f} s | {row.first_warm_s:.1f} s "
            f"| {row.kernels} | {row.kernels - row.kernels_after_two_steps} |"
            for row in rows
        ),
    ]
