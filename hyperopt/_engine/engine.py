"""`Engine`: what a `HyperOptimizer` keeps between steps, and how it follows its parameters.

The parameters that have a gradient are cut into shards. All numbers lie in `packed`, whose layout
depends on the stack, the param groups and the shards. When other parameters have gradients than in
the last step, when a group is added or the user edits the state, both are rebuilt.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import Rule, Stack, State, betas, unpack_betas
from ..tuning import did_you_mean
from . import checkpoint
from .blocks import Owner, build
from .packed import Layout, Vectors
from .shards import Shard, divide, precision, processes
from .step import Step, compiled_step, eager_step
from .updates import LastUpdate, Numbers
from .views import OTHERS, ParamGroupView, TrackedDict

# With compile="auto" the step is compiled after so many steps: a short script never waits for the
# compiler. The number is fixed, so that runs stay reproducible and resume bit for bit.
EAGER_STEPS = 20


class Engine:
    """All that a `HyperOptimizer` keeps.

    Args:
        stack: what it computes.
        compile: whether to compile the step; "auto" does so after `EAGER_STEPS`.

    Attributes:
        groups: the param groups.
        layout: the shape of `packed`.
        packed: all numbers.
        names: what `packed` begins with, as users see it.
        is_compiled: whether the last step was compiled.
    """

    groups: list[dict[str, Any]]
    layout: Layout
    packed: Tensor
    names: tuple[str, ...]
    _numbers: Numbers
    _rule: Rule  # the lowest level's, with the values of all groups
    _active: list[list[int]]  # per group, the ids of the parameters that the last step moved
    _step: Step | None
    _state: defaultdict[Tensor, State]
    _mutations: list[str]  # of `_state` since it was made

    def __init__(self, stack: Stack, compile: bool | str) -> None:
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', not {compile!r}")
        self.stack, self.compile, self.is_compiled = stack, compile, False
        self.betas = betas(stack.levels[0])
        self._overrides: list[frozenset[str]] = []  # the values that each group has to itself
        self._shards: list[Shard] = []  # what the last step moved
        self._inactive_shards: list[Shard] = []  # what only earlier steps moved
        self._known_groups = 0  # how many there were when the layout was made
        self._steps_made = 0

    @property
    def is_started(self) -> bool:
        return self._known_groups > 0

    def start(self) -> None:
        """Make the layout, once all groups of the constructor are there."""
        self._rebuild_layout()

    def __getstate__(self) -> dict[str, Any]:
        self.sync()
        names = ["stack", "compile", "is_compiled", "betas", "groups", "layout", "packed"]
        own = ["_rule", "_overrides", "_shards", "_inactive_shards", "_known_groups", "_steps_made"]
        return {name: self.__dict__[name] for name in names + own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._numbers = self.layout.numbers(self.packed)
        self._rebuild_layout(self._export())

    # Param groups.

    def check_group(self, group: dict[str, Any]) -> frozenset[str]:
        """Check a new param group; returns the hyperparameters that it has a value of its own for.

        Raises:
            ValueError: an unknown key, or a value that cannot be used.
            TypeError: it is no dict.
        """
        rule = self.stack.levels[0]
        if not isinstance(group, dict):
            raise TypeError(f"a param group is a dict with params, not {group!r}")
        if "params" not in group:
            raise ValueError(f"a param group needs params, and has {', '.join(group)} alone")
        if self.betas and "betas" in group:
            group.update(unpack_betas(self.betas, group.pop("betas")))
        own = {name: value for name, value in group.items() if name in rule.hypers}
        for name in group.keys() - own.keys() - OTHERS:
            raise ValueError(
                f"a param group of {rule.name} takes no {name!r}; "
                f"{did_you_mean(name, ['params', *rule.hypers])}"
            )
        checked = rule.with_values(own)
        own = {name: checked.values[name] for name in own}
        tuned = rule.tuned if self.stack.height else {}
        for name in own.keys() & tuned.keys():
            if own[name] == 0 and 0 not in tuned[name].domain:
                raise ValueError(
                    f"{name} is 0 in a param group, but {self.stack.levels[1]} moves it in the "
                    f"{tuned[name].domain.name} domain, where it cannot stay 0; give the "
                    f"parameters that are to have no {name} an optimizer of their own"
                )
        Stack(checked, *self.stack.levels[1:])
        if self.is_started:
            self.sync()
            for name, value in own.items():
                if value != 0 and not self._rule.is_active(name):
                    raise ValueError(
                        f"{name} = {value} in a new group, but no group had {name} so far; give "
                        "the groups to one optimizer when it is made"
                    )
        return frozenset(own)

    def add_group(self, own: frozenset[str]) -> None:
        """Take over the last param group.

        Args:
            own: what `check_group` returned for it.
        """
        try:
            self._check_params(self.groups[-1]["params"])
        except (TypeError, ValueError):
            self.groups.pop()
            raise
        self._overrides.append(own)
        if not self.is_started:
            return
        saved = self._export()
        if self._known_groups == 1 and self.stack.height:
            # What the only group so far had to itself, the others do not share.
            parts = [saved[0]["tuned"], *saved[1]["last"].values()]
            for numbers in filter(lambda part: isinstance(part, dict), parts):
                for name in self._overrides[0] & numbers.keys():
                    numbers[f"{name}[0]"] = numbers.pop(name)
        self._rebuild_layout(saved)

    def _check_params(self, params: Iterable[Tensor]) -> None:
        params = list(params)
        if len(set(params)) < len(params):
            raise ValueError("a parameter was given twice; give each one once, tied ones too")
        device = self._device
        for p in params:
            if p.is_complex():
                raise TypeError(f"a parameter is complex ({p.dtype}); only real ones can be moved")
            if p.layout != torch.strided:
                raise TypeError(f"a parameter is sparse ({p.layout}); only dense ones can be moved")
            if getattr(p, "_fsdp_flattened", False):
                raise TypeError(
                    "a parameter is part of a FullyShardedDataParallel, which hides how it is "
                    "divided; use torch.distributed.fsdp.fully_shard"
                )
            if p.device != device:
                raise ValueError(
                    f"parameters on {device} and on {p.device}; make one optimizer for each device"
                )
        if device.type == "meta":
            raise ValueError(
                "the parameters have no values yet (they are on the meta device); make the "
                "optimizer after model.to_empty and the initialization"
            )

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"]]

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self._params), torch.device("cpu"))

    # A step.

    def step(self) -> None:
        """Move everything, where a parameter has a gradient."""
        self.sync(_has_grad)
        active = [[id(p) for p in group["params"] if _has_grad(p)] for group in self.groups]
        if active != self._active or any(shard.is_stale for shard in self._shards):
            self._rebuild_shards(_has_grad)
        if not self._shards:
            return
        vectors = [shard.read() for shard in self._shards]
        if self._step is None or (self.compile == "auto" and self._steps_made == EAGER_STEPS):
            self._step = self._make_step(vectors)
        self._step(vectors)
        self._steps_made += 1
        for shard in self._shards:
            shard.write()
        self._view.mark_clean()

    def _make_step(self, vectors: Sequence[Vectors]) -> Step:
        step = None
        if self.compile is True or (self.compile and self._steps_made >= EAGER_STEPS):
            step = compiled_step(self.layout, self._numbers, vectors)
        self.is_compiled = step is not None
        return step or eager_step(self.layout, self._numbers, vectors)

    def sync(self, active: Callable[[Tensor], bool] | None = None) -> None:
        """Take over what the user set in the param groups and in `state` since the last step.

        Args:
            active: whether the next step moves a parameter; by default, whether the last one did.

        Raises:
            ValueError: as `ParamGroupView.sync` does; an entry in `state` that the rule does not
                keep.
        """
        self._view.sync(self.groups)
        if not self._mutations:
            return
        self._mutations.clear()
        given = {p: {**entries} for p, entries in self._state.items() if entries}
        known = given.keys() | self._kept.keys()
        changed = {p for p in known if not _same(given.get(p, {}), self._kept.get(p, {}))}
        if not changed:
            self._show_state()
            return
        moved = {p for shard in self._shards for p in shard.params}
        self._rebuild_shards(active or moved.__contains__, changed - given.keys())
        for number, group in enumerate(self.groups):  # those that are not moved yet
            new = [p for p in group["params"] if p in given and p not in self._kept]
            self._inactive_shards += self._new_shards(new, number)
        self._rebuild_layout(self._export())
        for p in changed & given.keys() & self._state.keys():
            for name, value in given[p].items():
                place = self._state[p].get(name)
                if place is None or place.shape != value.shape:
                    raise ValueError(
                        f"{name!r} of {[*value.shape]} was put into the state of a parameter of "
                        f"{[*p.shape]}, of which {self._rule.name} keeps "
                        f"{', '.join(f'{n} of {[*v.shape]}' for n, v in self._state[p].items())}"
                    )
                place.copy_(value)

    # What users read.

    @property
    def state(self) -> defaultdict[Tensor, State]:
        """The rule's state of each parameter, in views; before the first step, the initial one."""
        if self.is_started and not self._state:
            self._shards, self._inactive_shards = [], []
            for number, group in enumerate(self.groups):
                params = [p for p in group["params"] if p.requires_grad]
                self._inactive_shards += self._new_shards(params, number)
            self._rebuild_layout(self._export())
        return self._state

    @state.setter
    def state(self, state: defaultdict[Tensor, State]) -> None:
        self._state, self._mutations = state, ["state"]

    def snapshot(self) -> Tensor:
        self._view.sync(self.groups)
        return self.packed[: len(self.names)].clone()

    @property
    def hypergradients(self) -> Tensor:
        own = [last.g.reshape(-1) for last in self._numbers.hyper_updates]
        return torch.cat([self.packed.new_empty(0), *own])

    @property
    def skipped(self) -> list[int]:
        return [int(count) for count in self._numbers.skipped.tolist()]

    # Shards and layout.

    def _rebuild_shards(
        self, active: Callable[[Tensor], bool], forgotten: Collection[Tensor] = ()
    ) -> None:
        """Cut the parameters into shards again.

        That is due when other parameters than before have a gradient, or when parameters have
        changed their device, their precision or their group.

        Args:
            active: whether the next step moves a parameter.
            forgotten: those for which the rule starts again.
        """
        if len(self.groups) < self._known_groups:
            raise ValueError("a param group was taken away; make a new optimizer of the others")
        if len(self.groups) > self._known_groups:
            raise ValueError("a param group was put in by hand; use add_param_group")
        self._check_params(self._params)
        for shard in self._shards + self._inactive_shards:
            shard.check_shapes()
        exported = self._export()
        numbers = {p: i for i, group in enumerate(self.groups) for p in group["params"]}
        for p in numbers:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise TypeError(
                    f"a gradient is sparse ({p.grad.layout}); only dense ones can be used: "
                    "make the layer with sparse=False"
                )
        shards: list[Shard] = []
        inactive: list[Shard] = []
        for shard in self._shards + self._inactive_shards:
            pieces: dict[tuple[int, bool, torch.dtype], list[Tensor]] = {}
            for p in shard.params:
                if p in numbers and p not in forgotten:
                    key = numbers[p], active(p), precision(p)
                    pieces.setdefault(key, []).append(p)
            for (number, moving, _), params in pieces.items():
                piece = shard.part(params)
                if not moving or number != shard.owner.group:
                    self._forget_last_update(piece)
                piece.owner = self._owner(params[0], number)
                if piece.owner.parameter != shard.owner.parameter:
                    raise ValueError(
                        "a parameter that has hyperparameters to itself changed its place among "
                        "the others; replace parameters where they are, or make a new optimizer"
                    )
                piece.sync()
                (shards if moving else inactive).append(piece)
        known = {p for shard in shards + inactive for p in shard.params}
        for number, group in enumerate(self.groups):
            new = [p for p in group["params"] if p not in known and active(p)]
            shards += self._new_shards(new, number)
        place = {p: i for i, p in enumerate(numbers)}
        self._shards = sorted(shards, key=lambda shard: place[shard.params[0]])
        self._inactive_shards = inactive
        self._rebuild_layout(exported)

    def _new_shards(self, params: Sequence[Tensor], group: int) -> list[Shard]:
        lowest = self.layout.blocks[0]
        parts = [[p] for p in params] if lowest.per_tensor else divide(params)
        return [Shard.new(each, self._owner(each[0], group), lowest) for each in parts]

    def _owner(self, p: Tensor, group: int) -> Owner:
        """Whose hyperparameters move a shard that begins with a parameter."""
        if not self.layout.blocks[0].per_tensor:
            return Owner(group)
        return Owner(group, next(i for i, q in enumerate(self._params) if q is p))

    def _forget_last_update(self, shard: Shard) -> None:
        """Keep only the state that a shard's last update led to."""
        lowest, numbers = self.layout.blocks[0], self._numbers
        raw = numbers.raw[0][0][shard.owner.places(lowest.tuned)]
        fixed = numbers.last_fixed[shard.owner.places(lowest.fixed)]
        last = shard.last
        if last.g is not None:
            _, after = lowest.rule.update(*last.inputs, lowest.values(raw, fixed))
            applied = last.applied > 0
            state = {n: torch.where(applied, after[n], old) for n, old in last.state.items()}
            shard.last = LastUpdate(last.w, last.g, state, torch.zeros_like(last.applied))

    def _export(self) -> list[dict[str, Any]]:
        return checkpoint.export(self.layout, self._numbers)

    def _rebuild_layout(self, saved: Sequence[dict[str, Any]] = ()) -> None:
        """Make `packed` for the present param groups and shards.

        Args:
            saved: what `_export` returned; nothing for the initial values.
        """
        if not saved:
            rule = self.stack.levels[0]
            for group in self.groups:
                rule = rule.with_values({name: group[name] for name in rule.hypers})
            self._rule = rule.with_values(self.stack.levels[0].values)
        stack = Stack(self._rule, *self.stack.levels[1:])
        self.layout = Layout(
            build(stack, self._overrides, [len(group["params"]) for group in self.groups]),
            tuple(shard.owner for shard in self._shards),
            processes(self._params),
        )
        self._step = None
        device = self._device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        blank = torch.empty(0, dtype=dtype, device=device)
        lasts = [shard.last for shard in self._shards]
        self.packed = checkpoint.restore(
            self.layout, stack, self.groups, saved, self._known_groups, lasts, blank
        )
        self._numbers = self.layout.numbers(self.packed)
        for shard, scalars in zip(self._shards, self._numbers.shard_scalars, strict=True):
            last = shard.last
            shard.last = self.layout.last_update(scalars, last.w, last.g, last.state)
        self._known_groups = len(self.groups)
        self.names = self._public_names()
        self._view = ParamGroupView(self.groups, stack, self.layout, self.packed)
        group_of = {p: shard.owner.group for shard in self._shards for p in shard.params}
        self._active = [
            [id(p) for p in group["params"] if group_of.get(p) == i]
            for i, group in enumerate(self.groups)
        ]
        self._kept = {
            p: entries
            for shard in self._shards + self._inactive_shards
            for p, entries in shard.by_parameter().items()
        }
        self._show_state()

    def _public_names(self) -> tuple[str, ...]:
        """The names of the layout, with those of the parameters that have one of their own."""
        named = [name for group in self.groups for name in group.get("param_names", [])]
        times = Counter(named)
        by_place = {f"[p{i}]": f"[{name}]" for i, name in enumerate(named) if times[name] == 1}
        return tuple(
            re.sub(r"\[p\d+\]$", lambda place: by_place.get(place[0], place[0]), name)
            for name in self.layout.names
        )

    def _show_state(self) -> None:
        self._mutations = []
        tracked = {p: TrackedDict.of(each, self._mutations) for p, each in self._kept.items()}
        self._state = TrackedDict.of(tracked, self._mutations, dict)

    # Checkpoints.

    def save(self) -> dict[str, Any]:
        """The state_dict, but for hooks."""
        self.sync()
        groups = {p: i for i, group in enumerate(self.groups) for p in group["params"]}
        shards = self._shards + self._inactive_shards
        regrouped = any(
            groups.get(p, shard.owner.group) != shard.owner.group
            for shard in shards
            for p in shard.params
        )
        if regrouped or any(shard.is_stale for shard in shards):
            self._rebuild_shards({p for shard in self._shards for p in shard.params}.__contains__)
        number = {p: i for i, p in enumerate(self._params)}
        told = {*self._rule.hypers, "betas", "params"}
        saved_groups = [
            {
                **{name: _number(group[name]) for name in self._rule.hypers},
                **{name: group[name] for name in group if name not in told},
                "own": sorted(own),
                "params": [number[p] for p in group["params"]],
            }
            for group, own in zip(self.groups, self._overrides, strict=True)
        ]
        # All else is in a group, since torch.distributed.checkpoint takes only groups and state.
        saved_groups[0]["tower"] = {
            "format": checkpoint.FORMAT,
            "steps_made": self._steps_made,
            "stack": str(self.stack),
            "on": self._active_hypers,
            "levels": self._export(),
        }
        state = checkpoint.save_shards(self._shards, self._inactive_shards, number)
        return {"state": state, "param_groups": saved_groups}

    def load(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `save`; if it raises, nothing has changed.

        Raises:
            ValueError: it does not fit.
        """
        state_dict = checkpoint.upgrade(state_dict)
        params = [group["params"] for group in self.groups]
        checkpoint.check(state_dict, self.stack, self._active_hypers, params)
        try:
            shards = checkpoint.load_shards(
                checkpoint.by_number(state_dict), params, self.layout.blocks[0]
            )
        except KeyError as missing:
            raise ValueError(
                f"this state is not a whole one: a parameter has no {missing}"
            ) from None
        self._shards, self._inactive_shards = shards
        # Version 0.1 compiled from the first step on.
        tower = state_dict["param_groups"][0]["tower"]
        self._steps_made = tower.get("steps_made", EAGER_STEPS)
        self._overrides = [frozenset(group.get("own", ())) for group in state_dict["param_groups"]]
        both = [*zip(self.groups, state_dict["param_groups"], strict=True)]
        for group, saved in both:
            group.update({name: saved[name] for name in saved.keys() - {"own", "params", "tower"}})
        self._rebuild_layout(tower["levels"])
        for group, saved in both:  # an lr that was edited in the state_dict, for example
            group.update({n: saved[n] for n in self._rule.hypers if isinstance(group[n], float)})
        self._view.sync(self.groups)

    @property
    def _active_hypers(self) -> list[str]:
        return [name for name in self._rule.hypers if self._rule.is_active(name)]


def _has_grad(p: Tensor) -> bool:
    return p.grad is not None


def _same(given: State, kept: State) -> bool:
    """Whether the entries of a parameter are the tensors that were shown."""
    return given.keys() == kept.keys() and all(given[name] is kept[name] for name in kept)


def _number(value: Any) -> float | list[float]:
    """What a param group shows, as plain numbers: one, or one for each tensor."""
    return value.tolist() if isinstance(value, Tensor) else float(value)
