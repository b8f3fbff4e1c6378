"""A tidy CSV with a line for each finished run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.config.baselines import parse
from experiments.files import csv_text
from experiments.records.store import RunStore
from experiments.tasks.catalog import tasks

JUDGED_BY = tuple(task.judged_by.name for task in tasks())
METRICS = tuple(name for task in tasks() for name in task.metrics)
RESULTS = (*METRICS, "objective", "train_loss", "diverged", "epochs", "steps")
# Keys of a summary that are neither settings nor results.
LEFT_OUT = ("hash", "hyperparameters", "tuned", "data_source", "data_sha256", "provenance")


def tidy(summary: dict[str, Any]) -> dict[str, Any]:
    """A line of the tidy CSV: a finished run's hash, settings and results, by column."""
    settings = {k: v for k, v in summary.items() if k not in (*LEFT_OUT, *RESULTS)}
    levels = parse(summary["stack"]).levels
    line = {"hash": summary["hash"], **dict(_flat(settings))}
    line |= {"stack.rule": levels[0].name, "stack.height": len(levels) - 1}
    line |= dict(_flat({str(k): level.values for k, level in enumerate(levels)}))
    line |= {name: summary[name] for name in RESULTS if name in summary}
    for k, (level, values) in enumerate(zip(levels, summary["hyperparameters"], strict=True)):
        constant = (
            level.hypers.keys() - level.tuned.keys() if k < len(levels) - 1 else values.keys()
        )
        line |= {f"learned.{k}.{n}": v for n, v in values.items() if n not in constant}
        # The notation omits default values, and defaults may have changed since the run.
        if k or "schedule" not in summary:
            kept = {f"{k}.{n}": values[n] for n in constant & values.keys()}
            line |= {name: v for name, v in kept.items() if name in line and v is not None}
    return line


def _flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def tidy_csv(summaries: Iterable[dict[str, Any]]) -> str:
    """The tidy CSV: settings first, results last, an empty cell if a run lacks the column.

    It has no times and no paths, so that the same runs give the same bytes on every machine.
    """
    lines = [tidy(summary) for summary in summaries]
    names = list(dict.fromkeys(name for line in lines for name in line))
    results = [name for name in names if name in RESULTS or name.startswith("learned.")]
    columns = [name for name in names if name not in results] + results
    return csv_text([columns, *([line.get(name) for name in columns] for line in lines)])


def read_summaries(store: Path) -> list[dict[str, Any]]:
    """The summaries of all finished runs of a store, sorted by stack, seed and hash."""
    paths = store.glob("*/summary.json")
    found = [RunStore(store).summary(path.parent.name) for path in paths]
    return sorted(
        (summary for summary in found if summary is not None),
        key=lambda summary: (summary["stack"], summary["seed"], summary["hash"]),
    )


def is_known(summary: dict[str, Any]) -> bool:
    """Whether this version knows a run's rules; if not, print the run on standard error."""
    try:
        parse(summary["stack"])
    except ValueError as error:
        print(f"run {summary['hash']} is ignored: {error}", file=sys.stderr)
        return False
    return True
