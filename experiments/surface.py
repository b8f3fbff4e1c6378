"""The first version's Figure 1, the hyperoptimization surface: loss over step and step size.

    python -m experiments.surface
    python -m experiments.surface data.root=data store=runs results=results

Plain SGD at many step sizes, and towers that move theirs. What comes out is `surface_runs.csv`, a
line for each run, and `surface_curves.csv`, the losses of each run and the step sizes of the
towers, a line for each step, from which `scripts.tables` draws. Runs that are finished are not done
again.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .command import asked_for_help, do_and_record, draw, publish, results_of, split
from .config import Config, StackConfig, compose
from .run import guarded, resolve_all
from .store import RunStore, csv_text, write_text
from .table1 import SETTABLE
from .tables_v1 import Options

LRS = tuple(float(f"{10 ** (k / 16):.4g}") for k in range(-48, 13))  # 1e-3 to 5.6
TOWERS = (
    "SGD(0.01) / SGD(0.01)",  # of the first version
    "SGD(0.001) / SGD(0.001) / SGD(0.001)",
    "SGD(5) / SGD(1)",  # from too large a start
)
STACKS = (*(f"SGD({lr})" for lr in LRS), *TOWERS)
COLUMNS = ("stack", "data", "device", "seed", "hash", "test_error", "train_loss", "diverged")


def surface_runs(overrides: Sequence[str] = ()) -> list[Config]:
    """The runs of the surface, of one seed."""
    base = compose(["experiment=surface", *overrides])
    return [replace(base, stack=StackConfig(stack), row=stack) for stack in STACKS]


def run_lines(summaries: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """The tidy CSV."""
    lines: list[list[Any]] = [list(COLUMNS)]
    for summary in summaries:
        device = summary["provenance"]["device"]
        lines.append([{**summary, "device": device}[column] for column in COLUMNS])
    return lines


def curves(store: RunStore, summaries: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A line for each step: each run's loss, and each tower's lr; empty once a run has diverged."""
    columns: dict[str, list[Any]] = {}
    for summary in summaries:
        with open(store.run(summary["hash"]).path / "hyperparameters.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        stack = summary["stack"]
        for name, key in (("loss", "loss"), ("lr", "0.lr")):
            if name == "loss" or "/" in stack:
                columns[f"{name} of {stack}"] = [f"{float(row[key]):.5g}" for row in rows]
    steps = max(len(column) for column in columns.values())
    filled = (column + [None] * (steps - len(column)) for column in columns.values())
    lines = zip(range(1, steps + 1), *filled, strict=True)
    return [["step", *columns], *map(list, lines)]


def main() -> int:
    if asked_for_help(__doc__, Options, SETTABLE):
        return 0
    options, overrides = split(sys.argv[1:], Options, SETTABLE)
    configs = resolve_all(surface_runs(overrides))
    results = results_of(options.results, configs)
    summaries = do_and_record(configs, results / "surface_runs", run_lines)
    if summaries is None:
        return 1
    rows = curves(RunStore(configs[0].store), summaries)
    write_text(results / "surface_curves.csv", csv_text(rows))
    draw(results)
    publish(results, configs[0])
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
