"""The static structure of a stack: blocks of levels, and slots for hyperparameter values."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from ..estimators import Estimator
from ..rule import Rule, Stack, State
from .torch_private import make_fx, tree_leaves

# Names of the engine's own entries in a state or state_dict. A rule's state cannot have them.
RESERVED = {"w", "g", "moved", "log_lr_limit", "shape", "shard", "active"}
RESERVED |= {"last_grad", "last_weight", "last_square"}
PREFIXES = ("sensitivity_", "horizon_")


# The factor by which a scheduler scales a tuned lr: one constant slot for each param group.
FACTOR = "lr_factor"


@dataclass(frozen=True)
class Slot:
    """One value of a hyperparameter, shared by all that the level moves, or for one owner.

    On level 0 the owner is the number of a param group, or a parameter such as ``"p3"``, the
    fourth one. On higher levels it is the name of a hyperparameter below.
    """

    name: str
    owner: int | str | None = None

    def __str__(self) -> str:
        return self.name if self.owner is None else f"{self.name}[{self.owner}]"


def names_of(slots: Iterable[Slot]) -> list[str]:
    """The names of the hyperparameters of these slots, without duplicates."""
    return list(dict.fromkeys(slot.name for slot in slots))


@dataclass(frozen=True)
class Owner:
    """The owner of the hyperparameters that move a shard: a param group, or one parameter."""

    group: int
    parameter: int | None = None

    def places(self, slots: Sequence[Slot]) -> list[int]:
        """The index of this owner's slot among the slots, for each hyperparameter."""
        mine = (f"p{self.parameter}", self.group, None)
        candidates = ([Slot(name, owner) for owner in mine] for name in names_of(slots))
        return [slots.index(next(s for s in each if s in slots)) for each in candidates]


@dataclass(frozen=True)
class Block:
    """The static structure of adjacent levels that differ only in numbers; often a single level.

    One computation handles all levels of a block. So a tall tower of one rule takes little more
    work to differentiate, and to compile, than a low one. The lowest level is a block of its own.

    Attributes:
        rule: the rule of each level. Its initial values are not used.
        tuned: the slots of the raw values, which the level above moves. Slots of one hyperparameter
            are adjacent.
        fixed: the slots of the constants, grouped in the same way.
        below: for each element that is moved, the name of its hyperparameter. Empty on level 0,
            which moves weights.
        keeps_weights: whether recomputing the last update needs the weights before it.
        above: the rule that moves the raw values; None for the top level.
        count: the number of levels.
        lr_slots: on level 0 with a tuned lr, for each param group, the range (first, end) of the
            slots of its lr in ``tuned``.
    """

    rule: Rule
    tuned: tuple[Slot, ...]
    fixed: tuple[Slot, ...]
    below: tuple[str, ...]
    keeps_weights: bool
    above: Rule | None = None
    count: int = 1
    lr_slots: tuple[tuple[int, int], ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of the tuned hyperparameters. Each owner has one value for each name."""
        return names_of(self.tuned)

    @property
    def estimator(self) -> Estimator:
        """The estimator of the level above, for the hypergradients of this level."""
        return Estimator() if self.above is None else self.above.policy.estimator

    @property
    def is_lowest(self) -> bool:
        return not self.below

    @property
    def stores_sensitivities(self) -> bool:
        """Whether level 0 stores its sensitivities, and does not recompute the last update.

        A long horizon needs this, since it accumulates the sensitivities of many steps. For a rule
        that is not elementwise, storing a vector for each hyperparameter is cheaper than running
        the rule twice.
        """
        needed = self.estimator.horizon > 1 or not self.rule.elementwise
        return bool(self.tuned) and self.is_lowest and needed

    @property
    def recomputes(self) -> bool:
        """Whether level 0 recomputes its last update, and therefore stores its gradient."""
        return bool(self.tuned) and self.is_lowest and not self.stores_sensitivities

    @property
    def has_trust(self) -> bool:
        """Whether this level bounds the updates of the weights."""
        return "trust" in self.rule.hypers

    @property
    def is_bounded(self) -> bool:
        """Whether the level above bounds the updates that this level makes."""
        return self.above is not None and "trust" in self.above.hypers

    @property
    def rows(self) -> int:
        """The number of sums that a shard computes for each tuned hyperparameter of level 0."""
        estimator = self.estimator
        return 1 + 2 * estimator.normalize + estimator.surrogate + 2 * self.is_bounded

    @property
    def per_tensor(self) -> bool:
        """Whether, on level 0, each tensor has its own values, and is therefore its own shard."""
        return self.is_lowest and any(isinstance(slot.owner, str) for slot in self.tuned)

    def init(self, w: Tensor) -> State:
        """The state before the first update of ``w``: that of the rule and of its policy."""
        state = self.rule.init(w)
        if self.has_trust and self.tuned:
            state["log_lr_limit"] = torch.zeros_like(w)
        return (
            {**state, **self.estimator.init(self.names, w)} if self.stores_sensitivities else state
        )

    def skipped(self, name: str, old: Tensor) -> Tensor:
        """An entry of the state after a skipped step.

        It does not change, except for a sensitivity to the last step only, which becomes 0.

        Args:
            name: the name of the entry.
            old: its value before the step.
        """
        forgotten = name.startswith("sensitivity_") and self.estimator.horizon == 1
        return torch.zeros_like(old) if forgotten else old

    def state_shapes(self, p: Tensor) -> dict[str, torch.Size]:
        """The shapes of the entries of the initial state of a parameter."""
        if self.rule.elementwise:
            state = self.init(torch.empty(1, device="meta"))
            return {name: p.shape if value.ndim else value.shape for name, value in state.items()}
        state = self.init(torch.empty(p.shape or (1,), device="meta"))
        return {name: value.shape for name, value in state.items()}

    def update(
        self, w: Tensor, g: Tensor, state: State, raw: Tensor, fixed: Tensor
    ) -> tuple[Tensor, State]:
        """Apply this level's rule to the raw hyperparameters below it.

        If this level has trust and a level above it, ``state["log_lr_limit"]`` is the log lr at
        which the norm of an update of the weights equals the norm of the weights.

        Args:
            w, g: the raw hyperparameters below, and their hypergradients.
            state: the state of the rule.
            raw, fixed: this level's own hyperparameters, [slots].
        """
        h = self.values(raw, fixed)
        new, after = self.rule.update(w, g, state, h)
        if "log_lr_limit" in state:
            limit = state["log_lr_limit"] + torch.log(h.trust)
            new = torch.where(new > limit, limit, new)
            after = {**after, "log_lr_limit": state["log_lr_limit"]}
        return new, after

    def values(self, raw: Tensor, fixed: Tensor) -> SimpleNamespace:
        """The namespace h that the rule reads.

        Args:
            raw, fixed: on level 0 the values of one owner, one for each name; otherwise [slots].
        """
        found: dict[str, Tensor] = {}
        for slots, numbers in ((self.tuned, self.from_raw(raw)), (self.fixed, fixed)):
            if self.is_lowest:
                found |= zip(names_of(slots), numbers, strict=True)
            else:
                found |= {name: self._spread(name, slots, numbers) for name in names_of(slots)}
        if FACTOR in found:
            found["lr"] = found["lr"] * found.pop(FACTOR)
        return SimpleNamespace(**found)

    def learned_lr(self, values: Tensor) -> Tensor:
        """The tuned lr of each param group, [groups]. With an lr per tensor, it is their mean.

        Args:
            values: the values of the tuned hyperparameters of level 0.
        """
        if any(end > first + 1 for first, end in self.lr_slots):
            return torch.stack([values[first:end].mean() for first, end in self.lr_slots])
        pieces = []
        for _, run in itertools.groupby(
            enumerate(self.lr_slots), lambda item: item[1][0] - item[0]
        ):
            slots = [slot for _, slot in run]
            pieces.append(values[slots[0][0] : slots[-1][1]])
        return torch.cat(pieces) if pieces else values[:0]

    def effective_lr(self, values: Tensor, fixed: Tensor) -> Tensor:
        """The lr that the rule uses for each param group, [groups]: the learned lr, scaled."""
        factors = fixed[len(fixed) - len(self.lr_slots) :]
        return self.learned_lr(values) * factors

    def from_raw(self, raw: Tensor) -> Tensor:
        """h = T(r), each in its domain. ``raw`` has the values of one owner, or is [..., slots]."""
        names = [slot.name for slot in self.tuned]
        if raw.shape[-1] != len(names):
            names = self.names
        parts, start = [], 0
        for domain, run in itertools.groupby(names, lambda name: self.rule.tuned[name].domain):
            end = start + len(list(run))
            parts.append(domain.value(raw[..., start:end]))
            start = end
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0] if parts else raw

    def _spread(self, name: str, slots: Sequence[Slot], numbers: Tensor) -> Tensor:
        """A hyperparameter's values for all elements below, or a shared value, 0-dim."""
        mine = [i for i, slot in enumerate(slots) if slot.name == name]
        if slots[mine[0]].owner is None:
            return numbers[mine[0]]
        by_owner = {slots[i].owner: numbers[i] for i in mine}
        runs = [(owner, len(list(run))) for owner, run in itertools.groupby(self.below)]
        return torch.cat([by_owner[owner].expand(count) for owner, count in runs])

    @property
    def kind(self) -> tuple:
        """The key of a shard's kernels: lowest levels of equal kind share compiled kernels."""
        rule = self.rule
        return (
            type(rule),
            tuple(rule.settings.items()),
            tuple((name, how.domain) for name, how in rule.tuned.items()),
            tuple(name for name in rule.hypers if rule.is_active(name)),
            (self.estimator if self.tuned else None, self.is_bounded),
            bool(self.tuned),
            self.keeps_weights,
        )

    @property
    def structure(self) -> tuple:
        """The key of a block: blocks of equal structure differ only in numbers."""
        return *self.kind, self.tuned, self.fixed, self.below, self.count, self.lr_slots


def build(
    stack: Stack,
    overrides: Sequence[frozenset[str]] = (frozenset(),),
    counts: Sequence[int] = (1,),
) -> tuple[Block, ...]:
    """Build the blocks of a stack for given param groups.

    Args:
        stack: the stack.
        overrides: for each param group, the hyperparameters of the lowest level that it overrides.
            Groups share a tuned hyperparameter that they do not override, unless its scope is per
            group or per tensor.
        counts: for each param group, the number of its parameters.

    Raises:
        ValueError, TypeError: as for `check_rule`.
    """
    blocks: list[Block] = []
    for k, rule in enumerate(stack.levels):
        top = k == stack.height
        check_rule(rule)
        tuned: list[Slot] = []
        fixed: list[Slot] = []
        for name in rule.hypers:
            if k == 0:
                owners = _owners(rule, name, top, overrides, counts)
            else:
                value = rule.values[name]
                owners = list(value) if isinstance(value, dict) else [None]
            slots = tuned if name in rule.tuned and not top else fixed
            slots += [Slot(name, owner) for owner in owners]
        lr_slots: tuple[tuple[int, int], ...] = ()
        if k == 0 and any(slot.name == "lr" for slot in tuned):
            groups = range(len(counts))
            fixed += [Slot(FACTOR, g if len(groups) > 1 else None) for g in groups]
            lr_slots = tuple(_lr_slots(tuned, counts))
        below = tuple(slot.name for slot in blocks[-1].tuned) if k else ()
        above = None if top else stack.levels[k + 1]
        block = Block(rule, tuple(tuned), tuple(fixed), below, False, above, lr_slots=lr_slots)
        if (
            tuned
            and not block.stores_sensitivities
            and (block.has_trust or depends_on_weights(rule))
        ):
            block = replace(block, keeps_weights=True)
        if k > 1 and replace(blocks[-1], count=1).structure == block.structure:
            blocks[-1] = replace(blocks[-1], count=blocks[-1].count + 1)
        else:
            blocks.append(block)
    return tuple(blocks)


def _owners(
    rule: Rule,
    name: str,
    top: bool,
    overrides: Sequence[frozenset[str]],
    counts: Sequence[int],
) -> list[int | str | None]:
    """The owners of a hyperparameter of the lowest level. None stands for all other groups."""
    groups = range(len(overrides))
    how = rule.tuned.get(name) if not top else None
    if how is not None and how.per == "tensor":
        return [f"p{i}" for i in range(sum(counts))]
    if how is not None and how.per == "group":
        return [*groups]
    if len(groups) == 1:
        return [None]
    own: list[int | str | None] = [g for g in groups if name in overrides[g] or how is None]
    return own if len(own) == len(groups) else [None, *own]


def _lr_slots(tuned: Sequence[Slot], counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """For each param group, the range (first, end) of the slots of its lr.

    A group without parameters gets the range of all others.
    """
    places = {slot.owner: i for i, slot in enumerate(tuned) if slot.name == "lr"}
    first = 0
    for group, count in enumerate(counts):
        if f"p{first}" in places and count:
            yield places[f"p{first}"], places[f"p{first}"] + count
        elif group in places or None in places:
            place = places[group if group in places else None]
            yield place, place + 1
        else:
            yield min(places.values()), max(places.values()) + 1
        first += count


@functools.lru_cache(256)
def check_rule(rule: Rule) -> None:
    """Test a rule on three weights.

    Raises:
        ValueError: an entry of its state has a reserved name, or a wrong shape or dtype; or an
            update does not return the new weights and state.
        TypeError: it has other attributes than hyperparameters and options.
    """
    for name in vars(rule).keys() - vars(Rule()).keys() - {"hypers"}:
        raise TypeError(
            f"{rule.name}: {name} is an attribute of this one object, and the notation and "
            f"compiled steps ignore it; declare it in the class, as {name} = Option(...)"
        )
    if FACTOR in rule.hypers:
        raise ValueError(f"{rule.name}: a hyperparameter cannot be called {FACTOR!r}; it is taken")
    with torch.device("cpu"):
        w = rule.example()
        state = rule.init(w)
        for name, value in state.items():
            if name in RESERVED or name.startswith(PREFIXES):
                raise ValueError(
                    f"{rule.name}: its state cannot have the name {name!r}; taken are "
                    f"sensitivity_..., horizon_... and {', '.join(sorted(RESERVED))}"
                )
            fits = value.shape in (w.shape, ()) or not rule.elementwise
            if not value.is_floating_point() or not fits:
                raise ValueError(
                    f"{rule.name}: its state's {name!r} must be a floating-point tensor of the "
                    f"weights' shape, or 0-dim, not {value.dtype} of {[*value.shape]} for 3 weights"
                )
        half = {name: torch.tensor(0.5, dtype=torch.float64) for name in rule.hypers}
        result = rule.update(w, w.clone(), state, SimpleNamespace(**half))
    expected = f"the new weights and a state of {', '.join(map(repr, state)) or 'no entries'}"
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ValueError(f"{rule.name}: update must return {expected}, as a tuple of two")
    if result[0].shape != w.shape or result[1].keys() != state.keys():
        raise ValueError(
            f"{rule.name}: update must return {expected}, not weights of {[*result[0].shape]} for "
            f"those of {[*w.shape]} and a state of "
            f"{', '.join(map(repr, result[1])) or 'no entries'}"
        )


@functools.lru_cache(256)
def depends_on_weights(rule: Rule) -> bool:
    """Whether the change that an update makes to ``w`` depends on ``w``.

    Only such rules need the weights before the last step. The function traces the update. The
    change does not depend on ``w`` if the graph uses ``w`` only as a term of sums that lead to the
    new weights. If the update cannot be traced, the answer is yes.
    """

    def update(w: Tensor, g: Tensor, state: State, h: State) -> tuple[Tensor, State]:
        return rule.update(w, g, state, SimpleNamespace(**h))

    with torch.device("cpu"):  # not the default device
        w, g = rule.example(), rule.example()
        h = {name: torch.tensor(0.5, dtype=torch.float64) for name in rule.hypers}
        try:
            graph = make_fx(update, tracing_mode="fake")(w, g, rule.init(w), h).graph
        except Exception:  # such as a branch on the values of a tensor
            return True
    node = next(iter(graph.nodes))
    (result,) = graph.output_node().args
    new, *rest = tree_leaves(result)
    while node is not new:
        add, sub = torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor
        users = [*node.users]
        if len(users) != 1 or users[0].target not in (add, sub):
            return True
        left, right = users[0].args
        if left is right or (right is node and users[0].target is sub):
            return True
        node = users[0]
    return len(node.users) > 1 or node in rest
