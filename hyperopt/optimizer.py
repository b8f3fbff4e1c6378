"""`HyperOptimizer`: a stack of rules as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .checkpoint import by_number, check, export, load_shards, restore, save_shards
from .compile import Step, compiled
from .groups import OTHERS, Noted, Shown
from .layout import Layout, Parts, pick
from .rule import Rule, State, betas, near, split
from .shard import Shard, divide, precision, processes
from .stack import Stack, parse
from .tower import Move, Owner, TowerState, build

# What a copy of an optimizer is made from.
_COPIED = (
    *("defaults", "param_groups", "stack", "compile", "compiled", "_betas", "_rule", "_overrides"),
    *("_shards", "_parked", "_laid_groups", "_layout", "_packed"),
)


class HyperOptimizer(torch.optim.Optimizer):
    """Moves weights by the lowest rule of a stack, and each rule's hyperparameters by the next one.

    It is used as any optimizer of ``torch.optim`` is: ``zero_grad()``, backward, ``step()``. The
    hyperparameters are moved by their hypergradients (Chandra et al. 2022), which need no second
    derivative of the model: a plain ``loss.backward()`` is all.

    ``param_groups[i]["lr"]`` reads as the current value. For a hyperparameter that is tuned this is
    a 0-dim tensor that later steps change, so that a log keeps ``float(...)`` of it, or what
    `hyperparameters` or `snapshot` return. Otherwise it is a number, which may be set between
    steps, by hand or by a scheduler.

    ``state[p]`` is what the rule keeps of a parameter, in views that may be written to. It is what
    the rule read at the last step; on a stack of height 0, where nobody asks for that again, what
    it returned.

    Args:
        params: parameters or param groups. A group may give hyperparameters of the lowest rule a
            value of its own, as in ``{"params": ..., "lr": 0.1}``; one that is tuned is then tuned
            apart from that of the other groups.
        stack: a `Stack`, a single `Rule`, or their notation, as ``"Adam(0.001) / SGD(1e-5)"``.
        compile: whether to compile the step, which takes a few seconds at the first step. Where no
            compiler is found, steps run eagerly, which computes the same.

    Raises:
        ValueError: a stack that does not parse, a value outside its domain, an empty list of
            parameters, parameters on several devices.
        TypeError: complex or sparse parameters, or those of FullyShardedDataParallel.
    """

    _layout: Layout
    _packed: Tensor
    _parts: Parts
    _active: list[list[int]]  # per group, the ids of the parameters that the last step moved
    _run: Step | None
    _edits: list[str]  # of `state`, since it was made

    def __init__(
        self, params: Iterable[Any], stack: Stack | Rule | str, *, compile: bool = True
    ) -> None:
        self.stack = parse(stack)
        self._betas = betas(self.stack.levels[0])
        self.compile = compile
        self.compiled = False
        self._overrides: list[frozenset[str]] = []
        self._shards: list[Shard] = []  # what the last step moved
        self._parked: list[Shard] = []  # what earlier steps moved, and the last one did not
        self._laid_groups = 0
        defaults: dict[str, Any] = dict(self.stack.levels[0].values)
        if self._betas:
            defaults["betas"] = tuple(defaults[name] for name in self._betas)
        super().__init__(params, defaults)
        self._lay_out()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with values of their own for any hyperparameters of the lowest rule.

        Raises:
            ValueError: a key that is no hyperparameter, a value outside its domain.
            TypeError: complex or sparse parameters.
        """
        rule = self.stack.levels[0]
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group is a dict with params, not {param_group!r}")
        if "params" not in param_group:
            raise ValueError(f"a param group needs params, and has {', '.join(param_group)} alone")
        if self._betas and "betas" in param_group:
            param_group.update(split(self._betas, param_group.pop("betas")))
        own = {name: value for name, value in param_group.items() if name in rule.hypers}
        for name in param_group.keys() - own.keys() - OTHERS:
            raise ValueError(
                f"a param group of {rule.name} takes no {name!r}; "
                f"{near(name, ['params', *rule.hypers])}"
            )
        checked = rule.with_values(own)
        own = {name: checked.values[name] for name in own}
        moved = rule.tuned if self.stack.height else {}
        for name in own.keys() & moved.keys():
            if own[name] == 0 and 0 not in moved[name].domain:
                raise ValueError(
                    f"{name} is 0 in a param group, but {self.stack.levels[1]} moves it in the "
                    f"{moved[name].domain.name} domain, where it cannot stay 0; give the "
                    f"parameters that are to have no {name} an optimizer of their own"
                )
        Stack(checked, *self.stack.levels[1:])
        if self._laid_groups:
            self._follow()
            for name, value in own.items():
                if value != 0 and not self._rule.on(name):
                    raise ValueError(
                        f"{name} = {value} in a new group, but no group had {name} so far; give "
                        "the groups to one optimizer when it is made"
                    )
        super().add_param_group(param_group)
        try:
            self._check_params(self.param_groups[-1]["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._overrides.append(frozenset(own))
        if self._laid_groups:
            saved = self._export()
            if self._laid_groups == 1 and self.stack.height:
                # What the only group so far had to itself is not what the others share.
                parts = [saved[0]["tuned"], *saved[1]["last"].values()]
                for numbers in filter(lambda part: isinstance(part, dict), parts):
                    for name in self._overrides[0] & numbers.keys():
                        numbers[f"{name}[0]"] = numbers.pop(name)
            self._lay_out(saved)

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

    # The step.

    @torch._disable_dynamo  # which, in a loop that is compiled as a whole, would trace it wrongly
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the hyperparameters of all levels, from the top, and then the weights.

        Parameters whose ``grad`` is None are left alone, their state included, as ``torch.optim``
        does.

        Args:
            closure: computes the loss again and returns it, which is then what ``step`` returns. It
                is called once, with gradients enabled, before anything is moved.

        Raises:
            TypeError: a sparse gradient.
            ValueError: a tuned hyperparameter was set in a param group, parameters were moved to
                several devices, a param group was taken away, a parameter changed its shape, or one
                that has hyperparameters to itself its place among the others.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow(lambda p: p.grad is not None)
        active = [
            [id(p) for p in group["params"] if p.grad is not None] for group in self.param_groups
        ]
        if active != self._active or any(shard.astray for shard in self._shards):
            self._arrange(lambda p: p.grad is not None)
        if not self._shards:
            return loss
        vectors = [shard.read() for shard in self._shards]
        if self._run is None:
            if self.compile:
                self._run = compiled(self._layout, self._parts, vectors, not self._parked)
            self.compiled = self._run is not None
            self._run = self._run or functools.partial(self._layout.step, self._parts)
        self._run(vectors)
        for shard in self._shards:
            shard.write()
        self._shown.settle()
        return loss

    @property
    def state(self) -> defaultdict[Tensor, State]:
        """What the rule keeps of each parameter; before the first step, what it will start from.

        A state that is loaded in place, as `torch.distributed.checkpoint` does, needs a place then
        already. What is put into it, or taken out, holds from the next step on: where there is
        nothing for a parameter any more, the rule starts anew from the weights as they are.
        """
        if self._laid_groups and not self._state:
            self._shards, self._parked = [], []
            for number, group in enumerate(self.param_groups):
                params = [p for p in group["params"] if p.requires_grad]
                self._parked += self._new_shards(params, number)
            self._lay_out(self._export())
        return self._state

    @state.setter
    def state(self, state: defaultdict[Tensor, State]) -> None:
        self._state, self._edits = state, ["state"]

    def _follow(self, active: Callable[[Tensor], bool] | None = None) -> None:
        """Take over what was set in the param groups and in `state` since the last step.

        Args:
            active: whether the next step moves a parameter; by default, whether the last one did.

        Raises:
            ValueError: as `Shown.follow` does; something in `state` that the rule does not keep.
        """
        self._shown.follow(self.param_groups)
        if not self._edits:
            return
        self._edits.clear()
        given = {p: {**entries} for p, entries in self._state.items() if entries}
        known = given.keys() | self._kept.keys()
        changed = {p for p in known if not _same(given.get(p, {}), self._kept.get(p, {}))}
        if not changed:
            self._show_state()
            return
        moved = {p for shard in self._shards for p in shard.params}
        self._arrange(active or moved.__contains__, changed - given.keys())
        for number, group in enumerate(self.param_groups):  # those that are not moved yet
            new = [p for p in group["params"] if p in given and p not in self._kept]
            self._parked += self._new_shards(new, number)
        self._lay_out(self._export())
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

    # Reading the hyperparameters.

    @property
    def names(self) -> tuple[str, ...]:
        """What `snapshot` holds, as ``"0.lr"``: the level and the hyperparameter.

        A value that one param group has to itself is ``"0.lr[1]"``, and one that a level has for a
        single hyperparameter below it ``"1.lr[beta1]"``. One that a tensor has to itself is
        ``"0.lr[hidden.weight]"`` where the parameters were given with their names, as by
        ``model.named_parameters()``, and else ``"0.lr[p3]"``, counted from 0.
        """
        return self._names

    def snapshot(self) -> Tensor:
        """The current values of all hyperparameters in the order of `names`, as a new tensor.

        It is float64, 1-D, on the parameters' device; nothing waits for that device.
        """
        self._shown.follow(self.param_groups)
        return self._packed[: len(self.names)].clone()

    def hyperparameters(self) -> list[dict[str, float]]:
        """The current values of each level's hyperparameters, lowest level first."""
        found: list[dict[str, float]] = [{} for _ in self.stack.levels]
        for name, value in zip(self.names, self.snapshot().tolist(), strict=True):
            level, _, slot = name.partition(".")
            found[int(level)][slot] = value
        order = [list(rule.hypers) for rule in self.stack.levels]
        return [
            dict(sorted(values.items(), key=lambda item: names.index(item[0].partition("[")[0])))
            for names, values in zip(order, found, strict=True)
        ]

    def hypergradients(self) -> Tensor:
        """What moved the tuned hyperparameters in the last step, in their order in `names`.

        The derivatives of the loss with respect to their raw values, as the level above was given
        them: clipped, where it clips, 0 in the first step, and NaN in one that was left out. A new
        tensor, float64, 1-D, as many as there are tuned hyperparameters, with which `names` begins;
        nothing waits for the device.
        """
        own = [move.g.reshape(-1) for move in self._parts.upper]
        return torch.cat([self._packed.new_empty(0), *own])

    @property
    def skipped(self) -> list[int]:
        """For each level, how many of its moves were left out since something was not finite."""
        return [int(count) for count in self._parts.skipped.tolist()]

    # What the step relies on: the layout of the parameters.

    def _arrange(
        self, active: Callable[[Tensor], bool], forgotten: Collection[Tensor] = ()
    ) -> None:
        """Lay the shards out anew, after other parameters than before have received a gradient.

        The same is due where parameters have changed their device, their precision or their group.

        Args:
            active: whether the next step moves a parameter.
            forgotten: those for which the rule starts anew.
        """
        if len(self.param_groups) < self._laid_groups:
            raise ValueError("a param group was taken away; make a new optimizer of the others")
        if len(self.param_groups) > self._laid_groups:
            raise ValueError("a param group was put in by hand; use add_param_group")
        self._check_params([p for group in self.param_groups for p in group["params"]])
        for shard in self._shards + self._parked:
            shard.check_shapes()
        exported = self._export()
        numbers = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        for p in numbers:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise TypeError(
                    f"a gradient is sparse ({p.grad.layout}); only dense ones can be used: "
                    "make the layer with sparse=False"
                )
        shards: list[Shard] = []
        parked: list[Shard] = []
        for shard in self._shards + self._parked:
            pieces: dict[tuple[int, bool, torch.dtype], list[Tensor]] = {}
            for p in shard.params:
                if p in numbers and p not in forgotten:
                    key = numbers[p], active(p), precision(p)
                    pieces.setdefault(key, []).append(p)
            for (number, moving, _), params in pieces.items():
                piece = shard.part(params)
                if not moving or number != shard.owner.group:
                    self._settle(piece)
                piece.owner = self._owner(params[0], number)
                if piece.owner.parameter != shard.owner.parameter:
                    raise ValueError(
                        "a parameter that has hyperparameters to itself changed its place among "
                        "the others; replace parameters where they are, or make a new optimizer"
                    )
                piece.follow()
                (shards if moving else parked).append(piece)
        known = {p for shard in shards + parked for p in shard.params}
        for number, group in enumerate(self.param_groups):
            new = [p for p in group["params"] if p not in known and active(p)]
            shards += self._new_shards(new, number)
        place = {p: i for i, p in enumerate(numbers)}
        self._shards = sorted(shards, key=lambda shard: place[shard.params[0]])
        self._parked = parked
        self._lay_out(exported)

    @property
    def _regrouped(self) -> bool:
        """Whether a parameter is now in another param group than when it was moved."""
        groups = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        shards = self._shards + self._parked
        return any(groups.get(p, s.owner.group) != s.owner.group for s in shards for p in s.params)

    def _new_shards(self, params: Sequence[Tensor], group: int) -> list[Shard]:
        lowest = self._layout.blocks[0]
        parts = [[p] for p in params] if lowest.by_tensor else divide(params)
        return [Shard.new(each, self._owner(each[0], group), lowest) for each in parts]

    @property
    def _device(self) -> torch.device:
        first = next((p for group in self.param_groups for p in group["params"]), None)
        return torch.device("cpu") if first is None else first.device

    def _owner(self, p: Tensor, group: int) -> Owner:
        """Whose hyperparameters a shard that begins with a parameter is moved by."""
        if not self._layout.blocks[0].by_tensor:
            return Owner(group)
        everyone = [q for each in self.param_groups for q in each["params"]]
        return Owner(group, next(i for i, q in enumerate(everyone) if q is p))

    def _settle(self, shard: Shard) -> None:
        """Let a shard forget its last move, of which the state that it led to remains."""
        lowest, parts = self._layout.blocks[0], self._parts
        raw = pick(parts.raw[0][0], shard.owner.among(lowest.tuned))
        fixed = pick(parts.last_fixed, shard.owner.among(lowest.fixed))
        w, g, start, moved = shard.last
        if g is not None:
            read = g if w is None else w  # as in `replay`, without the derivatives
            _, after = lowest.rule.update(read, g, start, lowest.values(raw, fixed))
            state = {name: torch.where(moved > 0, after[name], old) for name, old in start.items()}
            shard.last = Move(w, g, state, torch.zeros_like(moved))

    def _tower(self) -> TowerState:
        tower = self._layout.tower(self._parts)
        return tower._replace(lowest=tuple(shard.last for shard in self._shards))

    def _export(self) -> list[dict[str, Any]]:
        return export(self._layout, self._tower())

    def _lay_out(self, saved: Sequence[dict[str, Any]] = ()) -> None:
        """Make `packed` for the present param groups and shards.

        Args:
            saved: what `_export` said of each level; nothing for the initial values.
        """
        if not saved:
            rule = self.stack.levels[0]
            for group in self.param_groups:
                rule = rule.with_values({name: group[name] for name in rule.hypers})
            self._rule = rule.with_values(self.stack.levels[0].values)
        stack = Stack(self._rule, *self.stack.levels[1:])
        self._layout = Layout(
            build(stack, self._overrides, [len(group["params"]) for group in self.param_groups]),
            tuple(shard.owner for shard in self._shards),
            tuple(len(shard) for shard in self._shards),
            processes([p for group in self.param_groups for p in group["params"]]),
        )
        self._run = None
        device = self._device
        dtype = torch.float32 if device.type == "mps" else torch.float64

        blank = torch.empty(0, dtype=dtype, device=device)
        tower = restore(self._layout, stack, self.param_groups, saved, self._laid_groups, blank)
        tower = tower._replace(lowest=tuple(shard.last for shard in self._shards))
        leaves = tree_leaves(self._layout.parts_of(tower, going=blank.new_ones(())))
        self._packed = torch.cat([leaf.reshape(-1) for leaf in leaves]).to(dtype)
        self._parts = self._layout.parts(self._packed)
        for shard, own in zip(self._shards, self._parts.small, strict=True):
            shard.last = self._layout.last(own, shard.last.w, shard.last.g, shard.last.state)
        self._laid_groups = len(self.param_groups)
        called = [name for g in self.param_groups for name in g.get("param_names", [])]
        # A name that is given twice would not tell its owner.
        times = Counter(called)
        by_place = {f"[p{i}]": f"[{name}]" for i, name in enumerate(called) if times[name] == 1}
        self._names = tuple(
            re.sub(r"\[p\d+\]$", lambda place: by_place.get(place[0], place[0]), name)
            for name in self._layout.names
        )
        self._shown = Shown(self.param_groups, stack, self._layout, self._packed)
        group_of = {p: shard.owner.group for shard in self._shards for p in shard.params}
        self._active = [
            [id(p) for p in group["params"] if group_of.get(p) == i]
            for i, group in enumerate(self.param_groups)
        ]
        self._kept = {
            p: entries
            for shard in self._shards + self._parked
            for p, entries in shard.by_parameter().items()
        }
        self._show_state()

    def _show_state(self) -> None:
        self._edits = []
        noted = {p: Noted.of(entries, self._edits) for p, entries in self._kept.items()}
        self._state = Noted.of(noted, self._edits, dict)

    # Saving and loading.

    def __getstate__(self) -> dict[str, Any]:
        # Hooks stay behind, as in torch.optim, and so does the `step` that a scheduler puts in
        # front of ours, which would move the original.
        self._follow()
        return {name: self.__dict__[name] for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parts = self._layout.parts(self._packed)
        self._lay_out(self._export())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on bit for bit, as tensors, numbers and strings.

        ``state`` is, as in ``torch.optim``, by the number of the parameter: what the rule keeps of
        it, in its shape, and the last gradient that it was moved by. What is kept of a parameter
        that is divided over processes is divided in the same way.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._follow()
        if self._regrouped or any(shard.astray for shard in self._shards + self._parked):
            self._arrange({p for shard in self._shards for p in shard.params}.__contains__)
        number = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        told = {*self._rule.hypers, "betas", "params"}
        state_dict: dict[str, Any] = {
            "state": save_shards(self._shards, self._parked, number),
            "param_groups": [
                {
                    **{name: _number(group[name]) for name in self._rule.hypers},
                    **{name: group[name] for name in group if name not in told},
                    "own": sorted(own),
                    "params": [number[p] for p in group["params"]],
                }
                for group, own in zip(self.param_groups, self._overrides, strict=True)
            ],
        }
        # All else that a stack knows is in a group, since torch.distributed.checkpoint takes no
        # more than groups and state.
        tower = {"stack": str(self.stack), "on": self._on(), "levels": self._export()}
        state_dict["param_groups"][0]["tower"] = tower
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            ValueError: it is not the state of such a stack, or not a whole one, or its parameters
                are not of the number and shapes of these, or not divided over processes as these
                are. Nothing is changed then.
        """
        state_dict = copy.copy(state_dict)  # as a hook of torch may expect
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        expected = {"state", "param_groups"}
        if not isinstance(state_dict, dict) or not expected <= state_dict.keys():
            found = [*state_dict] if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(f"expected a dict with state and param_groups, found {found}")
        params = [group["params"] for group in self.param_groups]
        check(state_dict, self.stack, self._on(), params)
        try:
            shards = load_shards(by_number(state_dict), params, self._layout.blocks[0])
        except KeyError as missing:
            raise ValueError(
                f"this state is not a whole one: a parameter has no {missing}"
            ) from None
        self._shards, self._parked = shards
        self._overrides = [frozenset(group.get("own", ())) for group in state_dict["param_groups"]]
        both = [*zip(self.param_groups, state_dict["param_groups"], strict=True)]
        for group, saved in both:
            group.update({name: saved[name] for name in saved.keys() - {"own", "params", "tower"}})
        self._lay_out(state_dict["param_groups"][0]["tower"]["levels"])
        for group, saved in both:  # what was set in the state, as one does to go on with another lr
            group.update({n: saved[n] for n in self._rule.hypers if isinstance(group[n], float)})
        self._shown.follow(self.param_groups)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _on(self) -> list[str]:
        """The hyperparameters of the lowest level that take part."""
        return [name for name in self._rule.hypers if self._rule.on(name)]


def _same(given: State, kept: State) -> bool:
    """Whether what is there of a parameter is what was shown."""
    return given.keys() == kept.keys() and all(given[name] is kept[name] for name in kept)


def _number(value: Any) -> float | list[float]:
    """What a param group shows, as plain numbers: one, or one for each tensor."""
    return value.tolist() if isinstance(value, Tensor) else float(value)
