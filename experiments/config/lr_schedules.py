"""Schedules: hyperparameters of the lowest level as a function of the step.

Every schedule except replay is a factor on the initial lr or, if a tower tunes lr, on the learned
lr. Schedules stretch to any number of steps: `exponential` divides the run into `epochs` epochs of
its own.

    constant      1
    steps         times `factor` at each of the `milestones`, shares of the run (He et al. 2016)
    linear        from 1 down to `final` at the share `until` of the run, then constant
                  (Goodfellow et al., *Deep Learning*, equation 8.14, whose tau is `until`)
    exponential   times `factor` at the end of each epoch, from epoch number `after` on
                  (Karpathy's char-rnn)
    cosine        from 1 down to `final` along half a cosine (Loshchilov and Hutter 2017)
    warmup_cosine the same after a linear increase from 0 over the share `warmup` of the run
    replay        the values in `file`, a CSV with a column `step`, which counts from 1, and a
                  column for each hyperparameter; linear interpolation between the lines
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hyperopt
from hyperopt import Stack, did_you_mean

Schedule = Callable[[int], dict[str, float]]


@dataclass
class ScheduleConfig:
    """A schedule's name and its settings; the others are null. See the head of this file."""

    name: str = "constant"
    factor: float | None = None
    milestones: list[float] | None = None
    final: float | None = None
    until: float | None = None
    warmup: float | None = None
    epochs: int | None = None
    after: int | None = None
    file: str | None = None  # a run's identity has its checksum, not its name


def _steps(step: int, steps: int, factor: float, milestones: list[float]) -> float:
    return factor ** sum(step >= milestone * steps for milestone in milestones)


def _linear(step: int, steps: int, final: float, until: float) -> float:
    return 1 - (1 - final) * min(step / (until * steps), 1.0)


def _exponential(step: int, steps: int, factor: float, epochs: int, after: int) -> float:
    return factor ** max(0, step * epochs // steps - after + 1)


def _cosine(step: float, steps: float, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2


def _warmup_cosine(step: int, steps: int, final: float, warmup: float) -> float:
    first = warmup * steps
    if step < first:
        return (step + 1) / (first + 1)
    return _cosine(step - first, steps - first, final)


FACTORS: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {
    "steps": (_steps, ("factor", "milestones")),
    "linear": (_linear, ("final", "until")),
    "exponential": (_exponential, ("factor", "epochs", "after")),
    "cosine": (_cosine, ("final",)),
    "warmup_cosine": (_warmup_cosine, ("final", "warmup")),
}
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "factor": (lambda value: 0 <= value < math.inf, "a number from 0 up"),
    "milestones": (
        lambda shares: all(0 < share < 1 for share in shares),
        "shares of the run between 0 and 1, as in [0.5,0.75]",
    ),
    "final": (lambda value: 0 <= value < math.inf, "a share of the lr, from 0 up"),
    "until": (lambda share: 0 < share <= 1, "a share of the run, above 0 and at most 1"),
    "warmup": (lambda share: 0 <= share < 1, "a share of the run, from 0 and below 1"),
    "epochs": (lambda count: count >= 1, "1 or more"),
    "after": (lambda count: count >= 1, "1 or more"),
    "file": (bool, "the name of a file"),
}
READS = {"constant": (), **{k: reads for k, (_, reads) in FACTORS.items()}, "replay": ("file",)}


def make_schedule(config: ScheduleConfig, start: Mapping[str, float], steps: int) -> Schedule:
    """Return a function from a step, counted from 0, to the scheduled hyperparameters of that step.

    Args:
        start: the lowest level's initial values.
        steps: the steps of the whole run.

    Raises:
        ValueError: the file cannot be replayed.
    """
    if config.name == "constant":
        return lambda step: {}
    if config.name == "replay":
        learned = hyperopt.Schedule.load(config.file or "")
        return lambda step: learned.at(step + 1)
    factor, reads = FACTORS[config.name]
    settings = {name: getattr(config, name) for name in reads}
    return lambda step: {"lr": start["lr"] * factor(step, steps, **settings)}


def check_schedule(config: ScheduleConfig, stack: Stack) -> None:
    """Raise a ValueError, in one line, for a schedule that does not fit the stack."""
    if config.name not in READS:
        raise ValueError(
            f"there is no schedule {config.name!r}; {did_you_mean(config.name, READS)}"
        )
    for name, value in asdict(config).items():
        if name != "name" and (value is not None) != (name in READS[config.name]):
            what = "needs" if value is None else "does not read"
            raise ValueError(f"schedule {config.name} {what} schedule.{name}")
    for name in READS[config.name]:
        allows, expected = LIMITS[name]
        if not allows(value := getattr(config, name)):
            raise ValueError(f"schedule.{name}={value} must be {expected}")
    if config.name == "constant":
        return
    lowest = stack.levels[0]
    for name in make_schedule(config, lowest.values, steps=1)(0):  # type: ignore[arg-type]
        if name not in lowest.hypers:
            raise ValueError(
                f"{config.file} has a column {name!r}, but {lowest.name} has no such hyperparameter"
            )
        if stack.height and name in lowest.tuned and (name != "lr" or config.name == "replay"):
            raise ValueError(
                f"schedule {config.name} sets {name}, but {stack.levels[1]} tunes it; remove it "
                f"from the tuned hyperparameters of {stack}, or give schedule=constant"
            )


def schedule_identity(config: ScheduleConfig) -> dict[str, Any]:
    """The part of a schedule that decides a run's result."""
    found = {name: value for name, value in asdict(config).items() if value is not None}
    if config.file is not None:
        found["file"] = hashlib.sha256(Path(config.file).read_bytes()).hexdigest()
    return found
