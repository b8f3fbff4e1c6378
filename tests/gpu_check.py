"""Check on a GPU what needs a GPU, in at most ten minutes.

    make gpu-check
    python tests/gpu_check.py results=results data.root=data

It runs the tests that need a GPU. It counts the synchronizations of a step, which must be 0. It
captures a step in a CUDA graph and compares it with the same step outside of one. It times `step()`
beside `torch.optim.Adam(fused=True)`, and whole steps of ResNet-20. It trains the setting of Figure
2 for 2 epochs in bf16. It writes `results/gpu_check.md`, with the name of the device.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from experiments.cli import ROOT, asked_for_help, guarded, split
from experiments.config.resolve import resolve_all
from experiments.files import write_text
from experiments.records.provenance import device_name
from experiments.studies.figure2.runs import HE, REPLAYED, Cell, cell_config
from experiments.studies.pages import table
from experiments.studies.stacks import auto
from experiments.training.trainer import train
from hyperopt import HyperOptimizer
from models.mlp import MLP
from models.resnet import ResNet

TESTS_LIMIT = 240.0  # seconds for the tests that need a GPU
STACKS = {
    "tower of height 1": "Adam(1e-3) / SGD(1e-6)",
    "tower of height 3": "Adam(1e-3) / SGD(1e-6) / SGD(1e-6) / SGD(1e-6)",
    "Auto": auto(),
}
SETTABLE = ("data.root", "store")


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    results: str = "results"


@dataclass(frozen=True)
class Finding:
    """A line of the page: the check, its result, and whether the result is right."""

    what: str
    found: str
    good: bool | None = None


def with_gradients(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def tests() -> Finding:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_LIMIT
        )
    except subprocess.TimeoutExpired:
        return Finding("tests that need a GPU", f"not done after {TESTS_LIMIT:.0f} s", False)
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    return Finding("tests that need a GPU", last, done.returncode == 0)


def synchronizations(stack: str, device: torch.device, steps: int = 5) -> Finding:
    """How often a step waits for the GPU; always 0 on a CPU."""
    model = with_gradients(MLP().to(device))
    optimizer = HyperOptimizer(model.parameters(), stack)
    for _ in range(3):  # the first ones compile
        optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                optimizer.step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    count = sum("synchroniz" in str(warning.message) for warning in caught)
    return Finding(f"synchronizations in {steps} steps, `{stack}`", str(count), count == 0)


def captured(stack: str, device: torch.device, steps: int = 3) -> Finding:
    """Compare a step in a CUDA graph with the same step outside; on a CPU, the step twice."""
    torch.manual_seed(0)
    models = [with_gradients(MLP().to(device))]
    models.append(copy.deepcopy(models[0]))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        q.grad = p.grad.clone()
    plain, graphed = (HyperOptimizer(model.parameters(), stack) for model in models)
    for optimizer in (plain, graphed):
        for _ in range(3):
            optimizer.step()
    again: Callable[[], Any] = graphed.step
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            graphed.step()
        again = graph.replay
    for _ in range(steps):
        plain.step()
        again()
    pairs = zip(*(model.parameters() for model in models), strict=True)
    with torch.no_grad():
        apart = max(float((p - q).abs().max()) for p, q in pairs)
    return Finding(
        f"a captured step beside a plain one, `{stack}`", f"{apart:.1g} apart", apart < 1e-6
    )


def seconds(step: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The median time of a step, until the device has finished it."""
    times = []
    for _ in range(rounds + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[3:])


def step_times(device: torch.device, rounds: int = 200) -> list[Finding]:
    """`step()` on the parameters of ResNet-20, beside torch's fused Adam."""

    def timed(make: Callable[[Any], Any]) -> float:
        return seconds(make(with_gradients(ResNet().to(device)).parameters()).step, device, rounds)

    fused = timed(lambda parameters: torch.optim.Adam(parameters, fused=True))
    found = [Finding("`step()` of torch.optim.Adam(fused=True)", f"{1e6 * fused:.0f} µs")]
    for name, stack in STACKS.items():
        own = timed(lambda parameters, stack=stack: HyperOptimizer(parameters, stack))  # type: ignore[misc]
        found.append(Finding(f"`step()`, {name}", f"{1e6 * own:.0f} µs, {own / fused:.2f} times"))
    return found


def whole_times(device: torch.device, rounds: int = 30, batch: int = 128) -> list[Finding]:
    """Whole steps of ResNet-20: loss, gradient and `step()`."""
    images = torch.rand(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)

    def timed(make: Callable[[Any], Any]) -> float:
        model = ResNet().to(device)
        optimizer = make(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            F.nll_loss(model(images), labels).backward()
            optimizer.step()

        return seconds(step, device, rounds)

    plain = timed(lambda parameters: torch.optim.Adam(parameters, fused=True))
    found = [Finding("whole step of ResNet-20, torch's fused Adam", f"{1e3 * plain:.2f} ms")]
    for name, stack in STACKS.items():
        own = timed(lambda parameters, stack=stack: HyperOptimizer(parameters, stack))  # type: ignore[misc]
        words = f"{1e3 * own:.2f} ms, {100 * (own / plain - 1):+.1f} %"
        found.append(Finding(f"whole step of ResNet-20, {name}", words))
    return found


def figure2(cell: Cell, device: str, *overrides: str) -> Finding:
    """The setting of Figure 2, shortened, in bf16."""
    short = ("trainer.epochs=2", "trainer.steps=null", "precision=bf16", f"device={device}")
    (config,) = resolve_all([cell_config(cell, 0, (*short, *overrides))])
    summary = train(config)
    seconds_per_step = summary["provenance"]["seconds_per_step"]
    return Finding(
        f"Figure 2 in bf16, {summary['epochs']} epochs, {cell.label}",
        f"test error {summary['test_error']:.2f} %, {1e3 * seconds_per_step:.1f} ms a step",
        not summary["diverged"],
    )


def page(device: torch.device, found: list[Finding]) -> str:
    words = {True: "yes", False: "**no**", None: ""}
    rows = ((each.what, each.found, words[each.good]) for each in found)
    lines = [
        f"# Checked on {device_name(device)}",
        "",
        f"By `make gpu-check`, with torch {torch.__version__}.",
        "",
        *table(("What", "Found", "As it must be"), "lll", rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    if asked_for_help(__doc__, Options, SETTABLE):
        return 0
    options, overrides = split(sys.argv[1:], Options, SETTABLE)
    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU; make gpu-check needs one")
    device = torch.device("cuda")
    found = [
        tests(),
        *(synchronizations(stack, device) for stack in STACKS.values()),
        *(captured(stack, device) for stack in STACKS.values()),
        *step_times(device),
        *whole_times(device),
        *(figure2(cell, "cuda", *overrides) for cell in (HE, REPLAYED)),
    ]
    path = Path(options.results, "gpu_check.md")
    write_text(path, page(device, found))
    print(path.read_text())
    return 1 if any(each.good is False for each in found) else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
