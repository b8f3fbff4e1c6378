"""Measure the cost of recording a run: the CSVs of the store, and W&B offline.

    python tests/logging_cost.py
    python tests/logging_cost.py rounds=5 epochs=5 data=mnist

does runs of the MLP under Adam / SGD with either logger in turn. It prints the share of training
time that recording takes, the median over rounds, and how long W&B takes to begin and to end a run.
The first run of each, which compiles and starts W&B's service, is left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

from experiments.cli import asked_for_help, guarded, number, split
from experiments.config.compose import compose
from experiments.config.resolve import resolve_all
from experiments.records.loggers.catalog import find
from experiments.records.loggers.wandb import WandbLogger
from experiments.records.store import RunDirectory
from experiments.training.trainer import train

STACK = "Adam(0.001) / SGD(1e-5)"


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    rounds: str = "5"
    epochs: str = "5"
    data: str = "mnist"


class Clock:
    """Sums the time spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def measure(logger: str, epochs: str, data: str) -> tuple[float, float]:
    """The share of the records in an epoch, and the seconds of the logger around all epochs."""
    records, around = Clock(), Clock()
    with tempfile.TemporaryDirectory() as store, patch.dict(os.environ, {"WANDB_MODE": "offline"}):
        overrides = (f"data={data}", f"trainer.epochs={epochs}", f"stack={STACK}", "device=cpu")
        (config,) = resolve_all([compose([*overrides, f"logger={logger}", f"store={store}"])])
        find(config).prepare()
        with (
            patch.object(RunDirectory, "append_curves", records.around(RunDirectory.append_curves)),
            patch.object(WandbLogger, "log", records.around(WandbLogger.log)),
            patch.object(WandbLogger, "_open", around.around(WandbLogger._open)),
            patch.object(WandbLogger, "finish", around.around(WandbLogger.finish)),
        ):
            summary = train(config)
    return records.seconds / summary["provenance"]["seconds"], around.seconds


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    count = number(options, "rounds")
    if count < 1:
        raise ValueError(f"rounds={count} must be 1 or more")
    found: dict[str, list[tuple[float, float]]] = {"csv": [], "wandb": []}
    for _ in range(count + 1):  # the first compiles, and starts W&B's service
        for logger, measured in found.items():
            measured.append(measure(logger, options.epochs, options.data))
    for logger, (_, *measured) in found.items():
        shares, seconds = zip(*measured, strict=True)
        text = f"{logger}: {100 * median(shares):.2f} % of the training time"
        text += f" ({100 * min(shares):.2f} to {100 * max(shares):.2f} %)"
        print(text + (f", {median(seconds):.3f} s around a run" if logger == "wandb" else ""))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
