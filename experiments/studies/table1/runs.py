"""The paper's Table 1: 32 rows, three seeds each.

    python -m experiments.studies table1
    python -m experiments.studies table1 preset=quick workers=4 data.root=data store=runs
    python -m experiments.studies table1 start=own

`start=own` also trains the relearned rows from the hyperparameters of *our* towers, for a second
table.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.config.compose import compose
from experiments.config.schema import CONFIGS, Config
from experiments.studies.study import Part, Preset, Request, Study
from hyperopt import parse

REFERENCE = Path(__file__).with_name("published.csv")

Row = dict[str, str]  # a line of the published table

PRESETS = {
    "paper": Preset(),
    "quick": Preset(("trainer.epochs=2",), seeds=(0,)),
}

LEARNED = ("lr", "beta1", "beta2", "gamma")


def reference() -> list[Row]:
    """Read the rows of the published table, in its order, from published.csv.

    `published_*` are the paper's numbers: test error in percent, mean and standard deviation of
    three runs. `rerun_*` are from the authors' package (1.0 on PyPI) on the full MNIST with seeds
    0 to 2. `kind`: "baseline" is a plain optimizer, "tower" a stack, and "relearned" a plain
    optimizer started at the paper's learned values of the tower in the row above.
    """
    with open(REFERENCE, newline="") as file:
        return list(csv.DictReader(file))


def row_configs(overrides: Sequence[str] = ()) -> dict[str, Config]:
    """The config of each row, by the row's name in the published table."""
    names = sorted(path.stem for path in (CONFIGS / "experiment").glob("table1_*.yaml"))
    configs = [compose([f"experiment={name}", *overrides]) for name in names]
    return {config.row or "": config for config in configs}


def parts(request: Request) -> Iterator[Part]:
    """The table's runs and, with start=own, those of the second table."""
    configs = row_configs(request.overrides)
    table = Part(
        [
            [
                (row, replace(configs[row["stack"]], seed=seed))
                for row in reference()
                for seed in request.seeds
            ]
        ]
    )
    yield table
    if request.options.start == "own":
        yield Part([own_runs(table, request.seeds)], "own_runs")


def own_runs(table: Part, seeds: Sequence[int]) -> list[tuple[Row, Config]]:
    """The relearned rows, started at the mean of our towers' values, to 4 digits as in the paper.

    If no plain optimizer can start at that mean, the row is left out, with a message.
    """
    configs = {row["stack"]: config for row, config in zip(table.cells, table.configs, strict=True)}
    towers: dict[str, list[dict[str, Any]]] = {}
    for row, summary in zip(table.cells, table.summaries, strict=True):
        towers.setdefault(row["stack"], []).append(summary)
    own = []
    for tower, row in itertools.pairwise(reference()):
        if row["kind"] != "relearned":
            continue
        learned = [_learned(summary) for summary in towers[tower["stack"]]]
        try:
            means = {name: fmean(values[name] for values in learned) for name in learned[0]}
            start = {name: float(f"{mean:.4g}") for name, mean in means.items()}
            rule = parse(configs[row["stack"]].stack.notation or "").levels[0].with_values(start)
        except (TypeError, ValueError) as error:
            print(f"{tower['stack']} is left out of the second table: {error}", file=sys.stderr)
            continue
        for seed in seeds:
            config = configs[row["stack"]]
            stack = replace(config.stack, notation=str(parse(rule)))
            own.append((row, replace(config, stack=stack, seed=seed, row=str(rule))))
    return own


def line(row: Row, summary: dict[str, Any]) -> dict[str, Any]:
    """A run in the CSV, with the final values of the lowest level's tuned hyperparameters."""
    learned = _learned(summary)
    return {
        "block": row["block"],
        "row": row["stack"],
        "kind": row["kind"],
        "stack": summary["stack"],
        "data": summary["data"],
        "epochs": summary["trainer"]["epochs"],
        "seed": summary["seed"],
        "hash": summary["hash"],
        **{name: summary[name] for name in ("test_error", "train_loss", "diverged")},
        **{f"learned_{name}": learned.get(name) for name in LEARNED},
    }


def _learned(summary: dict[str, Any]) -> dict[str, float]:
    return {name: summary["hyperparameters"][0][name] for name in summary["tuned"]}


STUDY = Study("table1", PRESETS, parts, __doc__, line, starts=("scratch", "own"), place=1)
