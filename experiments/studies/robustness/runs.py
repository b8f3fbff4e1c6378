"""The robustness benchmark: every method from many initial learning rates, on five tasks.

    python -m experiments.studies robustness preset=cpu
    python -m experiments.studies robustness preset=paper tasks=mlp methods=Auto,Prodigy seeds=0
    python -m experiments.studies robustness preset=paper start=records workers=4 store=runs

The tasks: mlp and mlp30 (the MLP of Table 1, 5 and 30 epochs), softmax (a convex problem, see
configs/experiment/softmax.yaml), char_rnn (3 epochs), resnet (ResNet-20, 2 epochs of CIFAR-10).
`cpu` takes a few hours on two cores: fewer starts and seeds, and shorter long tasks.

A method has the same setting from every start and, except Adam-HD, on every task:

    Auto            `hyperopt.Auto`; the methods no-... are Auto without one of its parts
    SGD, Momentum, Adam, AdamW
                    as in torch.optim; Momentum is SGD with momentum 0.9
    ScheduleFree, Prodigy, DAdaptAdam, DAdaptSGD
                    see experiments/config/baselines.py; the last three have no initial lr, so one
                    run for each seed counts for all starts
    SGD-HD, Adam-HD Baydin et al. 2018 (arXiv 1703.04782), with the hyper-step sizes of their code:
                    1e-3 for SGD; for Adam 1e-7 on the MLP and softmax regression, 1e-8 on the
                    convolutional net; their code has no RNN, so the RNN has its default, 1e-8
    Adam/SGD        Adam under SGD(1e-5), as in the paper's Table 1
    SGD-5, Adam-2, Adam-5
                    towers of the paper's Figure 3, of this height, all levels started at one lr

All methods are compared with the best fixed lr, the best of SGD, Momentum and Adam. These three
also start at all half powers of ten from 1e-4 to 10; a preset can change this range.

Finished runs in the store are not repeated. `start=records` also takes runs from the records in the
results. So several machines can do tasks, methods and seeds one by one. The most informative runs
come first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.cli import choose_all
from experiments.config.baselines import parse
from experiments.config.compose import compose
from experiments.config.schema import Config, StackConfig
from experiments.studies.stacks import STARTS, MethodCell, auto, tower
from experiments.studies.study import MethodOptions, Part, Preset, Request, Study
from hyperopt import Adam


@dataclass(frozen=True)
class Task:
    """A training task and its metric.

    Attributes:
        label: for captions.
        experiment: the file in configs/experiment.
        metric: a key of a run's summary; less is better.
        unit: of the metric.
        beta: the hyper-step size of Adam-HD.
        ablated: whether it has runs of Auto without one of its parts.
        limit: the goal for Auto's error, as a factor of the best fixed lr's error.
    """

    label: str
    experiment: str
    metric: str
    unit: str
    beta: float = 1e-7
    ablated: bool = False
    limit: float = 1.15


ERROR = "test_error", "test error (%)"

TASKS = {
    "mlp": Task("MLP", "table1", *ERROR, ablated=True),
    "softmax": Task("softmax regression", "softmax", "objective", "objective (nats)", ablated=True),
    "mlp30": Task("MLP", "table1", *ERROR),
    "char_rnn": Task("character RNN", "char_rnn", "test_loss", "test loss (nats)", 1e-8, True, 1.2),
    "resnet": Task("ResNet-20", "figure2", *ERROR, 1e-8, limit=1.2),
}


@dataclass(frozen=True)
class Setting:
    """The part of a task that a preset does.

    Attributes:
        overrides: of the runs' config.
        starts: the initial learning rates.
        seeds: the maximum number of seeds.
        grid: more learning rates, only to search for the best fixed one.
    """

    overrides: tuple[str, ...]
    starts: tuple[float, ...] = STARTS[::2]
    seeds: int | None = None
    grid: tuple[float, ...] = STARTS[8:19]  # 1e-4 to 10


@dataclass(frozen=True)
class RobustnessPreset(Preset):
    """Adds the setting of each task."""

    tasks: Mapping[str, Setting] = field(default_factory=dict)


PRESETS = {
    "cpu": RobustnessPreset(
        ("device=cpu",),
        tasks={
            "mlp": Setting(("trainer.epochs=5",)),
            "softmax": Setting(("trainer.epochs=5",)),
            "mlp30": Setting(("trainer.epochs=30",), STARTS[::4], 1),
            "char_rnn": Setting(("trainer.epochs=1", "trainer.steps=400"), STARTS[2:19:4], 1),
            "resnet": Setting(
                ("trainer.epochs=1", "trainer.steps=null"), STARTS[2:19:8], 1, STARTS[10:17]
            ),
        },
    ),
    "paper": RobustnessPreset(
        tasks={
            "mlp": Setting(("trainer.epochs=5",), STARTS),
            "softmax": Setting(("trainer.epochs=5",), STARTS),
            "mlp30": Setting(("trainer.epochs=30",), STARTS),
            "char_rnn": Setting(("trainer.epochs=3",)),
            "resnet": Setting(("trainer.epochs=2", "trainer.steps=null")),
        },
    ),
    "quick": RobustnessPreset(
        ("device=cpu", "trainer.compile=false"),
        (0,),
        {
            "mlp": Setting(("trainer.epochs=1",), STARTS[6:17:5], grid=STARTS[6:17:5]),
            "softmax": Setting(("trainer.epochs=1",), STARTS[6:17:5], grid=STARTS[6:17:5]),
        },
    ),
}


# The methods.

# {lr} is the start, and {beta} the task's beta. A stack without {lr} has no start.
STACKS = {
    "SGD": "SGD({lr})",
    "Momentum": "SGD({lr}, momentum=0.9)",
    "Adam": "Adam({lr})",
    "AdamW": "AdamW({lr})",
    "ScheduleFree": "AdamWScheduleFree({lr})",
    "Prodigy": "Prodigy()",
    "DAdaptAdam": "DAdaptAdam()",
    "DAdaptSGD": "DAdaptSGD()",
    "SGD-HD": "SGD({lr}) / SGD(1e-3)",
    "Adam-HD": "Adam({lr})[lr] / SGD({beta})",
    "Adam/SGD": "Adam({lr}, v0=1e-8) / SGD(1e-5)",
    "SGD-5": tower("SGD", 5, "{lr}"),
    "Adam-2": tower("Adam", 2, "{lr}"),
    "Adam-5": tower("Adam", 5, "{lr}"),
}
# Changes to Auto. Only the log domain can bound an update, so no-log needs trust=inf.
ABLATION: dict[str, dict[str, Any]] = {
    "no-mean": {"rule": Adam},
    "no-log": {"domain": "real", "trust": math.inf},
    "no-normalize": {"normalize": False},
    "no-horizon": {"horizon": 1.0},
    "no-trust": {"trust": math.inf},
    "no-accumulator": {"initial_accumulator_value": 0.0},
}
FIXED = ("SGD", "Momentum", "Adam")  # the best fixed lr is the best of these
FREE = tuple(name for name, stack in STACKS.items() if "{lr}" not in stack)

# For each seed, the first wave is done before the second, so that early results say most.
WAVES = (
    ("Auto", "Adam", "SGD", "Momentum", "Prodigy"),
    ("AdamW", "ScheduleFree", "DAdaptAdam", "DAdaptSGD"),
    ("Adam-HD", "SGD-HD", "Adam/SGD", "Adam-2", "Adam-5", "SGD-5"),
    tuple(ABLATION),
)
METHODS = tuple(method for wave in WAVES for method in wave)


class Cell(MethodCell):
    """A point of a curve: a task in `TASKS`, a method in `METHODS`, and a start."""

    @property
    def stack(self) -> str:
        """The notation, as in a run's summary."""
        if self.method in STACKS:
            text = STACKS[self.method].format(lr=self.start, beta=TASKS[self.task].beta)
            return str(parse(text))
        assert self.start is not None
        return auto(self.start, **ABLATION.get(self.method, {}))


def starts(method: str, setting: Setting) -> list[float | None]:
    """A method's starts in a setting."""
    if method in FREE:
        return [None]
    return [*sorted({*setting.starts, *(setting.grid if method in FIXED else ())})]


def cells(preset: str) -> list[Cell]:
    """All cells of a preset, in the order of the methods."""
    return [
        Cell(task, method, start)
        for method in METHODS
        for task, setting in PRESETS[preset].tasks.items()
        if method not in ABLATION or TASKS[task].ablated
        for start in starts(method, setting)
    ]


def cell_config(preset: str, cell: Cell, seed: int, overrides: Sequence[str] = ()) -> Config:
    """The config of one run."""
    base = _setting(preset, cell.task, *overrides)
    named = replace(base, experiment="robustness", preset=preset, row=cell.label)
    return replace(named, stack=StackConfig(cell.stack), seed=seed)


@functools.lru_cache
def _setting(preset: str, task: str, *overrides: str) -> Config:
    named = f"experiment={TASKS[task].experiment}"
    own = PRESETS[preset].tasks[task].overrides
    return compose([named, "trainer.record_every=100", *own, *overrides])


@functools.lru_cache
def _by_run(preset: str) -> dict[tuple, Cell]:
    found = {}
    for cell in cells(preset):
        config = _setting(preset, cell.task)
        trainer = config.trainer
        found[config.model.name, trainer.epochs, trainer.steps, cell.stack] = cell
    return found


def cell_of(preset: str, summary: dict[str, Any]) -> Cell:
    """The cell of a run.

    Raises:
        ValueError: no cell matches.
    """
    trainer = summary["trainer"]
    key = summary["model"]["name"], trainer["epochs"], trainer.get("steps"), summary["stack"]
    if key not in (known := _by_run(preset)):
        raise ValueError(
            f"the records of the preset {preset} have run {summary['hash']} of "
            f"{summary['stack']}, but no method has this stack any more; remove the records"
        )
    return known[key]


# The command.


def parts(request: Request) -> Iterator[Part]:
    """The requested runs, the most informative first.

    Raises:
        ValueError: an unknown task, method or initial lr.
    """
    options, preset = request.options, request.name
    tasks = choose_all("tasks", options.tasks, tuple(TASKS))
    methods = choose_all("methods", options.methods, METHODS)
    wanted = [c for c in cells(preset) if c.task in tasks and c.method in methods]
    if options.lrs:
        every = sorted({c.start for c in wanted if c.start is not None})
        known = {f"{lr:g}": lr for lr in every}
        plain = ",".join(_plain(options.lrs))
        lrs = {known[one] for one in choose_all("lrs", plain, list(known))}
        wanted = [c for c in wanted if c.start in lrs]
    settings = PRESETS[preset].tasks
    waves = [
        [
            (cell, cell_config(preset, cell, seed, request.overrides))
            for cell in wanted
            if cell.method in wave and seed in request.seeds[: settings[cell.task].seeds]
        ]
        for seed in request.seeds
        for wave in WAVES
    ]
    if not any(waves):
        raise ValueError(f"methods={options.methods} has no runs for tasks={options.tasks}")
    yield Part([wave for wave in waves if wave])


def _plain(text: str) -> list[str]:
    """Split "1e-3,10" and write each number as `:g` does; leave other words unchanged."""
    found = []
    for one in text.split(","):
        try:
            found.append(f"{float(one):g}")
        except ValueError:
            found.append(one)
    return found


STUDY = Study(
    "robustness",
    PRESETS,
    parts,
    __doc__,
    part_of=lambda preset, run: cell_of(preset, run).task,
    options=MethodOptions,
    starts=("scratch", "records"),
    place=5,
)
