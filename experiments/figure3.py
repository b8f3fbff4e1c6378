"""The paper's Figure 3a: towers of SGD and of Adam from many initial step sizes, on MNIST.

    python -m experiments.figure3
    python -m experiments.figure3 preset=paper workers=4 data.root=data store=runs
    python -m experiments.figure3 preset=quick seeds=0

All levels of a tower start at the same step size. What comes out is `figure3_PRESET_runs.csv`, a
line for each run, from which `scripts.tables` draws. Runs that are finished are not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .command import (
    asked_for_help,
    choose,
    do_and_record,
    draw,
    publish,
    results_of,
    seed_list,
    split,
)
from .config import Config, StackConfig, compose
from .run import guarded, resolve_all

# A level of each rule, with the published package's constants.
LEVELS = {"SGD": "SGD({lr})", "Adam": "Adam({lr}, v0=1e-8)"}
HEIGHTS = range(6)
STARTS = tuple(float(f"{10 ** (k / 2):.4g}") for k in range(-16, 5))  # 1e-8 to 1e2

# What may be set for all runs at once; it leaves the setting alone.
SETTABLE = (
    "data.root",
    "data.download",
    "device",
    "logger",
    "progress",
    "store",
    "trainer.compile",
    "trainer.compile_model",
    "workers",
)


@dataclass(frozen=True)
class Preset:
    """How much is done.

    Attributes:
        epochs: of each run.
        starts: the initial step sizes.
        overrides: of the runs' config.
    """

    epochs: int
    starts: tuple[float, ...] = STARTS
    overrides: tuple[str, ...] = ()


PRESETS = {
    "paper": Preset(epochs=30),
    "cpu": Preset(epochs=5, overrides=("device=cpu",)),
    # What results/reference/figure3_published.csv is compared with.
    "quick": Preset(epochs=2, starts=STARTS[::2], overrides=("device=cpu",)),
}


@dataclass(frozen=True)
class Options:
    """What the command line sets beside the keys of the runs' config."""

    preset: str = "cpu"
    seeds: str = "0,1,2"
    results: str = "results"


@dataclass(frozen=True)
class Tower:
    """One point of a curve, but for its seeds."""

    rule: str
    height: int
    lr: float

    @property
    def stack(self) -> str:
        level = LEVELS[self.rule].format(lr=self.lr)
        return " / ".join([level] * (self.height + 1))


COLUMNS = (
    *("rule", "height", "lr", "seed", "data", "epochs", "device", "hash"),
    *("test_error", "train_loss", "diverged"),
)


def figure_runs(
    preset: Preset, seeds: Sequence[int] = (0, 1, 2), overrides: Sequence[str] = ()
) -> list[tuple[Tower, Config]]:
    """The runs of the figure, each with its tower."""
    base = compose(
        ["experiment=figure3", f"trainer.epochs={preset.epochs}", *preset.overrides, *overrides]
    )
    towers = [Tower(rule, n, lr) for rule in LEVELS for n in HEIGHTS for lr in preset.starts]
    return [
        (tower, replace(base, stack=StackConfig(tower.stack), seed=seed, row=label(tower)))
        for tower in towers
        for seed in seeds
    ]


def label(tower: Tower) -> str:
    return f"{tower.rule}, height {tower.height}, from {tower.lr:g}"


def run_lines(towers: Sequence[Tower], summaries: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """The tidy CSV."""
    lines: list[list[Any]] = [list(COLUMNS)]
    for tower, summary in zip(towers, summaries, strict=True):
        lines.append(
            [
                *(tower.rule, tower.height, tower.lr, summary["seed"], summary["data"]),
                *(summary["trainer"]["epochs"], summary["provenance"]["device"], summary["hash"]),
                *(summary["test_error"], summary["train_loss"], summary["diverged"]),
            ]
        )
    return lines


def _arguments(arguments: Sequence[str]) -> tuple[Options, list[int], list[str]]:
    """The command's options, the seeds among them, and the overrides of its runs."""
    options, overrides = split(arguments, Options, SETTABLE)
    choose("preset", options.preset, list(PRESETS))
    return options, seed_list(options.seeds), [*overrides, f"preset={options.preset}"]


def main() -> int:
    if asked_for_help(__doc__, Options, SETTABLE):
        return 0
    options, seeds, overrides = _arguments(sys.argv[1:])
    runs = figure_runs(PRESETS[options.preset], seeds, overrides)
    towers, configs = [tower for tower, _ in runs], resolve_all([config for _, config in runs])
    results = results_of(options.results, configs)
    path = results / f"figure3_{options.preset}_runs"
    if do_and_record(configs, path, lambda summaries: run_lines(towers, summaries)) is None:
        return 1
    draw(results)
    publish(results, configs[0])
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
