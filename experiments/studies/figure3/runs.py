"""The paper's Figure 3a: towers of SGD and of Adam from many initial step sizes, on MNIST.

    python -m experiments.studies figure3
    python -m experiments.studies figure3 preset=paper workers=4 data.root=data store=runs
    python -m experiments.studies figure3 preset=quick seeds=0

All levels of a tower start at the same step size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from experiments.config.compose import compose
from experiments.studies import stacks
from experiments.studies.stacks import LEVELS, STARTS
from experiments.studies.study import Part, Preset, Request, Study, each_seed

HEIGHTS = range(6)


@dataclass(frozen=True)
class Figure3Preset(Preset):
    """Adds the initial step sizes."""

    lrs: tuple[float, ...] = STARTS


PRESETS = {
    "cpu": Figure3Preset(("trainer.epochs=5", "device=cpu")),
    "paper": Figure3Preset(("trainer.epochs=30",)),
    # The setting of published.csv.
    "quick": Figure3Preset(("trainer.epochs=2", "device=cpu"), seeds=(0,), lrs=STARTS[::2]),
}


@dataclass(frozen=True)
class Tower:
    """A point of a curve."""

    rule: str
    height: int
    lr: float

    @property
    def stack(self) -> str:
        return stacks.tower(self.rule, self.height, self.lr)

    @property
    def label(self) -> str:
        return f"{self.rule}, height {self.height}, from {self.lr:g}"


def parts(request: Request) -> Iterator[Part]:
    """The runs of the figure."""
    base = compose(["experiment=figure3", *request.overrides])
    lrs = request.preset.lrs
    towers = [Tower(rule, n, lr) for rule in LEVELS for n in HEIGHTS for lr in lrs]
    yield Part([each_seed(request, base, ((t, t.stack, t.label) for t in towers))])


def line(tower: Tower, summary: dict[str, Any]) -> dict[str, Any]:
    """A run in the CSV."""
    return {
        "rule": tower.rule,
        "height": tower.height,
        "lr": tower.lr,
        "seed": summary["seed"],
        "data": summary["data"],
        "epochs": summary["trainer"]["epochs"],
        "device": summary["provenance"]["device"],
        **{name: summary[name] for name in ("hash", "test_error", "train_loss", "diverged")},
    }


STUDY = Study("figure3", PRESETS, parts, __doc__, line, place=3)
