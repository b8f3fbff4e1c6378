"""The paper's character RNN on War and Peace: Adam, and towers that tune it, from three lrs.

    python -m experiments.studies char_rnn preset=cpu
    python -m experiments.studies char_rnn preset=paper seeds=0 workers=1 data.root=data store=runs
    python -m experiments.studies char_rnn preset=cpu start=records

From each lr of 1e-4, 2e-3, 1e-2 there is a plain run and the tower that tunes lr; besides them
char-rnn's own decay of the lr, a tower that tunes lr, beta1 and beta2, and one that never stops to
tune: the others do after some hundred steps, for what configs/experiment/char_rnn_tower.yaml says.

Runs that are finished in the store are not done again; with `start=records` nor are those whose
records are in the results already.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.config.compose import compose
from experiments.config.schema import Config, StackConfig
from experiments.studies.study import SETTABLE_WITH_RECORDS, Part, Preset, Request, Study
from hyperopt import Stack, parse

LRS = (1e-4, 2e-3, 1e-2)
KARPATHYS = 2e-3

KINDS = {
    "decay": "Adam, char-rnn's decay",
    "plain": "plain Adam",
    "tower": "tower, tunes lr",
    "betas": "tower, tunes lr and betas",
    "free": "tower, never stops",
}
OVERRIDES = {
    "decay": ("experiment=char_rnn", "schedule=exponential"),
    "plain": ("experiment=char_rnn",),
    "tower": ("experiment=char_rnn_tower",),
    "betas": ("experiment=char_rnn_betas",),
    "free": ("experiment=char_rnn_free",),
}

# The decay stretches to whatever length there is.
PRESETS = {
    "cpu": Preset(("trainer.epochs=5", "device=cpu")),
    "paper": Preset(),
}


@dataclass(frozen=True)
class Cell:
    """One curve.

    Attributes:
        kind: one of `KINDS`.
        lr: the start.
    """

    kind: str
    lr: float

    @property
    def label(self) -> str:
        return f"{KINDS[self.kind]}, from lr {self.lr}"


DECAY, BETAS, FREE = Cell("decay", KARPATHYS), Cell("betas", KARPATHYS), Cell("free", LRS[0])
PLAIN, TOWERS = (tuple(Cell(kind, lr) for lr in LRS) for kind in ("plain", "tower"))

# Should one not wait for the last: of each seed the first are done before the second.
WAVES = ((DECAY, *TOWERS), (*PLAIN, BETAS, FREE))
CELLS = tuple(cell for wave in WAVES for cell in wave)


def cell_config(cell: Cell, seed: int, overrides: Sequence[str]) -> Config:
    """The config of one run: that of its experiment, but for the lr that it starts from."""
    base = _compose(*OVERRIDES[cell.kind], *overrides)
    lowest, *above = parse(base.stack.notation or "").levels
    stack = Stack(lowest.with_values({"lr": cell.lr}), *above)
    return replace(base, stack=StackConfig(str(stack)), seed=seed, row=cell.label)


@functools.lru_cache
def _compose(*overrides: str) -> Config:
    return compose(overrides)


def cell_of(summary: dict[str, Any]) -> Cell:
    """The cell that a run belongs to."""
    levels: Any = parse(summary["stack"]).levels
    kinds = {
        (): "decay" if "schedule" in summary else "plain",
        ("lr",): "free" if levels[-1].settings["until"] == math.inf else "tower",
    }
    return Cell(kinds.get(tuple(summary["tuned"]), "betas"), levels[0].values["lr"])


def parts(request: Request) -> Iterator[Part]:
    """All runs, those that tell most first."""
    yield Part(
        [
            [(cell, cell_config(cell, seed, request.overrides)) for cell in wave]
            for seed in request.seeds
            for wave in WAVES
        ]
    )


STUDY = Study(
    "char_rnn",
    PRESETS,
    parts,
    __doc__,
    settable=SETTABLE_WITH_RECORDS,
    starts=("scratch", "records"),
)
