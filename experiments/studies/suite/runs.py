"""The suite: small tasks of many kinds; Auto beside tuned and learning-rate-free optimizers.

    python -m experiments.studies suite preset=cpu
    python -m experiments.studies suite preset=paper tasks=table,vae methods=Auto,Adam seeds=0
    python -m experiments.studies suite preset=cpu start=records

The suite has ten small problems (experiments/tasks/problems.py); the preset `paper` adds the five
tasks of the robustness benchmark. Choose settings of Auto on the tasks of `CHOOSING` only; the
tasks of `REPORTING` test the choice. `cpu` takes an hour on one core: one seed, and fewer lrs.

    Auto            from each of four lrs, and also under a linear decay to zero (Auto-linear)
    Adam            lrs from a grid of half powers of ten, as for the next two; the best lr counts
    AdamW-cosine    AdamW with a warm-up of a twentieth of the run and a cosine to zero
    ScheduleFree    Schedule-Free AdamW
    Adam-2          the paper's tower of Adam, height 2, from the lrs of Auto
    Prodigy, Prodigy-cosine, ProdigyPlus, MoMo, Mechanic, TRAC, DAdaptAdam
                    see experiments/config/baselines.py; with their default lr

Finished runs in the store are not repeated. `start=records` also takes runs from the records in the
results.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from experiments.cli import choose_all
from experiments.config.baselines import parse
from experiments.config.compose import compose
from experiments.config.schema import Config, StackConfig
from experiments.studies.stacks import STARTS, MethodCell, auto, tower
from experiments.studies.study import MethodOptions, Part, Preset, Request, Study


@dataclass(frozen=True)
class Task:
    """A training task and its metric.

    Attributes:
        label: for tables.
        overrides: of the runs' config.
        metric: a key of a run's summary; less is better.
    """

    label: str
    overrides: tuple[str, ...]
    metric: str = "held_out_loss"


def _problem(label: str, name: str, batch_size: int) -> Task:
    size = f"trainer.batch_size={batch_size}"
    return Task(label, ("experiment=suite", f"data.name=problem-{name}", size))


TASKS = {
    "table": _problem("noisy table", "table", 64),
    "picture": _problem("picture by sines", "picture", 1600),
    "finetune": _problem("fine-tuning", "finetune", 16),
    "transformer": _problem("transformer", "transformer", 8),
    "cartpole": _problem("cart-pole", "cartpole", 32),
    "ratings": _problem("Zipf factors", "ratings", 256),
    "vae": _problem("VAE", "vae", 64),
    "convnet": _problem("convnet", "convnet", 32),
    "change": _problem("change", "change", 64),
    "stiff": _problem("stiff", "stiff", 64),
    "mlp": Task("MLP", ("experiment=table1", "trainer.epochs=4"), "test_error"),
    "softmax": Task("softmax", ("experiment=softmax", "trainer.epochs=4"), "objective"),
    "mlp30": Task("MLP, 28 epochs", ("experiment=table1", "trainer.epochs=28"), "test_error"),
    "char_rnn": Task("RNN", ("experiment=char_rnn", "trainer.epochs=4"), "test_loss"),
    "resnet": Task(
        "ResNet-20", ("experiment=figure2", "trainer.epochs=4", "trainer.steps=null"), "test_error"
    ),
}
CHOOSING = ("table", "picture", "finetune", "transformer", "cartpole")
REPORTING = ("ratings", "vae", "convnet", "change", "stiff")
OLD = ("mlp", "softmax", "mlp30", "char_rnn", "resnet")  # Auto was developed on these

AUTO_STARTS = (1e-8, 1e-5, 1e-2, 10.0)
LINEAR = ("schedule=linear", "schedule.final=0")
TUNED = ("Adam", "AdamW-cosine", "ScheduleFree")  # they count with their best lr

# The stack and the overrides of each method. A stack without {lr} has no start.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Auto": ("Auto", ()),
    "Adam": ("Adam({lr})", ()),
    "AdamW-cosine": ("AdamW({lr})", ("schedule=warmup_cosine",)),
    "ScheduleFree": ("AdamWScheduleFree({lr})", ()),
    "Prodigy": ("Prodigy()", ()),
    "Auto-linear": ("Auto", LINEAR),
    "Prodigy-cosine": ("Prodigy()", ("schedule=cosine",)),
    "ProdigyPlus": ("ProdigyPlusScheduleFree()", ()),
    "MoMo": ("MomoAdam()", ()),
    "Mechanic": ("Mechanic()", ()),
    "TRAC": ("Trac()", ()),
    "DAdaptAdam": ("DAdaptAdam()", ()),
    "Adam-2": (tower("Adam", 2, "{lr}"), ()),
}


@dataclass(frozen=True)
class SuitePreset(Preset):
    """Adds the tasks and the grid.

    Attributes:
        tasks: keys of `TASKS`.
        grid: the lrs of the tuned methods.
    """

    tasks: tuple[str, ...] = CHOOSING + REPORTING
    grid: tuple[float, ...] = STARTS[9:14]  # 3e-4 to 3e-2


PRESETS = {
    "cpu": SuitePreset(("device=cpu",), (0,)),
    "paper": SuitePreset(("device=cpu",), tasks=tuple(TASKS), grid=STARTS[6:17]),
    "quick": SuitePreset(
        ("device=cpu", "trainer.compile=false", "trainer.epochs=1", "trainer.steps=8"),
        (0,),
        ("table", "cartpole"),
        STARTS[10:12],
    ),
}


class Cell(MethodCell):
    """A cell: a task in `TASKS`, a method in `METHODS`, and a start."""

    @property
    def stack(self) -> str:
        """The notation, as in a run's summary."""
        text = METHODS[self.method][0]
        return auto(self.start) if text == "Auto" else str(parse(text.format(lr=self.start)))


def starts(method: str, preset: SuitePreset) -> tuple[float | None, ...]:
    if method in TUNED:
        return preset.grid
    text = METHODS[method][0]
    return AUTO_STARTS if text == "Auto" or "{lr}" in text else (None,)


def cells(preset: SuitePreset) -> list[Cell]:
    return [
        Cell(task, method, start)
        for task in preset.tasks
        for method in METHODS
        for start in starts(method, preset)
    ]


@functools.lru_cache
def task_config(task: str, method: str, *overrides: str) -> Config:
    """The config of a method on a task, without stack and seed."""
    return compose([*TASKS[task].overrides, *METHODS[method][1], *overrides])


def _key(model: str, data: str, epochs: int, stack: str, schedule: str) -> tuple[Any, ...]:
    return model, data if model == "problem" else "", epochs, stack, schedule


@functools.lru_cache
def _by_run(preset: str) -> dict[tuple[Any, ...], Cell]:
    found = {}
    for cell in cells(PRESETS[preset]):
        config = task_config(cell.task, cell.method, *PRESETS[preset].overrides)
        named = config.model.name, config.data.name, config.trainer.epochs
        found[_key(*named, cell.stack, config.schedule.name)] = cell
    return found


def cell_of(preset: str, run: dict[str, Any]) -> Cell:
    """The cell of a run.

    Raises:
        ValueError: no cell matches.
    """
    named = run["model"]["name"], run["data"], run["trainer"]["epochs"], run["stack"]
    schedule = run.get("schedule", {"name": "constant"})["name"]
    if (key := _key(*named, schedule)) not in (known := _by_run(preset)):
        raise ValueError(f"the run {key} belongs to no cell of the preset {preset}")
    return known[key]


def parts(request: Request) -> Iterator[Part]:
    """The requested runs, one task after the other; `lrs` has one digit."""
    tasks = choose_all("tasks", request.options.tasks, request.preset.tasks)
    methods = choose_all("methods", request.options.methods, tuple(METHODS))

    def configs(cell: Cell) -> Iterator[tuple[Cell, Config]]:
        base = task_config(cell.task, cell.method, *request.overrides)
        named = replace(base, experiment="suite", preset=request.name, row=cell.label)
        for seed in request.seeds:
            yield cell, replace(named, stack=StackConfig(cell.stack), seed=seed)

    wanted = [c for c in cells(request.preset) if c.task in tasks and c.method in methods]
    if request.options.lrs:
        known = [f"{c.start:.1g}" for c in wanted if c.start is not None]
        lrs = choose_all("lrs", request.options.lrs, list(dict.fromkeys(known)))
        wanted = [c for c in wanted if c.start is None or f"{c.start:.1g}" in lrs]
    # One batch, so that the tasks share compiled steps.
    yield Part([[run for cell in wanted for run in configs(cell)]])


STUDY = Study(
    "suite",
    PRESETS,
    parts,
    __doc__,
    part_of=lambda preset, run: cell_of(preset, run).task,
    options=MethodOptions,
    starts=("scratch", "records"),
)
