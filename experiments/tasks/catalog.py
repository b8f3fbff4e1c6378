"""All tasks: the `TASK` of each module in this folder."""

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
    """The task class for this kind of data."""
    (one,) = (task for task in tasks() if kind in task.kinds)
    return one


def measure_of(metrics: Mapping[str, Any]) -> Measure:
    """The main metric of a run, from its summary or the last row of its curves."""
    return next(task.judged_by for task in tasks() if task.judged_by.name in metrics)


def headline(metrics: Mapping[str, Any]) -> str:
    """The main metric and its value, in words."""
    measure = measure_of(metrics)
    value = metrics[measure.name]
    return measure.text.format(math.inf if value is None else value)
