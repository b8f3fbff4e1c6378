"""Learned schedules: record the hyperparameters of a tower, and replay them without the tower.

A tower with fixed values is a plain optimizer. So a replay with the values of each step gives the
same weights as the recorded run, up to rounding.

    schedule = Schedule()
    for x, y in loader:
        ...
        optimizer.step()
        schedule.append(optimizer)
    schedule.save("learned.csv")

    optimizer = torch.optim.Adam(model.parameters())
    replay = Replay(optimizer, Schedule.load("learned.csv"))
    for x, y in loader:
        ...
        optimizer.step()
        replay.step()
"""

from __future__ import annotations

import bisect
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .optimizer import HyperOptimizer

# (torch class, name in this package): name in torch.
IN_TORCH = {("RMSprop", "gamma"): "alpha"}


class Schedule:
    """Values of the lowest level's hyperparameters by step.

    Args:
        steps: the steps, counted from 1, in increasing order.
        values: for each hyperparameter, the values that these steps used, one for each step. The
            names are like ``"lr"`` or, for one param group, ``"lr[1]"``.

    Raises:
        ValueError: the steps do not increase, or the numbers of steps and values differ.
    """

    def __init__(
        self, steps: Sequence[int] = (), values: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        self._steps = list(steps)
        self._values = {name: list(each) for name, each in (values or {}).items()}
        self._snapshots: list[Tensor] = []  # still on the device
        self._names: tuple[str, ...] = ()  # names of the values in a snapshot
        if any(a >= b for a, b in zip(self._steps, self._steps[1:], strict=False)):
            raise ValueError("the steps of a schedule must increase")
        for name, each in self._values.items():
            if len(each) != len(self._steps):
                raise ValueError(f"{name} has {len(each)} values for {len(self._steps)} steps")

    def append(self, optimizer: HyperOptimizer) -> None:
        """Record the values that the optimizer's last step used, without waiting for the device.

        Raises:
            TypeError: the optimizer is not a `HyperOptimizer`.
            ValueError: its hyperparameters differ from those of the earlier steps.
        """
        if not isinstance(optimizer, HyperOptimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"a schedule needs a HyperOptimizer, not {kind}")
        if optimizer.names != self._names:
            known, new = [*self.values], [*_lowest(optimizer.names)]
            if known and known != new:
                raise ValueError(
                    f"the schedule has {', '.join(known)}, but the optimizer now has "
                    f"{', '.join(new)}; start a new schedule after adding param groups"
                )
            self._names = optimizer.names
        self._snapshots.append(optimizer.snapshot())

    def _read(self) -> None:
        if self._snapshots:
            start = self._steps[-1] if self._steps else 0
            self._steps += range(start + 1, start + 1 + len(self._snapshots))
            for name, place in _lowest(self._names).items():
                column = torch.stack([snapshot[place] for snapshot in self._snapshots])
                self._values.setdefault(name, []).extend(column.tolist())
            self._snapshots = []

    @property
    def steps(self) -> list[int]:
        """The recorded steps."""
        self._read()
        return self._steps

    @property
    def values(self) -> dict[str, list[float]]:
        """The values at the recorded steps, by hyperparameter."""
        self._read()
        return self._values

    def at(self, step: int) -> dict[str, float]:
        """The values at a step: interpolated between recorded steps, constant outside them."""
        steps = self.steps
        i = bisect.bisect_left(steps, step)
        if i == len(steps) or steps[i] == step or i == 0:
            return {name: each[min(i, len(steps) - 1)] for name, each in self.values.items()}
        share = (step - steps[i - 1]) / (steps[i] - steps[i - 1])
        return {
            name: each[i - 1] + share * (each[i] - each[i - 1])
            for name, each in self.values.items()
        }

    def save(self, path: str | Path) -> None:
        """Write the schedule: JSON if the path ends in .json, otherwise CSV, one line per step.

        Raises:
            ValueError: the schedule has no steps.
        """
        if not self.steps:
            raise ValueError(
                f"the schedule has no steps to write to {path}; call append after each step"
            )
        columns = {"step": self.steps, **self.values}
        if Path(path).suffix == ".json":
            text = json.dumps(columns)
        else:
            file = io.StringIO()
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(columns)
            lines.writerows(zip(*columns.values(), strict=True))
            text = file.getvalue()
        Path(path).write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule that `save` wrote.

        Raises:
            ValueError: the file does not exist, or does not contain a schedule.
        """
        try:
            if Path(path).suffix == ".json":
                columns = json.loads(Path(path).read_text())
            else:
                with open(path, newline="") as file:
                    rows = list(csv.DictReader(file))
                columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
            columns = {name: [float(number) for number in each] for name, each in columns.items()}
            steps = columns.pop("step")
            if not steps or not all(step.is_integer() for step in steps):
                raise ValueError("step must hold whole numbers, at least one")
            return cls([int(step) for step in steps], columns)
        except (OSError, IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be replayed ({type(error).__name__}: {error}); expected a CSV or "
                "JSON of numbers with a column step and one for each hyperparameter"
            ) from None


def _lowest(names: Sequence[str]) -> dict[str, int]:
    """Map level 0's hyperparameters to places in a snapshot. An effective lr replaces lr."""
    found = {n.removeprefix("0."): place for place, n in enumerate(names) if n.startswith("0.")}
    if not any(n.startswith("effective_lr") for n in found):
        return found
    learned = [n for n in found if re.fullmatch(r"lr(\[.*\])?", n)]
    return {n.removeprefix("effective_"): place for n, place in found.items() if n not in learned}


class Replay:
    """Set the hyperparameters of a plain optimizer to those of a schedule, step by step.

    The constructor sets the values of the first step. Call ``step()`` after each step of the
    optimizer: it sets the values of the next step. A hyperparameter that the optimizer does not
    have is ignored if it is 0 in all steps.

    Args:
        optimizer: a `HyperOptimizer` or an optimizer of ``torch.optim``.
        schedule: the values.

    Raises:
        ValueError: the schedule has no steps, or has a hyperparameter per tensor; or the optimizer
            does not have a hyperparameter, or tunes it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        if not schedule.steps:
            raise ValueError("the schedule has no steps to replay; call append after each step")
        self.optimizer, self.schedule = optimizer, schedule
        self.last_step = 0
        self._targets = {
            name: self._find(name, needed=any(each)) for name, each in schedule.values.items()
        }
        self.step()

    def step(self) -> None:
        """Set the values of the optimizer's next step."""
        self.last_step += 1
        values = self.schedule.at(self.last_step)
        for name, targets in self._targets.items():
            for group, key, place in targets:
                if place is None:
                    group[key] = values[name]
                else:
                    group[key] = (*group[key][:place], values[name], *group[key][place + 1 :])

    def _find(self, name: str, needed: bool) -> list[tuple[dict[str, Any], str, int | None]]:
        """Where to set a hyperparameter: param groups, key, and place in a tuple such as betas."""
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name)
        groups = self.optimizer.param_groups
        if match is None:
            raise ValueError(
                f"{name} belongs to one tensor, but a replay sets param groups; learn the schedule "
                "per group, with each tensor in its own group"
            )
        if int(match[2] or 0) >= len(groups):
            raise ValueError(
                f"{name} has no param group in this optimizer; give it groups like those of the "
                "optimizer that learned the schedule"
            )
        key, place = match[1], None
        if not isinstance(self.optimizer, HyperOptimizer):
            key = IN_TORCH.get((type(self.optimizer).__name__, key), key)
            if key in ("beta1", "beta2") and "betas" in groups[0]:
                key, place = "betas", int(key[-1]) - 1
        if key not in groups[0] and not needed:
            return []
        if key not in groups[0]:
            raise ValueError(f"{type(self.optimizer).__name__} has no hyperparameter {name!r}")
        if isinstance(groups[0][key], Tensor) and isinstance(self.optimizer, HyperOptimizer):
            stack = self.optimizer.stack
            raise ValueError(
                f"{name} cannot be replayed, since {stack.levels[1]} moves it; make an "
                f"optimizer with {stack.levels[0].name} only"
            )
        chosen = groups if match[2] is None else [groups[int(match[2])]]
        return [(group, key, place) for group in chosen]

    def state_dict(self) -> dict[str, Any]:
        """The position of the replay, without the schedule."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the position in a `state_dict`."""
        self.last_step = state_dict["last_step"] - 1
        self.step()
