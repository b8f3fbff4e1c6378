"""The paper's Figure 2: ResNet-20 on CIFAR-10, plain SGD and towers from a grid of starts.

    python -m experiments.figure2 preset=cpu
    python -m experiments.figure2 preset=paper seeds=0 workers=1 data.root=data store=runs

For each lr of 0.01, 0.1, 1.0 and momentum of 0.09, 0.9, 0.99 there is a plain run and the tower
that tunes both, and besides them He et al.'s schedule. Runs that are finished are not done again.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from .config import Config, compose
from .pool import run_all
from .run import describe, guarded, resolve_all

LRS = (0.1, 0.01, 1.0)
MOMENTA = (0.9, 0.09, 0.99)
WEIGHT_DECAY = 1e-4

# What may be set for all runs at once; it leaves the setting alone.
SETTABLE = (
    "data.root",
    "data.download",
    "device",
    "logger",
    "progress",
    "store",
    "trainer.autocast",
    "trainer.compile",
    "trainer.compile_model",
    "trainer.threads",
    "workers",
)

# The runs' overrides. The schedules stretch to whatever length there is.
PRESETS: dict[str, tuple[str, ...]] = {
    "paper": (),
    "cpu": ("trainer.epochs=10", "trainer.steps=null", "device=cpu"),
}


@dataclass(frozen=True)
class Options:
    """What the command line sets beside the keys of the runs' config."""

    preset: str = "paper"
    seeds: str = "0,1,2"


@dataclass(frozen=True)
class Cell:
    """One curve of the figure.

    Attributes:
        kind: "plain", "tower" or "he".
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
        name = {"he": "He et al.'s schedule"}.get(self.kind, self.kind)
        return f"{name}, lr {self.lr}, momentum {self.momentum}"


# By what is most useful first, should one not wait for the last.
CELLS = (
    Cell("he", 0.1, 0.9),
    *(
        Cell(kind, lr, momentum)
        for momentum in MOMENTA
        for lr in LRS
        for kind in ("plain", "tower")
    ),
)


def figure_runs(
    preset: str, seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[tuple[Cell, Config]]:
    """The runs of the figure, each with its cell; the first seed's come first."""
    runs = []
    for seed in seeds:
        for cell in CELLS:
            own = [f"stack={cell.stack}", f"seed={seed}", f'row="{cell.label}"']
            own += ["schedule=he"] * (cell.kind == "he")
            config = compose(["experiment=figure2", *PRESETS[preset], *overrides, *own])
            runs.append((cell, config))
    return runs


def _arguments(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Split the command line into this command's options and the runs' overrides."""
    own, overrides = {}, []
    known = [*(f.name for f in fields(Options)), *SETTABLE]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{argument!r} is not an option of this command, as key=value; {hint}")
        if key in SETTABLE:
            overrides.append(argument)
        else:
            own[key] = value
    options = Options(**own)
    if options.preset not in PRESETS:
        raise ValueError(f"preset={options.preset!r} is not one of {', '.join(PRESETS)}")
    return options, overrides


def main() -> int:
    if set(sys.argv[1:]) & {"-h", "--help"}:
        print(__doc__)
        return 0
    options, overrides = _arguments(sys.argv[1:])
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = figure_runs(options.preset, seeds, overrides)
    configs = resolve_all([config for _, config in runs])
    outcomes = run_all(configs, configs[0].workers)
    for outcome in outcomes:
        print(describe(outcome))
    failed: list[Any] = [outcome for outcome in outcomes if outcome.summary is None]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
