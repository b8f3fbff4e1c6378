"""Auto alone, and under a linear decay to zero, on the tasks of the robustness benchmark.

    python -m experiments.studies decay preset=cpu
    python -m experiments.studies decay preset=paper start=records

A schedule multiplies the lr that Auto learns by a factor that falls from 1 to 0 during the run.
`cpu` takes an hour on one core: its character RNN and ResNet-20 are shorter; they and the MLP of 30
epochs have one start.

Finished runs in the store are not repeated. `start=records` also takes runs from the records in the
results.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.config.compose import compose
from experiments.config.schema import Config, StackConfig
from experiments.studies.robustness.runs import TASKS
from experiments.studies.stacks import auto
from experiments.studies.study import Part, Preset, Request, Study

STARTS = (1e-5, 1e-2)  # the default, and a start near the learned lr
DECAYS = {"none": (), "linear": ("schedule=linear", "schedule.final=0")}


@dataclass(frozen=True)
class DecayPreset(Preset):
    """Adds the overrides of each task, and the tasks with one start only."""

    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    one_start: tuple[str, ...] = ()


EPOCHS = {"mlp": ("trainer.epochs=5",), "softmax": ("trainer.epochs=5",)}
PRESETS = {
    "cpu": DecayPreset(
        ("device=cpu",),
        tasks={
            **EPOCHS,
            "mlp30": ("trainer.epochs=30",),
            "char_rnn": ("trainer.epochs=1", "trainer.steps=400"),
            "resnet": ("trainer.epochs=1", "trainer.steps=100"),
        },
        one_start=("mlp30", "char_rnn", "resnet"),
    ),
    "paper": DecayPreset(
        tasks={
            **EPOCHS,
            "mlp30": ("trainer.epochs=30",),
            "char_rnn": ("trainer.epochs=3",),
            "resnet": ("trainer.epochs=2", "trainer.steps=null"),
        },
    ),
    "quick": DecayPreset(
        ("device=cpu", "trainer.compile=false"), (0,), {"mlp": ("trainer.epochs=1",)}
    ),
}


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Attributes:
        task: a key of `TASKS`.
        decay: a key of `DECAYS`.
        start: the initial lr.
    """

    task: str
    decay: str
    start: float

    @property
    def label(self) -> str:
        return f"Auto from {self.start:g}, decay {self.decay}, {self.task}"


@functools.lru_cache
def task_config(preset: str, task: str, decay: str, *overrides: str) -> Config:
    """The config that the runs of a task share."""
    own = (*PRESETS[preset].tasks[task], *DECAYS[decay])
    named = f"experiment={TASKS[task].experiment}"
    return compose([named, "trainer.record_every=100", *own, *overrides])


def cell_of(preset: str, summary: dict[str, Any]) -> Cell:
    """The cell of a run."""
    decay = "linear" if "schedule" in summary else "none"
    start = next(start for start in STARTS if auto(start) == summary["stack"])
    for task in PRESETS[preset].tasks:
        config = task_config(preset, task, decay)
        if (config.model.name, config.trainer.epochs) == (
            summary["model"]["name"],
            summary["trainer"]["epochs"],
        ):
            return Cell(task, decay, start)
    raise ValueError(f"run {summary['hash']} belongs to no task of the preset {preset}")


def parts(request: Request) -> Iterator[Part]:
    """All runs, one task after the other."""
    batches = []
    for task in request.preset.tasks:
        starts = STARTS[: 1 if task in request.preset.one_start else None]
        cells = [Cell(task, decay, start) for decay in DECAYS for start in starts]
        batches.append(
            [
                (
                    cell,
                    replace(
                        task_config(request.name, task, cell.decay, *request.overrides),
                        stack=StackConfig(auto(cell.start)),
                        experiment="decay",
                        seed=seed,
                        row=cell.label,
                    ),
                )
                for cell in cells
                for seed in request.seeds
            ]
        )
    yield Part(batches)


STUDY = Study(
    "decay",
    PRESETS,
    parts,
    __doc__,
    part_of=lambda preset, run: cell_of(preset, run).task,
    starts=("scratch", "records"),
)
