"""`HyperOptimizer`: a stack of rules as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .compile import Step, compiled
from .layout import Layout, Parts, pick
from .rule import Rule, near
from .shard import Shard, divide, precision
from .stack import Stack, parse
from .tower import Move, Owner, Slot, TowerState, build, replay


class HyperOptimizer(torch.optim.Optimizer):
    """Moves weights by the lowest rule of a stack, and each rule's hyperparameters by the next one.

    It is used as any optimizer of ``torch.optim`` is: ``zero_grad()``, backward, ``step()``. The
    hyperparameters are moved by their hypergradients (Chandra et al. 2022), which need no second
    derivative of the model: a plain ``loss.backward()`` is all.

    ``param_groups[i]["lr"]`` reads as the current value: a 0-dim tensor for a hyperparameter that
    is tuned, and otherwise a number, which may be set between steps.

    Args:
        params: parameters or param groups. A group may give hyperparameters of the lowest rule a
            value of its own, as in ``{"params": ..., "lr": 0.1}``; one that is tuned is then tuned
            apart from that of the other groups.
        stack: a `Stack`, a single `Rule`, or their notation, as ``"Adam(0.001) / SGD(1e-5)"``.
        compile: whether to compile the step, which takes a few seconds at the second step. Where no
            compiler is found, steps run eagerly, which computes the same.

    Raises:
        ValueError: a stack that does not parse, a value outside its domain, an empty list of
            parameters, parameters on several devices.
        TypeError: complex or sparse parameters.
    """

    _layout: Layout
    _packed: Tensor
    _parts: Parts
    _resting: list[Tensor]  # parameters that the last step did not move
    _run: Step | None

    def __init__(
        self, params: Iterable[Any], stack: Stack | Rule | str, *, compile: bool = True
    ) -> None:
        self.stack = parse(stack)
        self.compile = compile
        self.compiled = False
        self._overrides: list[frozenset[str]] = []
        self._shards: list[Shard] = []  # what the last step moved
        self._parked: list[Shard] = []  # what earlier steps moved, and the last one did not
        self._laid_groups = 0
        super().__init__(params, dict(self.stack.levels[0].values))
        self._lay_out()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with values of their own for any hyperparameters of the lowest rule.

        Raises:
            ValueError: a key that is no hyperparameter, a value outside its domain.
            TypeError: complex or sparse parameters.
        """
        rule = self.stack.levels[0]
        own = {name: value for name, value in param_group.items() if name in rule.hypers}
        for name in param_group.keys() - own.keys() - {"params", "param_names"}:
            raise ValueError(
                f"a param group of {rule.name} takes no {name!r}; "
                f"{near(name, ['params', *rule.hypers])}"
            )
        Stack(rule.with_values(own), *self.stack.levels[1:])  # checks them
        if self._laid_groups:
            self._follow_groups()
            for name, value in own.items():
                if value != 0 and not self._rule.on(name):
                    raise ValueError(
                        f"{name} = {value} in a new group, but no group had {name} so far"
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
        device = self.param_groups[0]["params"][0].device
        for p in params:
            if p.is_complex():
                raise TypeError(f"a parameter is complex ({p.dtype}); only real ones can be moved")
            if p.layout != torch.strided:
                raise TypeError(f"a parameter is sparse ({p.layout}); only dense ones can be moved")
            if p.device != device:
                raise ValueError(
                    f"parameters on {device} and on {p.device}; make one optimizer for each device"
                )

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the hyperparameters of all levels, from the top, and then the weights.

        Parameters whose ``grad`` is None are left alone, their state included, as ``torch.optim``
        does.

        Args:
            closure: computes the loss again and returns it, which is then what ``step`` returns.

        Raises:
            TypeError: a sparse gradient.
            ValueError: a tuned hyperparameter was set in a param group.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_groups()
        if any(p.grad is None for shard in self._shards for p in shard.params) or any(
            p.grad is not None for p in self._resting
        ):
            self._arrange()
        if not self._shards:
            return loss
        vectors = [shard.read() for shard in self._shards]
        if self._run is None:
            if self.compile:
                self._run = compiled(self._layout, self._parts, vectors)
            self.compiled = self._run is not None
            self._run = self._run or functools.partial(self._layout.step, self._parts)
        self._run(vectors)
        for shard in self._shards:
            shard.write()
        self._version = self._packed._version
        return loss

    # Reading the hyperparameters.

    @property
    def names(self) -> tuple[str, ...]:
        """What `snapshot` holds, as ``"0.lr"``: the level and the hyperparameter.

        A value that one param group has to itself is ``"0.lr[1]"``, and one that a level has for a
        single hyperparameter below it ``"1.lr[beta1]"``.
        """
        return self._layout.names

    def snapshot(self) -> Tensor:
        """The current values of all hyperparameters in the order of `names`, as a new tensor.

        It is float64, 1-D, on the parameters' device; nothing waits for that device.
        """
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

    @property
    def skipped(self) -> list[int]:
        """For each level, how many of its moves were left out since something was not finite."""
        return [int(count) for count in self._parts.skipped.tolist()]

    # What the step relies on: the layout of the parameters, and the numbers in the param groups.

    def _follow_groups(self) -> None:
        """Take over numbers that were set in the param groups since the last step."""
        if self._packed._version != self._version:
            raise ValueError(self._tuned_message("a tuned hyperparameter"))
        for watch in self._watched:
            group, name, seen, place = watch
            value = group[name]
            if value is seen:
                continue
            if isinstance(seen, Tensor):
                raise ValueError(self._tuned_message(name))
            if value != 0 and not self._rule.on(name):
                raise ValueError(
                    f"{name} was 0 when the optimizer was made, so that its step leaves it out; "
                    f"to set it later, give it a value then"
                )
            self._packed[place] = value
            watch[2] = value
        self._version = self._packed._version

    def _tuned_message(self, name: str) -> str:
        return (
            f"{name} was set from outside, but {self.stack.levels[1]} moves it; "
            f"to set it yourself, leave it out of what the stack {self.stack} tunes"
        )

    def _arrange(self) -> None:
        """Lay the shards out anew, after other parameters than before have received a gradient."""
        exported = self._export()
        shards, parked = [], []
        for shard in self._shards + self._parked:
            chosen = [p.grad is not None for p in shard.params]
            if any(chosen):
                shards.append(shard.part(chosen))
            if not all(chosen):
                rest = shard.part([not here for here in chosen])
                self._settle(rest)
                parked.append(rest)
        known = {p for shard in shards + parked for p in shard.params}
        for number, group in enumerate(self.param_groups):
            new = [p for p in group["params"] if p not in known and p.grad is not None]
            for p in new:
                if p.grad.layout != torch.strided:
                    raise TypeError(
                        f"a gradient is sparse ({p.grad.layout}); only dense ones can be used: "
                        "make the layer with sparse=False"
                    )
            lowest = self._layout.blocks[0]
            shards += [Shard.new(params, Owner(number), lowest) for params in divide(new)]
        place = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        self._shards = sorted(shards, key=lambda shard: place[shard.params[0]])
        self._parked = parked
        self._lay_out(exported)

    def _settle(self, shard: Shard) -> None:
        """Let a shard forget its last move, of which the state that it led to remains."""
        lowest, parts = self._layout.blocks[0], self._parts
        raw = pick(parts.raw[0][0], shard.owner.among(lowest.tuned))
        fixed = pick(parts.last_fixed, shard.owner.among(lowest.fixed))
        if shard.last.g is not None:
            state, _ = replay(lowest, raw, fixed, shard.last, shard.last.g)
            shard.last = shard.last._replace(state=state, moved=torch.zeros_like(shard.last.moved))

    def _tower(self) -> TowerState:
        tower = self._layout.tower(self._parts)
        return tower._replace(lowest=tuple(shard.last for shard in self._shards))

    def _export(self) -> list[dict[str, Any]]:
        """For each level its hyperparameters by name and, above the lowest, its last move."""
        tower = self._tower()
        exported = []
        for k, (b, row) in enumerate(self._layout.levels):
            block = self._layout.blocks[b]
            entry: dict[str, Any] = {
                "tuned": _by_name(block.tuned, tower.raw[b][row]),
                "fixed": _by_name(block.fixed, tower.fixed[b][row]),
                "skipped": tower.skipped[k].clone(),
            }
            if k == 0:
                entry["last_fixed"] = _by_name(block.fixed, tower.last_fixed)
                entry["steps"] = tower.steps.clone()
            else:
                below = self._layout.blocks[self._layout.levels[k - 1][0]].tuned
                w, g, state, moved = tree_map(lambda rows, row=row: rows[row], tower.upper[b - 1])
                entry["last"] = {
                    name: _by_name(below, part) if part.ndim else part.clone()
                    for name, part in {"w": w, "g": g, "moved": moved, **state}.items()
                }
            exported.append(entry)
        return exported

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
            build(stack, self._overrides),
            tuple(shard.owner for shard in self._shards),
            tuple(len(shard) for shard in self._shards),
        )
        self._run = None
        device = self.param_groups[0]["params"][0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64

        def recall(numbers: dict[str, Any], slot: Slot, otherwise: Any) -> Any:
            """What was saved for a slot, or for the shared one of which it was a part."""
            if str(slot) in numbers:
                return numbers[str(slot)]
            if isinstance(slot.owner, int) and slot.owner < self._laid_groups:
                return numbers.get(slot.name, otherwise)
            return otherwise

        def initial(k: int, slot: Slot) -> float:
            value: Any = stack.levels[k].values[slot.name]
            if k == 0 and (slot.owner is not None or len(self.param_groups) == 1):
                value = self.param_groups[int(slot.owner or 0)][slot.name]
            return value[str(slot.owner)] if isinstance(value, dict) else value

        def vector(numbers: Sequence[Any]) -> Tensor:
            return torch.tensor([float(x) for x in numbers], dtype=dtype, device=device)

        raw: list[Tensor] = []
        fixed: list[Tensor] = []
        bounds: list[Tensor] = []
        moves: list[list[Move]] = [[] for _ in self._layout.blocks]
        for k, (b, _) in enumerate(self._layout.levels):
            block = self._layout.blocks[b]
            old = saved[k] if saved else {"tuned": {}, "fixed": {}, "last_fixed": {}, "last": {}}
            domains = [block.rule.tuned[slot.name] for slot in block.tuned]
            start = [
                domain.raw(float(initial(k, slot)))
                for domain, slot in zip(domains, block.tuned, strict=True)
            ]
            raw.append(
                vector(
                    [recall(old["tuned"], s, x) for s, x in zip(block.tuned, start, strict=True)]
                )
            )
            reach = vector([domain.reach for domain in domains])
            bounds.append(torch.stack([-reach, reach]))
            fixed.append(vector([recall(old["fixed"], s, initial(k, s)) for s in block.fixed]))
            if k == 0:
                last_fixed = vector(
                    [recall(old["last_fixed"], s, initial(k, s)) for s in block.fixed]
                )
            else:
                slots = self._layout.blocks[self._layout.levels[k - 1][0]].tuned
                parts = {"w": raw[k - 1], "g": torch.zeros_like(raw[k - 1]), "moved": vector([0])}
                parts |= block.rule.init(raw[k - 1])
                for name in parts.keys() & old["last"].keys():
                    part, known = parts[name], old["last"][name]
                    if isinstance(known, dict):
                        below = zip(slots, part, strict=True)
                        parts[name] = vector([recall(known, slot, x) for slot, x in below])
                    else:
                        parts[name] = vector([known]).view(part.shape)
                w, g, moved = parts.pop("w"), parts.pop("g"), parts.pop("moved")
                moves[b].append(Move(w, g, parts, moved.view(())))

        blocks = range(len(self._layout.blocks))

        def rows(tensors: Sequence[Tensor], dim: int = 0) -> tuple[Tensor, ...]:
            """One tensor for each block, of one for each level."""
            blocks_of = [b for b, _ in self._layout.levels]
            own = [[t for t, at in zip(tensors, blocks_of, strict=True) if at == b] for b in blocks]
            return tuple(torch.stack(each, dim) for each in own)

        counts = vector([level["skipped"] for level in saved] or [0] * len(self._layout.levels))
        going = vector([0]).view(())
        tower = TowerState(
            raw=rows(raw),
            bounds=rows(bounds, 1),
            fixed=rows(fixed),
            last_fixed=last_fixed,
            steps=vector([saved[0]["steps"] if saved else 0]).view(()),
            skipped=counts,
            lowest=tuple(shard.last for shard in self._shards),
            upper=tuple(tree_map(lambda *each: torch.stack(each), *own) for own in moves[1:]),
        )
        leaves = tree_leaves(self._layout.parts_of(tower, going))
        self._packed = torch.cat([leaf.reshape(-1) for leaf in leaves]).to(dtype)
        self._parts = self._layout.parts(self._packed)
        for shard, own in zip(self._shards, self._parts.small, strict=True):
            shard.last = self._layout.last(own, shard.last.w, shard.last.g, shard.last.state)
        self._laid_groups = len(self.param_groups)
        self._show()

    def _show(self) -> None:
        """Let the param groups show the hyperparameters of the lowest level."""
        self._watched: list[list[Any]] = []
        lowest = self._layout.blocks[0]
        for number, group in enumerate(self.param_groups):
            for name in self._rule.hypers:
                slot = Slot(name, number)
                if slot not in (*lowest.tuned, *lowest.fixed):
                    slot = Slot(name)
                place = self.names.index(f"0.{slot}")
                shown = self._packed[place]
                group[name] = shown if slot in lowest.tuned else float(shown)
                self._watched.append([group, name, group[name], place])
        active = {p for shard in self._shards for p in shard.params}
        self._resting = [p for g in self.param_groups for p in g["params"] if p not in active]
        self._version = self._packed._version

    # Saving and loading.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._run = None
        self._lay_out(self._export())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on bit for bit, as tensors, numbers and strings.

        ``state`` is, as in ``torch.optim``, by the number of the parameter: what the rule keeps of
        it, in its shape, and the last gradient that it was moved by.
        """
        self._follow_groups()
        number = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        state: dict[int, dict[str, Any]] = {}
        for i, shard in enumerate(self._shards + self._parked):
            w, g, last_state, moved = shard.last
            kept = dict(last_state)
            if moved and g is not None:
                kept["last_grad"] = g
                if w is not None:
                    kept["last_weight"] = w
            views = {name: shard.shaped(value) for name, value in kept.items() if value.ndim}
            for j, p in enumerate(shard.params):
                state[number[p]] = {
                    "shape": list(p.shape),
                    "shard": i,
                    "active": i < len(self._shards),
                    **{name: views[name][j] if v.ndim else v for name, v in kept.items()},
                }
        return {
            "state": dict(sorted(state.items())),
            "param_groups": [
                {
                    **{name: float(group[name]) for name in self._rule.hypers},
                    "own": sorted(own),
                    "params": [number[p] for p in group["params"]],
                }
                for group, own in zip(self.param_groups, self._overrides, strict=True)
            ],
            "stack": str(self.stack),
            "on": self._on(),
            "levels": self._export(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            ValueError: it is not the state of such a stack, or its parameters are not of the number
                and shapes of these.
        """
        self._check(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        self._overrides = [frozenset(group["own"]) for group in state_dict["param_groups"]]
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: saved[name] for name in self._rule.hypers})
        groups = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        members: dict[int, list[int]] = {}
        for i, entry in state_dict["state"].items():
            members.setdefault(entry["shard"], []).append(i)
        self._shards, self._parked = [], []
        for _, numbers in sorted(members.items()):
            entries = [state_dict["state"][i] for i in numbers]
            chosen = [params[i] for i in numbers]
            kept = {
                name: _joined([entry[name] for entry in entries], chosen[0])
                for name, value in entries[0].items()
                if isinstance(value, Tensor)
            }
            shard = Shard.new(chosen, Owner(groups[chosen[0]]), self._layout.blocks[0])
            w, g, fresh, moved = shard.last
            shard.last = Move(
                kept.get("last_weight", w),
                kept.get("last_grad", g),
                {
                    name: (kept[name] if value.ndim else entries[0][name]).to(value, copy=True)
                    for name, value in fresh.items()
                },
                moved + ("last_grad" in kept),
            )
            (self._shards if entries[0]["active"] else self._parked).append(shard)
        self._lay_out(state_dict["levels"])

    def _check(self, state_dict: dict[str, Any]) -> None:
        """Raise where a state is not that of this stack on parameters like these."""
        theirs = state_dict.get("stack")
        if theirs is None:
            raise ValueError("this is the state of another optimizer, not of a HyperOptimizer")
        if _kind(parse(theirs)) != _kind(self.stack):
            raise ValueError(f"this is the state of the stack {theirs}, not of {self.stack}")
        if state_dict["on"] != self._on():
            raise ValueError(
                f"this is the state of the stack {theirs} with {', '.join(state_dict['on'])} in "
                f"its param groups, not of {self.stack} with {', '.join(self._on())}"
            )
        counts = [len(group["params"]) for group in state_dict["param_groups"]]
        ours = [len(group["params"]) for group in self.param_groups]
        if counts != ours:
            raise ValueError(
                f"this is the state of param groups with {counts} parameters, not with {ours}"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        for i, entry in state_dict["state"].items():
            if entry["shape"] != list(params[i].shape):
                raise ValueError(
                    f"this is the state of parameters of other shapes: number {i} has "
                    f"{tuple(params[i].shape)} here and {tuple(entry['shape'])} there"
                )

    def _on(self) -> list[str]:
        """The hyperparameters of the lowest level that take part."""
        return [name for name in self._rule.hypers if self._rule.on(name)]


def _by_name(slots: Sequence[Slot], numbers: Tensor) -> dict[str, Tensor]:
    return {str(slot): x.clone() for slot, x in zip(slots, numbers, strict=True)}


def _joined(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """One flat vector of a shard from what was saved of each of its parameters."""
    dtype = precision(like)
    return torch.cat([piece.reshape(-1).to(like.device, dtype) for piece in pieces])


def _kind(stack: Stack) -> list[tuple]:
    """A stack but for its numbers."""
    return [
        (
            rule.name,
            [(name, domain.name) for name, domain in rule.tuned.items()],
            [name for name in rule.hypers if k and rule.on(name)],
            [(n, set(value)) for n, value in rule.values.items() if isinstance(value, dict)],
            rule.settings,
        )
        for k, rule in enumerate(stack.levels)
    ]
