"""The paper's Figure 2: ResNet-20 on CIFAR-10, plain SGD and towers from a grid of starts.

    python -m experiments.studies figure2 preset=cpu
    python -m experiments.studies figure2 preset=paper seeds=0 workers=1 data.root=data store=runs
    python -m experiments.studies figure2 preset=cpu start=records kinds=he

For each lr of 0.01, 0.1, 1.0 and momentum of 0.09, 0.9, 0.99 there is a plain run and a tower that
tunes both. Two more runs use plain SGD: He et al.'s schedule, and a replay. The replay follows the
schedule that the tower from He et al.'s lr and momentum learned with the first seed.

The presets `cpu` and `cpu_bf16` train for 10 epochs, in float32 and in bf16. `paper` and
`paper_bf16` train for the paper's 64,000 steps, `paper_bf16` on a CPU. bf16 takes about half the
time of float32 on a processor with bf16 instructions, and longer without them.

Finished runs in the store are not repeated. `start=records` also takes runs from the records in the
results.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.config.compose import compose
from experiments.config.identity import run_hash
from experiments.config.schema import Config, StackConfig
from experiments.files import csv_text, write_text
from experiments.records.store import RunDirectory, RunStore
from experiments.studies.study import (
    CellOptions,
    Part,
    Preset,
    Request,
    Study,
    chosen,
)
from hyperopt import parse

LRS, MOMENTA = (0.1, 0.01, 1.0), (0.9, 0.09, 0.99)
# The most informative first: He et al.'s own start, a wild one, a slow one.
FIRST = ((0.1, 0.9), (1.0, 0.09), (0.01, 0.99))
STARTS = (*FIRST, *((lr, m) for m in MOMENTA for lr in LRS if (lr, m) not in FIRST))
WEIGHT_DECAY = 1e-4

KINDS = {
    "plain": "plain SGD",
    "tower": "tower",
    "he": "He et al.'s schedule",
    "replay": "replay of the tower",
}

TEN_EPOCHS = ("trainer.epochs=10", "trainer.steps=null", "trainer.record_every=50", "device=cpu")

# The schedules stretch to any length.
PRESETS = {
    "cpu": Preset(TEN_EPOCHS),
    "cpu_bf16": Preset((*TEN_EPOCHS, "precision=bf16")),
    "paper": Preset(),
    "paper_bf16": Preset(("device=cpu", "precision=bf16"), seeds=(0,)),
    "quick": Preset(
        ("trainer.epochs=1", "trainer.steps=8", "trainer.record_every=1", "device=cpu"), seeds=(0,)
    ),
}


@dataclass(frozen=True)
class Cell:
    """One curve of the figure.

    Attributes:
        kind: one of `KINDS`.
        lr, momentum: the start.
    """

    kind: str
    lr: float
    momentum: float

    @property
    def stack(self) -> str:
        """The notation; the hyper-step sizes are the paper's."""
        plain = f"SGD({self.lr}, momentum={self.momentum}, weight_decay={WEIGHT_DECAY})"
        if self.kind != "tower":
            return plain
        lr, momentum = f"{self.lr**2 * 1e-3:.6g}", f"{1e-6 / (1 - self.momentum):.6g}"
        return f"{plain}[lr, momentum] / SGD({{lr: {lr}, momentum: {momentum}}})"

    @property
    def label(self) -> str:
        return f"{KINDS[self.kind]}, lr {self.lr}, momentum {self.momentum}"


HE = Cell("he", 0.1, 0.9)
# The tower whose schedule is replayed, and its replay.
REPLAYED, REPLAY = Cell("tower", 0.1, 0.9), Cell("replay", 0.1, 0.9)

CELLS = (HE, *(Cell(kind, *start) for start in STARTS for kind in ("tower", "plain")))


def cell_config(cell: Cell, seed: int, overrides: Sequence[str]) -> Config:
    """The config of one run; for a replay, the overrides must have the file."""
    schedule = cell.kind if cell.kind in ("he", "replay") else "constant"
    base = _compose(f"schedule={schedule}", *overrides)
    return replace(base, stack=StackConfig(cell.stack), seed=seed, row=cell.label)


@functools.lru_cache
def _compose(*overrides: str) -> Config:
    return compose(["experiment=figure2", *overrides])


def cell_of(summary: dict[str, Any]) -> Cell:
    """The cell of a run."""
    stack = parse(summary["stack"])
    kinds = {"steps": "he", "replay": "replay", None: "tower" if stack.height else "plain"}
    start: Any = stack.levels[0].values
    kind = kinds[summary.get("schedule", {}).get("name")]
    return Cell(kind, start["lr"], start["momentum"])


def learned(run: RunDirectory) -> list[list[Any]]:
    """The schedule that a finished tower learned: lr and momentum by step.

    Steps count from 1. The first step uses the initial values.
    """
    start = cell_of(run.summary() or {})
    with open(run.path / "hyperparameters.csv", newline="") as file:
        rows: list[list[Any]] = [
            [int(row["step"]), row["0.lr"], row["0.momentum"]] for row in csv.DictReader(file)
        ]
    first = [[1, start.lr, start.momentum]] if rows[0][0] > 1 else []
    return [["step", "lr", "momentum"], *first, *rows]


def parts(request: Request) -> Iterator[Part]:
    """The grid, then the replays."""
    overrides, seeds = request.overrides, request.seeds
    cells = chosen(CELLS, request, list(KINDS)[:3])
    batches = [[(cell, cell_config(cell, seed, overrides)) for cell in cells] for seed in seeds]
    grid = Part(batches)
    yield grid
    if REPLAYED not in cells:
        return
    tower = grid.configs[cells.index(REPLAYED)]
    path = request.folder / "replay.csv"
    write_text(path, csv_text(learned(RunStore(tower.store).run(run_hash(tower)))))
    overrides = (*overrides, f'schedule.file="{path}"')
    yield Part([[(REPLAY, cell_config(REPLAY, seed, overrides)) for seed in seeds]])


STUDY = Study(
    "figure2",
    PRESETS,
    parts,
    __doc__,
    options=CellOptions,
    starts=("scratch", "records"),
    place=2,
)
