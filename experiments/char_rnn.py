"""The paper's character RNN on War and Peace: Adam, and towers that tune it, from three lrs.

    python -m experiments.char_rnn preset=cpu
    python -m experiments.char_rnn preset=paper seeds=0 workers=1 data.root=data store=runs
    python -m experiments.char_rnn preset=cpu start=records

From each lr of 1e-4, 2e-3, 1e-2 there is a plain run and the tower that tunes lr; besides them
char-rnn's own decay of the lr, a tower that tunes lr, beta1 and beta2, and one that never stops to
tune: the others do after some hundred steps, for what configs/experiment/char_rnn_tower.yaml says.

What comes out is `char_rnn_PRESET.jsonl.gz`, the records of all finished runs, from which
`scripts.tables` draws. Runs that are finished in the store are not done again; with `start=records`
nor are those whose records are in the results already.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hyperopt import Stack, parse

from .command import (
    LONG_RUNS,
    LongOptions,
    asked_for_help,
    do_in_waves,
    draw,
    long_arguments,
    publish,
    results_of,
)
from .config import Config, StackConfig, compose
from .run import guarded, resolve_all

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

# The runs' overrides. The decay stretches to whatever length there is.
PRESETS: dict[str, tuple[str, ...]] = {
    "paper": (),
    "cpu": ("trainer.epochs=5", "device=cpu"),
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


def main() -> int:
    if asked_for_help(__doc__, LongOptions, LONG_RUNS):
        return 0
    options, seeds, overrides = long_arguments(sys.argv[1:], PRESETS, LongOptions)
    waves = [
        resolve_all([cell_config(cell, seed, overrides) for cell in wave])
        for seed in seeds
        for wave in WAVES
    ]
    results = results_of(options.results, waves[0])
    done = do_in_waves(waves, results / f"char_rnn_{options.preset}.jsonl.gz", options.start)
    draw(results)
    publish(results, waves[0][0])
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
