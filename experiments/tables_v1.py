"""Tables 1 and 2 of the paper's first version (arXiv 1909.13371v1): one epoch, three seeds a row.

    python -m experiments.tables_v1
    python -m experiments.tables_v1 data.root=data store=runs results=results

What comes out is `tables_v1_runs.csv`, a line for each run, from which `scripts.tables` draws. Runs
that are finished are not done again.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .command import ROOT, asked_for_help, do_and_record, draw, publish, results_of, split
from .config import Config, StackConfig, compose
from .run import guarded, resolve_all
from .table1 import SETTABLE

REFERENCE = ROOT / "results" / "reference" / "tables_v1.csv"
SEEDS = (0, 1, 2)
COLUMNS = (
    *("table", "row", "stack", "data", "epochs", "device", "seed", "hash"),
    *("test_accuracy", "ms_per_step", "diverged"),
)

Row = dict[str, str]  # a line of the published tables


@dataclass(frozen=True)
class Options:
    """What the command line sets beside the keys of the runs' config."""

    results: str = "results"


def reference() -> list[Row]:
    """The rows of the published tables, in their order."""
    with open(REFERENCE, newline="") as file:
        return list(csv.DictReader(file))


def notation(row: str) -> str:
    """The stack that a row of the published tables names, with the paper's constants.

    A level "per hyperparameter" has a step size for each hyperparameter of Adam below it.
    """

    def per_hyperparameter(match: re.Match) -> str:
        sizes = ", ".join(f"{name}: {match[1]}" for name in ("lr", "beta1", "beta2"))
        return f"SGD({{{sizes}}})"

    stack = re.sub(r"SGD\(([^),]+), per hyperparameter\)", per_hyperparameter, row)
    return re.sub(r"Adam\((.*?)\)", r"Adam(\1, v0=1e-8)", stack)


def table_runs(overrides: Sequence[str] = ()) -> list[tuple[Row, Config]]:
    """The runs of the tables, each with its row."""
    base = compose(["experiment=tables_v1", *overrides])
    return [
        (row, replace(base, stack=StackConfig(notation(row["stack"])), seed=seed, row=row["stack"]))
        for row in reference()
        for seed in SEEDS
    ]


def run_lines(rows: Sequence[Row], summaries: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """The tidy CSV."""
    lines: list[list[Any]] = [list(COLUMNS)]
    for row, summary in zip(rows, summaries, strict=True):
        made = summary["provenance"]
        lines.append(
            [
                *(row["table"], row["stack"], summary["stack"], summary["data"]),
                *(summary["epochs"], made["device"], summary["seed"], summary["hash"]),
                *(round(100 - summary["test_error"], 6), 1000 * made["seconds_per_step"]),
                summary["diverged"],
            ]
        )
    return lines


def main() -> int:
    if asked_for_help(__doc__, Options, SETTABLE):
        return 0
    options, overrides = split(sys.argv[1:], Options, SETTABLE)
    runs = table_runs(overrides)
    rows, configs = [row for row, _ in runs], resolve_all([config for _, config in runs])
    results = results_of(options.results, configs)
    path = results / "tables_v1_runs"
    if do_and_record(configs, path, lambda summaries: run_lines(rows, summaries)) is None:
        return 1
    draw(results)
    publish(results, configs[0])
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
