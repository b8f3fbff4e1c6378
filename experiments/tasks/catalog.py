"""All tasks. A module of this folder that has a `TASK` is found by being there."""

from __future__ import annotations

import functools
import math
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.tasks.base import Measure


@functools.lru_cache(maxsize=1)
def tasks() -> tuple[Any, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = (import_module(f"experiments.tasks.{name}") for name in names if name != "catalog")
    return tuple(module.TASK for module in modules if hasattr(module, "TASK"))


def task_for(kind: str) -> Any:
    """The class of tasks for data of some kind."""
    (found,) = (task for task in tasks() if kind in task.kinds)
    return found


def measure_of(metrics: Mapping[str, Any]) -> Measure:
    """What a run is judged by, from its summary or the last row of its curves."""
    return next(task.judged_by for task in tasks() if task.judged_by.name in metrics)


def headline(metrics: Mapping[str, Any]) -> str:
    """How a run has done, in words."""
    measure = measure_of(metrics)
    value = metrics[measure.name]
    return measure.text.format(math.inf if value is None else value)
