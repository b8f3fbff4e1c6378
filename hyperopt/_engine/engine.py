"""`Engine`: the memory of a `HyperOptimizer` between steps.

Parameters with a gradient are divided into shards. All numbers are in `packed`, whose layout
depends on the stack, the param groups and the shards. The engine rebuilds shards and layout when
other parameters have gradients than in the last step, when a group is added, or when the user edits
the state.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..notation import parse
from ..per_element import fold
from ..rule import Rule, Stack, State, betas, unpack_betas
from ..tuning import likely_typo
from . import checkpoint
from .blocks import FACTOR, Owner, build
from .modes import is_fake, outside_modes
from .packed import Layout, Vectors
from .shards import Shard, divide, local, precision, processes
from .step import Step, compiled_step, eager_step
from .torch_private import is_flattened
from .updates import LastUpdate, Numbers
from .views import ParamGroupView, start_of

# Legal keys of a param group that look like misspelled hyperparameters.
KNOWN_KEYS = frozenset({"params", "param_names", "name", "initial_lr", "stack"})

# Switches of torch's optimizers that a param group may set, and that change the update.
SWITCHES = ("maximize", "amsgrad", "dampening", "differentiable")

# The public name of an lr that a scheduler has scaled.
EFFECTIVE = "0.effective_lr"

# With compile="auto" the step is compiled after this many steps, so that short scripts do not wait
# for the compiler. The number is constant, so that runs are reproducible and resume bit for bit.
EAGER_STEPS = 20


class Engine:
    """The state and the step of a `HyperOptimizer`.

    Args:
        stack: the stack.
        compile: whether to compile the step. "auto" compiles after `EAGER_STEPS` steps.

    Attributes:
        groups: the param groups.
        layout: the layout of `packed`.
        packed: all numbers, 1-D.
        is_compiled: whether the last step was compiled.
    """

    groups: list[dict[str, Any]]
    layout: Layout
    packed: Tensor
    _numbers: Numbers
    _names: tuple[str, ...]  # public names of all hyperparameters
    _places: list[int]  # their indices in `packed`
    _rule: Rule  # the lowest rule, with the hyperparameters that are active in any group
    _active: list[list[int]]  # per group, the ids of the parameters that the last step moved
    _step: Step | None
    _view: ParamGroupView

    def __init__(self, stack: Stack, compile: bool | str) -> None:
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', not {compile!r}")
        self.given, self.stack = stack, fold(stack)
        self.compile, self.is_compiled = compile, False
        self.betas = betas(self.stack.levels[0])
        self._overrides: list[frozenset[str]] = []  # hyperparameters that each group overrides
        self._shards: list[Shard] = []  # moved by the last step
        self._inactive_shards: list[Shard] = []  # moved only by earlier steps
        self._known_groups = 0  # the number of groups in the layout
        self._steps_made = 0
        self._bases: list[Any] = []  # `ScaledLr.base` of each group
        self._is_scaled = False  # whether a tuned lr has ever been scaled
        # The public `state`, which may have entries of other code, and whether it was ever read.
        self._state: Any = defaultdict(dict)
        self._is_state_shown = False
        self._shown: dict[Tensor, dict[str, tuple[Any, int]]] = {}  # entry, address

    @property
    def is_started(self) -> bool:
        return self._known_groups > 0

    @property
    def is_fake(self) -> bool:
        return is_fake(self.params)

    @outside_modes
    def start(self) -> None:
        """Make the layout, after the constructor has added all groups."""
        self._rebuild_layout()
        self._sync_groups()

    def __getstate__(self) -> dict[str, Any]:
        self.sync()
        self._bases = self._take_bases()
        names = ("given", "stack", "compile", "is_compiled", "betas", "groups", "layout", "packed")
        own = (
            "_rule",
            "_overrides",
            "_shards",
            "_inactive_shards",
            "_known_groups",
            "_bases",
            "_is_scaled",
        )
        kept = {
            name: self.__dict__[name] for name in (*names, *own, "_is_state_shown", "_steps_made")
        }
        return {**kept, "_state": self._foreign_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._restart()

    @outside_modes
    def _restart(self) -> None:
        self._shown = {}
        self._numbers = self.layout.numbers(self.packed)
        self._rebuild_layout(self._export(), self._bases)

    @property
    def stacks(self) -> list[Stack]:
        return [self.given]

    # Param groups.

    @outside_modes
    def check_group(self, group: dict[str, Any]) -> frozenset[str]:
        """Check a new param group, and convert its hyperparameters to numbers.

        Returns:
            the names of the hyperparameters that the group overrides.

        Raises:
            ValueError: a key is nearly a hyperparameter's name, or a value cannot be used.
        """
        rule = self.stack.levels[0]
        if "params" not in group:
            raise ValueError(f"a param group needs params, but has only {', '.join(group)}")
        if (stack := parse(group.get("stack", self.given))) != self.given:
            raise ValueError(
                f"a param group has the stack {stack}, but the optimizer has {self.given} for all; "
                "give groups with their own stacks to the constructor"
            )
        if self.betas and "betas" in group:
            group.update(unpack_betas(self.betas, group.pop("betas")))
        own = {name: value for name, value in group.items() if name in rule.hypers}
        for name in group.keys() - own.keys() - KNOWN_KEYS:
            if near := likely_typo(name, ["params", *rule.hypers]):
                raise ValueError(
                    f"a param group of {rule.name} takes no {name!r}; did you mean {near!r}?"
                )
        for name in group.keys() & {*SWITCHES, *rule.options}:
            if group[name] != rule.settings.get(name, False):
                can = f"can only do for all groups: {rule.name}({name}=...)"
                raise ValueError(
                    f"{name} is {group[name]!r} in a param group, which {rule.name} "
                    + (can if name in rule.options else "cannot do")
                )
        checked = rule.with_values(own)
        own = {name: checked.values[name] for name in own}
        group.update(own)
        tuned = rule.tuned if self.stack.height else {}
        for name in own.keys() & tuned.keys():
            if own[name] == 0 and 0 not in tuned[name].domain:
                raise ValueError(
                    f"{name} is 0 in a param group, but {self.stack.levels[1]} moves it in the "
                    f"{tuned[name].domain.name} domain, which does not contain 0; give the "
                    f"parameters without {name} an optimizer of their own"
                )
        Stack(checked, *self.stack.levels[1:])
        if "lr" in tuned and "initial_lr" in group:  # a scheduler has set it
            Stack(rule.with_values({"lr": start_of(group)}), *self.stack.levels[1:])
        if self.is_started:
            self.sync()
            for name, value in own.items():
                if value != 0 and not self._rule.is_active(name):
                    raise ValueError(
                        f"{name} = {value} in a new group, but no group had {name} before; give "
                        "all groups to the constructor"
                    )
        return frozenset(own)

    @outside_modes
    def add_group(self, own: frozenset[str]) -> None:
        """Add the last param group to the layout.

        Args:
            own: the result of `check_group` for it.
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
            # The first group's own values become per group: the new group does not share them.
            parts = [saved[0]["tuned"], *saved[1]["last"].values()]
            for numbers in filter(lambda part: isinstance(part, dict), parts):
                for name in self._overrides[0] & numbers.keys():
                    numbers[f"{name}[0]"] = numbers.pop(name)
        self._rebuild_layout(saved)

    def _check_params(self, params: Iterable[Tensor]) -> None:
        """Check the parameters that have, or can have, a gradient. Others may be of any kind."""
        params = list(params)
        if len(set(params)) < len(params):
            raise ValueError("a parameter was given twice; give each one once, tied ones too")
        device, rule = self.device, self.stack.levels[0]
        for p in filter(_is_trained, params):
            if rule.ndim not in (None, p.ndim):
                raise ValueError(
                    f"{rule.name} moves parameters of {rule.ndim} dimensions, but one has the "
                    f"shape {[*p.shape]}; give it another stack, as in "
                    '{"params": ..., "stack": "AdamW(0.001)"}'
                )
            if not rule.elementwise and processes([p]):
                raise ValueError(
                    f"{rule.name} needs whole parameters, but one is divided over processes; give "
                    "it a stack of an elementwise rule, or do not shard it"
                )
            if p.is_complex():
                raise TypeError(f"a parameter is complex ({p.dtype}); only real ones can be moved")
            if p.layout != torch.strided:
                raise TypeError(f"a parameter is sparse ({p.layout}); only dense ones can be moved")
            if p.dtype.itemsize < 2:
                raise TypeError(f"a parameter is of {p.dtype}, which is too coarse for updates")
            if is_flattened(p):
                raise TypeError(
                    "a parameter is part of a FullyShardedDataParallel, which hides how it is "
                    "divided; use torch.distributed.fsdp.fully_shard"
                )
            if p.device != device:
                raise ValueError(
                    f"parameters on {device} and on {p.device}; make one optimizer for each device"
                )
            if p.device.type == "meta":
                raise ValueError(
                    "the parameters are on the meta device and have no values yet; make the "
                    "optimizer after model.to_empty and the initialization"
                )

    def _check_gradients(self) -> None:
        for p in self.params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise TypeError(
                    f"a gradient is sparse ({p.grad.layout}); only dense ones can be used: "
                    "make the layer with sparse=False"
                )

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"]]

    @property
    def _trained(self) -> list[Tensor]:
        return [p for p in self.params if _is_trained(p)]

    @property
    def device(self) -> torch.device:
        """The device of the first trained parameter. All numbers are on it."""
        frozen = (p for p in self.params if p.device.type != "meta")
        return next((p.device for p in [*self._trained, *frozen]), torch.device("cpu"))

    # A step.

    @outside_modes
    def step(self) -> None:
        """Make one step. If no parameter has a gradient, nothing moves."""
        self._sync(_has_grad)
        active = [[id(p) for p in group["params"] if _has_grad(p)] for group in self.groups]
        if active != self._active or any(shard.is_stale for shard in self._shards):
            self._rebuild_shards(_has_grad)
        if not self._shards:
            return
        try:
            vectors = [shard.read() for shard in self._shards]
        except RuntimeError:
            self._check_gradients()
            raise
        if self._step is None or (self.compile == "auto" and self._steps_made == EAGER_STEPS):
            self._step = self._make_step(vectors)
        self._step(vectors)
        self._steps_made += 1
        for shard in self._shards:
            shard.write()
        self._view.mark_clean()

    def _make_step(self, vectors: Sequence[Vectors]) -> Step:
        step = None
        compile = self.compile is True or (self.compile and self._steps_made >= EAGER_STEPS)
        if compile and not self.is_fake:
            step = compiled_step(self.layout, self._numbers, vectors)
        self.is_compiled = step is not None
        return step or eager_step(self.layout, self._numbers, vectors)

    @outside_modes
    def sync(self) -> None:
        """Apply the user's changes since the last step now, and not in the next step."""
        self._sync()

    def _sync(self, active: Callable[[Tensor], bool] | None = None) -> None:
        """Apply the user's changes to the param groups and to `state` since the last step.

        Args:
            active: tells whether the next step moves a parameter. By default the next step moves
                the same parameters as the last step.

        Raises:
            ValueError: as for `ParamGroupView.sync`, or an entry in `state` does not fit.
        """
        self._sync_groups()
        if self._is_state_shown and not self._is_state_clean():
            moved = {p for shard in self._shards for p in shard.params}
            self._sync_state(active or moved.__contains__)

    def _sync_groups(self) -> None:
        self._is_scaled |= self._view.sync(self.groups)

    def _take_bases(self) -> list[Any]:
        bases = [lr.base for lr in self._view.lrs] if self.is_started else []
        return bases + [1.0] * (len(self.groups) - len(bases))

    # `state`, as users see it.

    @property
    def state(self) -> Any:
        """The rule's state of each parameter, in views; initial before the first step."""
        if self.is_started and not (self._is_state_shown and self._state):
            self._show_first_state()
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        if self.is_started and not self._is_state_shown:
            self._show_first_state()  # entries missing in the new dict then count as deleted
        self._state = state

    @property
    def shown_state(self) -> Any:
        """`state` as it is, without filling it first."""
        return self._state

    def share_state(self, state: Any) -> None:
        """Use another dict as `state`. It must contain all our entries already."""
        self._state = state

    @outside_modes
    def _show_first_state(self) -> None:
        was_cleared, self._is_state_shown = self._is_state_shown, True
        self._sync_groups()
        if was_cleared or not self._shards + self._inactive_shards:
            self._shards, self._inactive_shards = [], []
            for number, group in enumerate(self.groups):
                params = [p for p in group["params"] if p.requires_grad]
                self._inactive_shards += self._new_shards(params, number)
            self._rebuild_layout(self._export())
        self._show_state()

    def _show_state(self) -> None:
        """Put our entries into `state`, and keep the entries of other code.

        The dicts and tensors in `state` stay the same objects, as in torch.optim.
        """
        if not self._is_state_shown:
            return
        views = self._views()
        for p, shown in self._shown.items():
            entries = self._state.get(p, {})
            for name in shown.keys() - views.get(p, {}).keys():
                entries.pop(name, None)
            if p not in views and not entries:
                self._state.pop(p, None)
        before, self._shown = self._shown, {}
        for p, own in views.items():
            entries = self._state.setdefault(p, {})
            for name, place in own.items():
                old, _ = before.get(p, {}).get(name, (None, 0))
                if not place.ndim:  # parameters share it only as long as they share a shard
                    place = place.detach()
                entries[name] = _lay_over(old, place) if entries.get(name) is old else place
            self._shown[p] = {name: (entries[name], _pointer(entries[name])) for name in own}
        self._shown_items = [*self._state.items()]

    def _views(self) -> dict[Tensor, State]:
        shards = self._shards + self._inactive_shards
        return {p: entries for shard in shards for p, entries in shard.by_parameter().items()}

    def _is_state_clean(self) -> bool:
        """Whether `state` has the same objects as before. Edits in place need no action."""
        if len(self._state) != len(self._shown_items):
            return False
        for (p, entries), (q, others) in zip(self._state.items(), self._shown_items, strict=True):
            if p is not q or entries is not others:
                return False
        return all(
            self._state[p].get(name) is tensor and _pointer(tensor) == pointer
            for p, shown in self._shown.items()
            for name, (tensor, pointer) in shown.items()
        )

    def _sync_state(self, active: Callable[[Tensor], bool]) -> None:
        """Apply the user's insertions and deletions in `state`, for the entries of the rule.

        Args:
            active: tells whether the next step moves a parameter.

        Raises:
            ValueError: an entry has a wrong shape, or only some entries of a parameter are there.
        """
        names = [*self.layout.states[0]]
        given: dict[Tensor, dict[str, Any]] = {}
        for p in self.params:
            entries = self._state.get(p, {})
            own = {name: entries[name] for name in names if name in entries}
            if own:
                _check_entries(p, own, self.layout.blocks[0].state_shapes(p), self._rule.name)
                given[p] = own
        edits = [
            (p, name, _as_tensor(value).detach())
            for p, own in given.items()
            for name, value in own.items()
            if not self._is_shown(p, name, value)
        ]
        forgotten = {p for p, shown in self._shown.items() if shown and p not in given}
        if forgotten or given.keys() - self._shown.keys():
            known = self._shown.keys()
            self._rebuild_shards(active, forgotten)
            for number, group in enumerate(self.groups):  # parameters that were not moved yet
                new = [p for p in group["params"] if p in given and p not in known]
                self._inactive_shards += self._new_shards(new, number)
            self._rebuild_layout(self._export())
        views = self._views()
        for p, name, value in edits:
            views[p][name].copy_(value)
        self._show_state()

    def _is_shown(self, p: Tensor, name: str, value: Any) -> bool:
        tensor, pointer = self._shown.get(p, {}).get(name, (None, 0))
        return value is tensor and _pointer(value) == pointer

    def _foreign_state(self) -> defaultdict[Any, Any]:
        """The entries of other code in `state`."""
        names, members = self.layout.states[0].keys(), set(self.params)
        found: defaultdict[Any, Any] = defaultdict(dict)
        for key, entries in self._state.items():
            if isinstance(key, Tensor) and key in members:
                if rest := {n: value for n, value in entries.items() if n not in names}:
                    found[key] = rest
            else:
                found[key] = entries
        return found

    # Reading the hyperparameters.

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the numbers in a `snapshot`."""
        self._sync_groups()
        if not self._is_scaled:
            return self._names
        if len(self.groups) == 1:
            return (*self._names, EFFECTIVE)
        return (*self._names, *(f"{EFFECTIVE}[{i}]" for i in range(len(self.groups))))

    @outside_modes
    def snapshot(self) -> Tensor:
        self._sync_groups()
        if len(self._places) == len(self.layout.names):
            return self.packed[: len(self._names)].clone()
        values, effective = self.packed[self._places], self._numbers.effective_lr
        return torch.cat([values, effective]) if self._is_scaled else values

    @property
    def hypergradients(self) -> Tensor:
        own = [last.g.reshape(-1) for last in self._numbers.hyper_updates]
        return torch.cat([self.packed.new_empty(0), *own])

    @property
    def skipped(self) -> list[int]:
        counts = [int(count) for count in self._numbers.skipped.tolist()]
        return [*counts[:1] * (len(self.given.levels) - len(counts)), *counts]

    # Shards and layout.

    def _rebuild_shards(
        self, active: Callable[[Tensor], bool], forgotten: Collection[Tensor] = ()
    ) -> None:
        """Divide the parameters into shards again.

        This is needed when other parameters than before have a gradient, or when a parameter has
        changed its device, precision or group.

        Args:
            active: tells whether the next step moves a parameter.
            forgotten: the parameters for which the rule starts again.

        Raises:
            ValueError: a group was removed, a shape changed, or a parameter with its own
                hyperparameters changed its position.
        """
        if len(self.groups) < self._known_groups:
            raise ValueError("a param group was removed; make a new optimizer of the others")
        if len(self.groups) > self._known_groups:
            raise ValueError("a param group was added to the list; use add_param_group instead")
        self._check_params(self.params)
        self._check_gradients()
        for shard in self._shards + self._inactive_shards:
            shard.check_shapes()
        exported = self._export()
        numbers = {p: i for i, group in enumerate(self.groups) for p in group["params"]}
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
                    self._finish_last_update(piece)
                piece.owner = self._owner(params[0], number)
                if piece.owner.parameter != shard.owner.parameter:
                    raise ValueError(
                        "a parameter with its own hyperparameters changed its position; replace "
                        "parameters at their positions, or make a new optimizer"
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
        alone = lowest.per_tensor or not lowest.rule.elementwise
        parts = [[p] for p in params] if alone else divide(params)
        return [Shard.new(each, self._owner(each[0], group), lowest) for each in parts]

    def _owner(self, p: Tensor, group: int) -> Owner:
        """The owner of the hyperparameters of a shard whose first parameter is ``p``."""
        if not self.layout.blocks[0].per_tensor:
            return Owner(group)
        return Owner(group, next(i for i, q in enumerate(self.params) if q is p))

    def _finish_last_update(self, shard: Shard) -> None:
        """Replace a shard's last update by the state after it."""
        lowest, numbers = self.layout.blocks[0], self._numbers
        raw = numbers.raw[0][0][shard.owner.places(lowest.tuned)]
        fixed = numbers.last_fixed[shard.owner.places(lowest.fixed)]
        last = shard.last
        if last.g is not None:
            _, after = lowest.rule.update(*last.inputs, lowest.values(raw, fixed))
            applied = last.applied > 0
            state = {n: torch.where(applied, after[n], old) for n, old in last.state.items()}
            shard.last = LastUpdate(last.w, last.g, state, torch.zeros_like(last.applied))
        else:
            state = {name: lowest.skipped(name, value) for name, value in last.state.items()}
            shard.last = last._replace(state=state)

    def _export(self) -> list[dict[str, Any]]:
        return checkpoint.export(self.layout, self._numbers)

    def _rebuild_layout(
        self, saved: Sequence[dict[str, Any]] = (), bases: list[Any] | None = None
    ) -> None:
        """Make the layout and `packed` for the current param groups and shards.

        Args:
            saved: the result of `_export`; empty to use the initial values.
            bases: `ScaledLr.base` of each group; by default the current ones.
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
            processes(self._trained),
        )
        self._step = None
        device = self.device
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
        bases = self._take_bases() if bases is None else bases
        self._known_groups = len(self.groups)
        hidden = (FACTOR, "lr") if self.stack is not self.given else (FACTOR,)
        shown = [
            i
            for i, name in enumerate(self.layout.names)
            if name.partition("[")[0] not in [f"0.{own}" for own in hidden]
        ]
        self._places = shown
        self._names = tuple(self._public_names(self.layout.names[i] for i in shown))
        self._view = ParamGroupView(self.groups, stack, self.layout, self.packed, bases)
        group_of = {p: shard.owner.group for shard in self._shards for p in shard.params}
        self._active = [
            [id(p) for p in group["params"] if group_of.get(p) == i]
            for i, group in enumerate(self.groups)
        ]
        self._show_state()

    def _public_names(self, names: Iterable[str]) -> Iterable[str]:
        """Convert names of the layout to public names: with parameter names if they are unique."""
        named = [name for group in self.groups for name in group.get("param_names", [])]
        times = Counter(named)
        if self.stack is not self.given:  # the two lowest levels are one rule
            names = map(_unfolded, names)
        by_place = {f"[p{i}]": f"[{name}]" for i, name in enumerate(named) if times[name] == 1}
        return (
            re.sub(r"\[p\d+\]$", lambda place: by_place.get(place[0], place[0]), name)
            for name in names
        )

    # Checkpoints.

    @outside_modes
    def save(self) -> dict[str, Any]:
        """Make the state_dict, without hooks."""
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
        number = {p: i for i, p in enumerate(self.params)}
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
        for saved, lr in zip(saved_groups, self._view.lrs, strict=False):
            saved["lr_base"] = float(lr.base)
        # Everything else goes into a group: torch.distributed.checkpoint saves nothing else.
        saved_groups[0]["tower"] = {
            "format": checkpoint.FORMAT,
            "steps_made": self._steps_made,
            "stack": str(self.stack),
            "on": self._active_hypers,
            "levels": self._export(),
        }
        state: dict[Any, Any] = checkpoint.save_shards(self._shards, self._inactive_shards, number)
        for key, entries in self._foreign_state().items():
            if isinstance(key, Tensor) and key in number:
                checkpoint.add_foreign(state.setdefault(number[key], {}), entries)
            elif not isinstance(key, Tensor):
                state[key] = entries
        return {"state": state, "param_groups": saved_groups}

    def load(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `save`. If it raises, the engine is unchanged.

        Raises:
            ValueError: the state_dict does not fit.
        """
        self.apply(self.read(state_dict))

    @outside_modes
    def read(self, state_dict: dict[str, Any]) -> tuple:
        """Check a state_dict and prepare it for `apply`. The engine does not change.

        Raises:
            ValueError: the state_dict does not fit.
        """
        state_dict = checkpoint.upgrade(state_dict)
        params = [group["params"] for group in self.groups]
        names = self.layout.states[0].keys()
        lowest = self.layout.blocks[0]
        checkpoint.check(state_dict, self.stack, self._active_hypers, params, names, lowest)
        entries = checkpoint.by_number(state_dict, names)
        foreign, others = checkpoint.foreign(state_dict, names)
        try:
            shards = checkpoint.load_shards(entries, params, lowest)
        except KeyError as missing:
            raise ValueError(f"this state is incomplete: a parameter has no {missing}") from None
        return shards, copy.deepcopy(state_dict["param_groups"]), foreign, others

    @outside_modes
    def apply(self, found: tuple) -> None:
        """Continue from the result of `read`."""
        (self._shards, self._inactive_shards), saved_groups, foreign, others = found
        lowest = self.layout.blocks[0]
        self._overrides = [frozenset(group.pop("own", ())) for group in saved_groups]
        tower = saved_groups[0].pop("tower")
        # Version 0.1 compiled from the first step on.
        self._steps_made = tower.get("steps_made", EAGER_STEPS)
        bases = [group.pop("lr_base", None) for group in saved_groups]
        lrs = [group["lr"] for group in saved_groups] if lowest.lr_slots else []
        for group, saved in zip(self.groups, saved_groups, strict=True):
            names_of_params = {name: group[name] for name in group if name == "param_names"}
            saved |= {"params": group["params"], **names_of_params}
            group.clear()
            group.update(saved)
        for i, (base, lr) in enumerate(zip(bases, lrs, strict=False)):
            if base is None:  # from a version in which schedulers did not scale a tuned lr
                start = saved_groups[i].get("initial_lr")
                bases[i] = float(start) / lr if start and isinstance(lr, float) and lr else 1.0
        self._shown = {}
        self._state.clear()
        everyone = self.params
        for i, kept in foreign.items():
            self._state[everyone[i]] = checkpoint.like_parameter(everyone[i], kept)
        self._state.update(others)
        self._rebuild_layout(tower["levels"], bases)
        factors = [float(lr.factor) for lr in self._view.lrs]
        self._is_scaled = any(factor != 1 for factor in factors)
        for group, lr in zip(self.groups, lrs, strict=False):
            if "initial_lr" in group or not isinstance(lr, float):
                continue
            if not math.isclose(lr, float(group["lr"]), rel_tol=1e-6):
                group["lr"] = lr  # the user edited it in the state_dict
        self._sync_groups()

    @property
    def _active_hypers(self) -> list[str]:
        return [name for name in self._rule.hypers if self._rule.is_active(name)]


def _unfolded(name: str) -> str:
    """Convert a name of the stack that `fold` made to a name of the original stack."""
    level, _, rest = name.partition(".")
    if level != "0":
        return f"{int(level) + 1}.{rest}"
    return rest if rest.startswith("1.") else name


def _has_grad(p: Tensor) -> bool:
    return p.grad is not None


def _is_trained(p: Tensor) -> bool:
    return p.requires_grad or p.grad is not None


def _pointer(tensor: Any) -> int:
    """The memory address of a tensor; 0 for a fake tensor."""
    return 0 if is_fake([tensor]) else local(tensor).data_ptr()


def _lay_over(old: Any, place: Tensor) -> Tensor:
    """Let the tensor ``old`` use the memory of ``place``. Returns ``place`` if it cannot."""
    if old is None or local(place) is not place or old.device != place.device:
        return place
    old.data = place
    return old


def _check_entries(
    p: Tensor, own: Mapping[str, Any], shapes: Mapping[str, torch.Size], rule: str
) -> None:
    """Raise a ValueError unless these entries fit as the state of a parameter.

    Args:
        p: the parameter.
        own: the entries.
        shapes: the shapes of the rule's state.
        rule: the name of the rule.
    """
    needed = ", ".join(f"{name} of {[*shape]}" for name, shape in shapes.items())
    for name, shape in shapes.items():
        found = _as_tensor(own[name]).shape if name in own else None
        if found != shape:
            wrong = "is missing in" if found is None else f"of {[*found]} was put into"
            raise ValueError(
                f"{name!r} {wrong} the state of a parameter of {[*p.shape]}; {rule} needs {needed}"
            )


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def _number(value: Any) -> float | list[float]:
    """Convert a value of a param group to a number, or to a list with one for each tensor."""
    return value.tolist() if isinstance(value, Tensor) else float(value)
