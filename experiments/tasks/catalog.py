"""All tasks. A module of this folder that has a `TASK` is found by being there."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from experiments.found import found
from experiments.tasks.base import Measure


@functools.lru_cache(maxsize=1)
def tasks() -> tuple[Any, ...]:
    return tuple(found("experiments.tasks", "TASK"))


def task_for(kind: str) -> Any:
    """The class of tasks for data of some kind."""
    (one,) = (task for task in tasks() if kind in task.kinds)
    return one


def measure_of(metrics: Mapping[str, Any]) -> Measure:
    """What a run is judged by, from its summary or the last row of its curves."""
    return next(task.judged_by for task in tasks() if task.judged_by.name in metrics)


def headline(metrics: Mapping[str, Any]) -> str:
    """How a run has done, in words."""
    measure = measure_of(metrics)
    value = metrics[measure.name]
    return measure.text.format(math.inf if value is None else value)
