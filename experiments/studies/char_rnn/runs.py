"""The paper's character RNN on War and Peace: Adam, and towers that tune it, from three lrs.

    python -m experiments.studies char_rnn preset=cpu
    python -m experiments.studies char_rnn preset=paper seeds=0 workers=1 data.root=data store=runs
    python -m experiments.studies char_rnn preset=cpu start=records

From each lr of 1e-4, 2e-3, 1e-2 there is a plain run and the tower that tunes lr; besides them
char-rnn's own decay of the lr, a tower that tunes lr, beta1 and beta2, and one that tunes to the
end: the others stop after some hundred steps; configs/experiment/char_rnn_tower.yaml says why.
The preset `paper` has one seed of more rows: from each lr the tower of Adam that tunes to the end
with a hundredth of that lr above, one that tunes in the log domain, and Auto.

Runs that are finished in the store are not done again; with `start=records` nor are those whose
records are in the results already.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.config.compose import compose
from experiments.config.schema import Config, StackConfig
from experiments.studies.stacks import auto
from experiments.studies.study import (
    SETTABLE_WITH_RECORDS,
    CellOptions,
    Part,
    Preset,
    Request,
    Study,
    chosen,
)
from hyperopt import Stack, parse

LRS = (1e-4, 2e-3, 1e-2)
KARPATHYS = 2e-3

KINDS = {
    "decay": "Adam, char-rnn's decay",
    "plain": "plain Adam",
    "tower": "tower, tunes lr",
    "betas": "tower, tunes lr and betas",
    "free": "tower, never stops",
    "adam": "tower of Adam, never stops",
    "log": "tower, lr in the log domain",
    "auto": "Auto",
}
OVERRIDES = {
    "decay": ("experiment=char_rnn", "schedule=exponential"),
    "plain": ("experiment=char_rnn",),
    "tower": ("experiment=char_rnn_tower",),
    "betas": ("experiment=char_rnn_betas",),
    "free": ("experiment=char_rnn_free",),
}
# The stacks that are not in a config, with the start as {lr}.
STACKS = {
    "adam": "Adam({lr})[lr] / Adam({above:.4g})",
    "log": "Adam({lr})[lr: log] / Adam(0.001)",
    "auto": auto(),
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

ADAMS = tuple(Cell("adam", lr) for lr in LRS)  # Adam above, with a hundredth of the start
LOG, AUTO = Cell("log", KARPATHYS), Cell("auto", 1e-5)

# Should one not wait for the last: of each seed the first are done before the second.
WAVES = ((DECAY, *TOWERS), (*PLAIN, BETAS, FREE))
CELLS = tuple(cell for wave in WAVES for cell in wave)
ONCE = (*ADAMS, LOG, AUTO)  # one seed of each says enough


@dataclass(frozen=True)
class CharRnnPreset(Preset):
    """How much is done: the cells of which the first seed alone is trained."""

    once: tuple[Cell, ...] = ()


# The decay stretches to whatever length there is.
PRESETS = {
    "cpu": CharRnnPreset(("trainer.epochs=5", "device=cpu")),
    "paper": CharRnnPreset(once=ONCE),
    "quick": CharRnnPreset(
        ("trainer.epochs=1", "trainer.steps=20", "trainer.record_every=1", "device=cpu"), (0,)
    ),
}


def cell_config(cell: Cell, seed: int, overrides: Sequence[str]) -> Config:
    """The config of one run: that of its experiment, but for its stack or the lr it starts from."""
    base = _compose(*OVERRIDES.get(cell.kind, OVERRIDES["plain"]), *overrides)
    if cell.kind in STACKS:
        text = STACKS[cell.kind].format(lr=cell.lr, above=cell.lr / 100)
        stack = parse(text)
    else:
        lowest, *above = parse(base.stack.notation or "").levels
        stack = Stack(lowest.with_values({"lr": cell.lr}), *above)
    return replace(base, stack=StackConfig(str(stack)), seed=seed, row=cell.label)


@functools.lru_cache
def _compose(*overrides: str) -> Config:
    return compose(overrides)


@functools.lru_cache
def _by_stack() -> dict[tuple[str | None, bool], Cell]:
    configs = ((cell, cell_config(cell, 0, ())) for cell in (*CELLS, *ONCE))
    return {(c.stack.notation, c.schedule.name != "constant"): cell for cell, c in configs}


def cell_of(summary: dict[str, Any]) -> Cell:
    """The cell that a run belongs to."""
    return _by_stack()[summary["stack"], "schedule" in summary]


def parts(request: Request) -> Iterator[Part]:
    """All runs, those that tell most first."""
    seeds, overrides = request.seeds, request.overrides
    batches = [(seed, chosen(wave, request, list(KINDS))) for seed in seeds for wave in WAVES]
    batches.append((seeds[0], chosen(request.preset.once, request, list(KINDS))))
    yield Part(
        [
            [(cell, cell_config(cell, seed, overrides)) for cell in cells]
            for seed, cells in batches
            if cells
        ]
    )


STUDY = Study(
    "char_rnn",
    PRESETS,
    parts,
    __doc__,
    options=CellOptions,
    settable=SETTABLE_WITH_RECORDS,
    starts=("scratch", "records"),
    place=4,
)
