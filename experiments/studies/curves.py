"""Runs as their records have them, for the scripts that draw from those."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.records.archive import read_records, setting
from experiments.studies.pages import diverged, with_sd


@dataclass(frozen=True)
class Run:
    """One finished run: its cell, seed, summary, a line for each epoch, and one every few steps."""

    cell: Any
    seed: int
    summary: dict[str, Any]
    curves: pd.DataFrame
    values: pd.DataFrame

    @property
    def loss(self) -> float:
        """The training loss of the last epoch; infinite where the run diverged."""
        return math.inf if self.summary["diverged"] else self.summary["train_loss"]

    def columns(self, name: str) -> tuple[pd.Series, pd.Series]:
        """A column of `values` or else of `curves`, behind the epoch of each of its numbers."""
        per_epoch = self.curves.step.iloc[-1] / self.curves.epoch.iloc[-1]
        table = self.values if name in self.values else self.curves
        return table.step / per_epoch, table[name]


def read_runs(
    source: Path,
    cell_of: Callable[[dict[str, Any]], Any],
    part_of: Callable[[Any], Any] = lambda cell: None,
) -> list[Run]:
    """The runs in a file of records, each with what `cell_of` makes of its summary.

    Args:
        part_of: the part of an experiment that a cell belongs to; each has one setting.

    Raises:
        ValueError: a part has several settings.
    """
    runs: list[Run] = []
    settings: dict[Any, set[str]] = {}
    for files in read_records(source).values():
        summary = json.loads(files["summary.json"])
        cell = cell_of(summary)
        own = json.dumps(setting(summary), sort_keys=True)
        settings.setdefault(part_of(cell), set()).add(own)
        curves, values = (
            pd.read_csv(io.StringIO(files[name])) for name in ("curves.csv", "hyperparameters.csv")
        )
        runs.append(Run(cell, summary["seed"], summary, curves, values))
    for found in settings.values():
        if len(found) > 1:
            raise ValueError(
                f"{source} holds runs of several settings, {' and '.join(sorted(found))}; give "
                "results= another folder for one of them"
            )
    return runs


def precision(run: Run) -> str:
    """How the runs of a setting were computed, where that is not float32, for captions."""
    return ", in bf16" if run.summary["trainer"].get("autocast") else ""


def of(runs: Iterable[Run], cell: Any) -> list[Run]:
    return [run for run in runs if run.cell == cell]


def count(runs: Iterable[Run]) -> str:
    """As in "n = 3", or "n = 1 to 3" where cells have been run with different numbers of seeds."""
    numbers = pd.Series([run.cell.label for run in runs]).value_counts()
    least, most = numbers.min(), numbers.max()
    return f"n = {most}" if least == most else f"n = {least} to {most}"


def mean_text(line: pd.Series, what: str, digits: int) -> str:
    """As in "17.20 ± 0.31", from a line with `what`, its `_sd`, n, and how many diverged."""
    return with_sd(line[what], line[f"{what}_sd"], digits) + diverged(line)


def mean_of(values: Sequence[float | None]) -> str:
    """The mean; nothing where a run ended in something that is not a number."""
    numbers = [value for value in values if value is not None]
    return f"{sum(numbers) / len(numbers):.4g}" if numbers and len(numbers) == len(values) else ""
