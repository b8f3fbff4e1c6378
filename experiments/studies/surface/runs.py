"""The first version's Figure 1, the hyperoptimization surface: loss over step and step size.

    python -m experiments.studies surface
    python -m experiments.studies surface data.root=data store=runs results=results

Plain SGD at many step sizes, and towers that tune theirs. `curves.csv` has a line for each step,
with the loss of each run and the step sizes of the towers.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.config.compose import compose
from experiments.files import csv_text, write_text
from experiments.records.store import RunStore
from experiments.studies.study import Part, Preset, Request, Study, each_seed

LRS = tuple(float(f"{10 ** (k / 16):.4g}") for k in range(-48, 13))  # 1e-3 to 5.6
TOWERS = (
    "SGD(0.01) / SGD(0.01)",  # of the first version
    "SGD(0.001) / SGD(0.001) / SGD(0.001)",
    "SGD(5) / SGD(1)",  # from too large a start
)


@dataclass(frozen=True)
class SurfacePreset(Preset):
    """Adds the stride over plain SGD's step sizes."""

    every: int = 1


PRESETS = {"paper": SurfacePreset(seeds=(0,)), "quick": SurfacePreset(seeds=(0,), every=6)}


def parts(request: Request) -> Iterator[Part]:
    """The runs of the surface; afterwards, write `curves.csv`."""
    base = compose(["experiment=surface", *request.overrides])
    plain = (f"SGD({lr})" for lr in LRS[:: request.preset.every])
    surface = Part([each_seed(request, base, ((s, s, s) for s in [*plain, *TOWERS]))])
    yield surface
    rows = curves(RunStore(base.store), surface.summaries)
    write_text(request.folder / "curves.csv", csv_text(rows))


def line(stack: str, summary: dict[str, Any]) -> dict[str, Any]:
    """A run in the CSV."""
    made = {"device": summary["provenance"]["device"]}
    columns = ("stack", "data", "device", "seed", "hash", "test_error", "train_loss", "diverged")
    return {name: {**summary, **made}[name] for name in columns}


def curves(store: RunStore, summaries: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A line for each step: each run's loss and each tower's lr; empty after a run diverged."""
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


STUDY = Study("surface", PRESETS, parts, __doc__, line, place=6)
