"""Measure the cost of a step of Figure 2 on one core, and estimate it for a GPU.

    python -m experiments.studies.figure2.cost
    python -m experiments.studies.figure2.cost results=results

It times a plain run and a tower, which take turns in one process. It counts the floating-point
operations and the operator calls of a step. It writes `figure2/cost.json` into `results`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from experiments.cli import ResultsOptions, asked_for_help, guarded, split
from experiments.data.images import Dataset
from experiments.files import write_json
from experiments.records.provenance import device_name
from experiments.studies.figure2.runs import CELLS, HE, REPLAYED, Cell
from experiments.tasks.classification import Classification
from hyperopt import HyperOptimizer
from models import MODELS

ROUNDS = 60
STEPS = 64_000  # of a run of the preset `paper`
RUNS = 3 * (len(CELLS) + 1)  # including the replays
# Assumptions about a GPU.
LAUNCH = 20e-6  # seconds for one operator, including its share of Python
GPU = 10_000  # GFLOP/s


class Run:
    """The gradient and the optimizer of a cell, in the setting of the figure."""

    def __init__(self, cell: Cell, images: Classification) -> None:
        model = MODELS["resnet20"].make().to(memory_format=torch.channels_last)
        self.gradient = images.gradient(model, compile=False, autocast=False)
        self.optimizer = HyperOptimizer(model.parameters(), cell.stack, compile=True)


class Calls(TorchDispatchMode):
    """Counts the called operators, except views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def synthetic() -> Classification:
    """Noise in the shape of CIFAR-10's training set; a step takes as long as with images."""
    pixels = torch.randint(256, (50_000, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(10, (50_000,))
    return Classification(
        Dataset("cifar10", "", "", pixels, labels, pixels, labels), 128, True, "cpu"
    )


def batches(images: Classification) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from images.epoch(generator)


def timed(times: list[float], do: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = do()
    times.append(time.perf_counter() - began)
    return result


def measure() -> dict[str, Any]:
    """Medians over the rounds, in milliseconds, and the counts of a step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = synthetic()
    feed = batches(images)
    runs = {"plain": Run(HE, images), "tower": Run(REPLAYED, images)}
    times: dict[str, list[float]] = {name: [] for name in ("feed", "gradient", *runs)}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            batch = timed(times["feed"], lambda: next(feed))
            timed(times["gradient"], lambda run=run, batch=batch: run.gradient(*batch))  # type: ignore[misc]
            timed(times[name], run.optimizer.step)
    with FlopCounterMode(display=False) as flops:
        runs["plain"].gradient(*batch)
    with Calls() as calls:
        runs["tower"].gradient(*batch)
    warm = {name: 1e3 * statistics.median(own[4:]) for name, own in times.items()}
    return {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rounds": ROUNDS,
        "milliseconds": warm,
        "gflop": flops.get_total_flops() / 1e9,
        "operators": calls.count,
    }


def words(measured: dict[str, Any]) -> str:
    """The text below the figure."""
    ms, gflop, operators = measured["milliseconds"], measured["gflop"], measured["operators"]
    step = ms["feed"] + ms["gradient"] + ms["plain"]
    arithmetic, launching = STEPS * gflop / GPU, STEPS * operators * LAUNCH
    hours = RUNS * max(arithmetic, launching) / 3600
    return (
        f"A step at batch 128 takes {step:.0f} ms on one core ({measured['device']}; medians of "
        f"{measured['rounds']} steps of each kind, in turn). Data feeding and augmentation take "
        f"{ms['feed'] / step:.2%} of it. The step of plain SGD takes {ms['plain']:.2f} ms and the "
        f"tower's {ms['tower']:.2f} ms, so the tower adds "
        f"{(ms['tower'] - ms['plain']) / step:.2%}.\n"
        "\n"
        "The cost of the preset `paper` on a GPU is an estimate. Loss and gradient of a step are "
        f"{gflop:.1f} GFLOP in {operators} operator calls, both counted. For 64,000 steps, that is "
        f"{arithmetic / 60:.0f} minutes of arithmetic at {GPU / 1e3:.0f} TFLOP/s, and "
        f"{launching / 60:.0f} minutes of launching at {1e6 * LAUNCH:.0f} µs an operator. A run "
        f"takes about the larger of the two; all {RUNS} runs, one after the other, take "
        f"{hours:.0f} hours."
    )


def main() -> int:
    if asked_for_help(__doc__, ResultsOptions):
        return 0
    options, _ = split(sys.argv[1:], ResultsOptions, ())
    measured = measure()
    write_json(Path(options.results, "figure2", "cost.json"), measured)
    print(words(measured))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
