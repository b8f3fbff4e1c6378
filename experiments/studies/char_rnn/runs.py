"""The paper's character RNN on War and Peace: Adam, and towers that tune it, from three lrs.

    python -m experiments.studies char_rnn preset=cpu
    python -m experiments.studies char_rnn preset=paper seeds=0 workers=1 data.root=data store=runs
    python -m experiments.studies char_rnn preset=cpu start=records

The runs start from lr 1e-4, 2e-3 and 1e-2. Each start has a plain run and a tower that tunes lr.
Three more runs: char-rnn's own lr decay, a tower that tunes lr, beta1 and beta2, and a tower that
never stops tuning. The other towers stop after a few hundred steps;
configs/experiment/char_rnn_tower.yaml explains why. The preset `paper` adds rows with one seed:
from each lr, a tower of Adam that never stops and has a hundredth of that lr above; a tower in the
log domain; and Auto.

Finished runs in the store are not repeated. `start=records` also takes runs from the records in the
results.
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
# Stacks without a config; {lr} is the start.
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

# For each seed, the first wave is done before the second, so that early results say most.
WAVES = ((DECAY, *TOWERS), (*PLAIN, BETAS, FREE))
CELLS = tuple(cell for wave in WAVES for cell in wave)
ONCE = (*ADAMS, LOG, AUTO)  # one seed of each says enough


@dataclass(frozen=True)
class CharRnnPreset(Preset):
    """Adds the cells that have the first seed only."""

    once: tuple[Cell, ...] = ()


# The decay stretches to any length.
PRESETS = {
    "cpu": CharRnnPreset(("trainer.epochs=5", "device=cpu")),
    "paper": CharRnnPreset(once=ONCE),
    "quick": CharRnnPreset(
        ("trainer.epochs=1", "trainer.steps=20", "trainer.record_every=1", "device=cpu"), (0,)
    ),
}


def cell_config(cell: Cell, seed: int, overrides: Sequence[str]) -> Config:
    """The config of one run: its experiment's, with the cell's stack and start."""
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
    """The cell of a run."""
    return _by_stack()[summary["stack"], "schedule" in summary]


def parts(request: Request) -> Iterator[Part]:
    """All runs, the most informative first."""
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
    starts=("scratch", "records"),
    place=4,
)
