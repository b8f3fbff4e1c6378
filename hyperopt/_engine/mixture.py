"""`Mixture`: several engines in one optimizer, for param groups with different stacks."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..notation import parse
from ..rule import Stack
from .engine import Engine


class Mixture:
    """The interface of `Engine` for param groups with different stacks: one engine for each stack.

    Each engine moves its own groups. All engines share one `state` dict.

    Args:
        stacks: the stack of each param group of the constructor.
        default: the stack of later groups that name none, or None.
        compile: as for `Engine`.
    """

    def __init__(self, stacks: Sequence[Stack], default: Stack | None, compile: bool | str) -> None:
        self.stacks, self.compile, self._default = list(dict.fromkeys(stacks)), compile, default
        self.engines = [Engine(stack, compile) for stack in self.stacks]
        self.groups: list[dict[str, Any]] = []
        self._numbers: list[int] = []  # for each group, the number of its engine
        self._state: Any = defaultdict(dict)
        for engine in self.engines:
            engine.groups = []

    def start(self) -> None:
        for engine in self.engines:
            engine.start()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share_groups()
        self._merge_states()

    def _share_groups(self) -> None:
        for number, engine in enumerate(self.engines):
            engine.groups = self._of(number, self.groups)

    def _of(self, number: int, each: Sequence[Any]) -> list[Any]:
        """Select from a list over all param groups the items of one engine's groups."""
        return [one for one, own in zip(each, self._numbers, strict=False) if own == number]

    # Param groups.

    def check_group(self, group: dict[str, Any]) -> frozenset[str]:
        """As `Engine.check_group`. Also add the initial values of the group's stack."""
        stack = self._default if "stack" not in group else parse(group["stack"])
        if stack is None:
            raise ValueError("a param group has no stack, and the optimizer has no default stack")
        if stack not in self.stacks:
            known = " and ".join(map(str, self.stacks))
            raise ValueError(
                f"a new group has the stack {stack}, but the optimizer was made with {known}"
            )
        number = self.stacks.index(stack)
        engine = self.engines[number]
        group["stack"] = str(stack)
        own = engine.check_group(group)
        for name, value in stack.levels[0].values.items():
            group.setdefault(name, value)
        if engine.betas:
            group.setdefault("betas", tuple(group[name] for name in engine.betas))
        self._numbers = [*self._numbers[: len(self.groups)], number]
        return own

    def add_group(self, own: frozenset[str]) -> None:
        group, engine = self.groups[-1], self.engines[self._numbers[-1]]
        trained = [p for each in self.groups for p in each["params"] if p.requires_grad]
        try:
            if len(devices := {p.device for p in trained}) > 1:
                found = " and on ".join(sorted(map(str, devices)))
                raise ValueError(f"parameters on {found}; make one optimizer for each device")
            engine.groups.append(group)
            engine.add_group(own)
        except (TypeError, ValueError):
            self.groups.pop()
            raise

    # A step.

    def step(self) -> None:
        self._share_groups()  # user code may have replaced the dicts
        for engine in self.engines:
            engine.step()

    # `state`, as users see it.

    @property
    def state(self) -> Any:
        for engine in self.engines:
            _ = engine.state  # makes the engine fill the dict
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state
        for engine in self.engines:
            engine.state = state

    def _merge_states(self) -> None:
        """Merge the engines' `state` dicts into one."""
        merged: Any = defaultdict(dict)
        owners = {p: engine for engine in self.engines for p in engine.params}
        for engine in self.engines:
            for key, entries in engine.shown_state.items():
                if not isinstance(key, Tensor) or owners.get(key, engine) is engine:
                    merged[key] = entries
        self._state = merged
        for engine in self.engines:
            engine.share_state(merged)

    # Reading the hyperparameters.

    def _public(self) -> list[tuple[list[str], list[int]]]:
        """For each engine, the public names of its numbers, and the index of each number.

        A number that several groups share has one name, and one index, for each group.
        """
        places = {p: i for i, p in enumerate(p for group in self.groups for p in group["params"])}
        found = []
        for number, engine in enumerate(self.engines):
            groups, everyone = self._of(number, range(len(self.groups))), engine.params
            names: list[str] = []
            indices: list[int] = []
            taken = [re.fullmatch(r"(.*)\[(\d+)\]", name) for name in engine.names]
            own = {(match[1], int(match[2])) for match in taken if match}
            for index, name in enumerate(engine.names):
                base, _, owner = name.rstrip("]").partition("[")
                if owner.isdigit():
                    new = [f"{base}[{groups[int(owner)]}]"]
                elif base.startswith("0.") and owner:
                    p = re.fullmatch(r"p(\d+)", owner)
                    new = [f"{base}[p{places[everyone[int(p[1])]]}]" if p else name]
                else:
                    new = [f"{name}[{g}]" for i, g in enumerate(groups) if (base, i) not in own]
                names += new
                indices += [index] * len(new)
            found.append((names, indices))
        return found

    def _in_order(self, parts: Sequence[Any]) -> list[list[Any]]:
        """Split each engine's list, one item per name, into tuned, constants, effective lrs."""
        cut = []
        for engine, (names, indices), own in zip(self.engines, self._public(), parts, strict=True):
            tuned = sum(index < len(engine.hypergradients) for index in indices)
            effective = sum("effective_lr" in name for name in names)
            ends = [0, tuned, len(names) - effective, len(names)]
            cut.append([own[a:b] for a, b in itertools.pairwise(ends)])
        return [[own[part] for own in cut] for part in range(3)]

    @property
    def names(self) -> tuple[str, ...]:
        parts = self._in_order([names for names, _ in self._public()])
        return tuple(name for part in parts for names in part for name in names)

    def snapshot(self) -> Tensor:
        own = [
            engine.snapshot()[indices]
            for engine, (_, indices) in zip(self.engines, self._public(), strict=True)
        ]
        return torch.cat([numbers for part in self._in_order(own) for numbers in part])

    @property
    def hypergradients(self) -> Tensor:
        found = []
        for engine, (_, indices) in zip(self.engines, self._public(), strict=True):
            own = engine.hypergradients
            found.append(own[[index for index in indices if index < len(own)]])
        return torch.cat(found)

    @property
    def skipped(self) -> list[int]:
        counts = [engine.skipped for engine in self.engines]
        return [sum(own[k] for own in counts if k < len(own)) for k in range(max(map(len, counts)))]

    @property
    def is_compiled(self) -> bool:
        return all(engine.is_compiled for engine in self.engines)

    @property
    def betas(self) -> list[str]:
        return []

    # Checkpoints.

    def save(self) -> dict[str, Any]:
        self._share_groups()
        everyone = [p for group in self.groups for p in group["params"]]
        place = {p: i for i, p in enumerate(everyone)}
        state: dict[Any, Any] = {}
        groups: list[Any] = [None] * len(self.groups)
        for number, engine in enumerate(self.engines):
            saved, params = engine.save(), engine.params
            theirs = range(len(params))
            for key, entries in saved["state"].items():
                state[place[params[key]] if key in theirs else key] = entries
            own = self._of(number, range(len(self.groups)))
            for i, group in zip(own, saved["param_groups"], strict=True):
                groups[i] = {**group, "params": [place[params[key]] for key in group["params"]]}
        return {"state": state, "param_groups": groups}

    def load(self, state_dict: dict[str, Any]) -> None:
        self._share_groups()
        groups, state = state_dict["param_groups"], state_dict["state"]
        ours = [group["stack"] for group in self.groups]
        theirs = [group.get("stack") for group in groups]
        if ours != theirs:
            raise ValueError(
                f"this is the state of param groups with the stacks {theirs}, not with {ours}"
            )
        keys = {key for group in groups for key in group["params"]}
        plans = []
        for number, engine in enumerate(self.engines):
            own = self._of(number, groups)
            others = keys - {key for group in own for key in group["params"]}
            part = {key: entries for key, entries in state.items() if key not in others}
            plans.append(engine.read({"state": part, "param_groups": own}))
        for engine, plan in zip(self.engines, plans, strict=True):
            engine.share_state(defaultdict(dict))
            engine.apply(plan)
        self._merge_states()
