"""The pure step of a whole stack: tensors in, tensors out.

One step of a stack of height n, with weights w, gradient G, rules U_k, raw hyperparameters r_k and
state s_k (level 0 moves the weights):

1. Hypergradients, bottom up. The last step made w = U_0(w', G', s_0'; T(r_0)), so
   dr_0 = G^T dU_0/dr_0 at those previous values, and dr_k = dr_{k-1}^T dU_k/dr_k in the same way.
2. Hyperparameters, top down: r_{k-1} <- U_k(r_{k-1}, dr_{k-1}, s_k; T(r_k)), r_k being the new one.
3. Weights: w <- U_0(w, G, s_0; T(r_0)), r_0 being the new one.

Everything older than one step is a constant, and so is G: no second derivative of the model is
needed (Chandra et al. 2022, section 2).

A level therefore keeps what its rule read at the last step, its `Move`, and not what the rule
returned: the next step runs the rule again on the same inputs, which gives both the state to go on
from and, by reverse-mode differentiation, the hypergradients. This costs one copy of the gradient
and, for rules whose update depends on the weights themselves, one of the weights. Weights whose
rule nobody tunes need none of this: their level keeps the state alone. So does one whose
hypergradients reach further back than one step, which are taken with what the moves have added up
to: there each move's derivative is added as it is made, and nothing is run again.

What is not finite stops where it arises: a level whose gradient holds an infinity or NaN, or whose
move would lead to one, stays as it is for this step, state included, and counts that. On level 0 it
is the gradient alone that is looked at, and its square, which most rules keep and which overflows
in float32 from 1.8e19 on; where the weights stay, all else does. (A plain stack, of height 0, does
what `torch.optim` does, and passes it on.)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .rule import Rule, State
from .stack import Stack

# Weights of a root mean square below this are taken to be of it where an update is bounded by their
# norm, so that those that start at 0 can be moved (epsilon_2 of Shazeer and Stern 2018, Adafactor).
SMALL = 1e-3

# Up to so many units in the last place of its terms, a derivative is what rounding has left of 0: a
# beta does not matter to the first step, and the cosine of that would be one of noise. Such remains
# were found to be below 1, and other derivatives of betas, in float32, above 5000.
ROUNDING = 16

# Where a hyperparameter has fallen to this share of the most that it has been on the way over which
# its derivatives are added up, the way begins anew. What was added while it was larger would decide
# for ever which sign the hypergradient has, and no further fall could change that.
ANEW = 1e-3

# What else is kept beside a rule's state, there or in a state_dict, and so cannot be its name.
RESERVED = {"w", "g", "moved", "room", "shape", "shard", "active", "last_grad", "last_weight"}

# A raw value that none is bounded by. All that is kept has to be finite.
ROOMY = 1e300


class Move(NamedTuple):
    """What a rule read when it last moved one vector of n weights.

    Attributes:
        w: the weights before the move, [n]; None where the update does not depend on them.
        g: the gradient, [n]; None if nobody will ask.
        state: the state before the move; with no ``g``, the state to go on from.
        moved: 1, or 0 where the last step left the move out, or there was none: ``state`` is then
            the state to go on from, and ``w`` and ``g`` mean nothing.
    """

    w: Tensor | None
    g: Tensor | None
    state: State
    moved: Tensor


class TowerState(NamedTuple):
    """Everything that a stack remembers from one step to the next.

    Attributes:
        raw: per block, the raw values of the tuned hyperparameters, [levels, tuned slots].
        bounds: per block, the lowest and the highest raw values, [2, levels, tuned slots].
        fixed: per block, the values of the others, [levels, fixed slots].
        last_fixed: those of the lowest level when it last moved, since they may be set from outside
            between two steps.
        steps: how many steps were made, 0-dim.
        skipped: how many moves each level has left out since something was not finite, [levels].
        lowest: the last move of each shard of the weights.
        upper: per block but the lowest, the last moves of the raw values below, as one `Move` whose
            tensors have one row for each level.
    """

    raw: tuple[Tensor, ...]
    bounds: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    last_fixed: Tensor
    steps: Tensor
    skipped: Tensor
    lowest: tuple[Move, ...]
    upper: tuple[Move, ...]


@dataclass(frozen=True)
class Slot:
    """One value of a hyperparameter: for everything that the level moves, or for one owner alone.

    On level 0 an owner is the number of a param group, or a parameter, the fourth as ``"p3"``;
    above, the name of a hyperparameter below.
    """

    name: str
    owner: int | str | None = None

    def __str__(self) -> str:
        return self.name if self.owner is None else f"{self.name}[{self.owner}]"


@dataclass(frozen=True)
class Owner:
    """Whose hyperparameters a shard of weights is moved by: a param group, or one parameter."""

    group: int
    parameter: int | None = None

    def among(self, slots: Sequence[Slot]) -> list[int]:
        """The places of this owner's values, one for each name, in the order of the slots."""
        names = dict.fromkeys(slot.name for slot in slots)
        mine = (f"p{self.parameter}", self.group, None)
        candidates = ([Slot(name, owner) for owner in mine] for name in names)
        return [slots.index(next(s for s in each if s in slots)) for each in candidates]


@dataclass(frozen=True)
class Block:
    """The static shape of equal levels that stand on each other, mostly of one level alone.

    Levels are equal if they differ in numbers only. A tall tower of one rule is then little more
    work to differentiate, and to compile, than a low one. The lowest level is a block of its own.

    Attributes:
        rule: what each level computes. Its initial values are not used.
        tuned: the slots of the raw values, which the level above moves; those of one name stand
            together.
        fixed: the slots of the constants, in the same way.
        below: the names of the hyperparameters that are moved, element by element; on level 0,
            which moves weights, nothing.
        depends_on_weights: whether `Move.w` is kept.
        above: the rule that moves the raw values; None on top.
        count: the number of levels.
    """

    rule: Rule
    tuned: tuple[Slot, ...]
    fixed: tuple[Slot, ...]
    below: tuple[str, ...]
    depends_on_weights: bool
    above: Rule | None = None
    count: int = 1

    @property
    def names(self) -> list[str]:
        """The names of the tuned hyperparameters: one owner has one of each."""
        return _names(self.tuned)

    def init(self, w: Tensor) -> State:
        """The state before the first update of ``w``: the rule's, the paths of `advance`, and what
        a bound that is tuned stands on in `update`."""
        state = self.rule.init(w)
        if self.bounds_updates and self.tuned:
            state["room"] = torch.zeros_like(w)
        if self.horizon > 1:
            state |= {f"path_{name}": torch.zeros_like(w) for name in self.names}
            numbers = ("path_length", *(f"path_most_{name}" for name in self.names))
            state |= {name: torch.zeros((), dtype=torch.float64) for name in numbers}
        return state

    @property
    def horizon(self) -> float:
        """Over how many steps the level above takes the hypergradient, if it moves weights."""
        if self.above is None or self.below or not self.tuned:
            return 1
        return self.above.horizon

    @property
    def reruns(self) -> bool:
        """Whether the last move of weights is run again, for which its gradient is kept."""
        return bool(self.tuned) and not self.below and self.horizon == 1

    @property
    def normalize(self) -> bool:
        return self.above is not None and self.above.normalize

    @property
    def bounds_updates(self) -> bool:
        """Whether it lets the lowest rule's updates grow to a share of the weights only."""
        return "trust" in self.rule.hypers

    @property
    def bounded(self) -> bool:
        """Whether the level above does so with what this one moves."""
        return self.above is not None and "trust" in self.above.hypers

    @property
    def sums(self) -> int:
        """How many numbers `replay` returns for each hyperparameter."""
        return 1 + 2 * self.normalize + 2 * self.bounded

    def update(
        self, w: Tensor, g: Tensor, state: State, raw: Tensor, fixed: Tensor
    ) -> tuple[Tensor, State]:
        """Where a level above the lowest moves what is below it, as its hyperparameters have it.

        Where its bound is tuned, ``state["room"]`` is how large the raw values might become, were
        an update to be as large as the weights.
        """
        h = self.values(raw, fixed)
        new, after = self.rule.update(w, g, state, h)
        if "room" in state:
            most = state["room"] + torch.log(h.trust)
            new, after = torch.where(new > most, most, new), {**after, "room": state["room"]}
        return new, after

    def places(self, own: Sequence[int]) -> list[int]:
        """Where what `replay` returns for the slots of one owner stands among that of all."""
        return [row * len(self.tuned) + place for row in range(self.sums) for place in own]

    def values(self, raw: Tensor, fixed: Tensor) -> SimpleNamespace:
        """The namespace h that the rule reads.

        Args:
            raw, fixed: on level 0 the values of one owner, one for each name; above, [slots].
        """
        found: dict[str, Tensor] = {}
        for slots, numbers in ((self.tuned, self.numbers(raw)), (self.fixed, fixed)):
            if self.below:
                found |= {name: self._spread(name, slots, numbers) for name in _names(slots)}
            else:
                found |= zip(_names(slots), numbers, strict=True)
        return SimpleNamespace(**found)

    def numbers(self, raw: Tensor) -> Tensor:
        """The values of the raw ones: T, each in its domain; of one owner, or [..., slots]."""
        names = [slot.name for slot in self.tuned]
        if raw.shape[-1] != len(names):
            names = _names(self.tuned)
        parts, start = [], 0
        for domain, run in itertools.groupby(names, lambda name: self.rule.tuned[name].domain):
            end = start + len(list(run))
            parts.append(domain.value(raw[..., start:end]))
            start = end
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0] if parts else raw

    def _spread(self, name: str, slots: Sequence[Slot], numbers: Tensor) -> Tensor:
        """A hyperparameter's value for each element below, or the one for all of them, 0-dim."""
        mine = [i for i, slot in enumerate(slots) if slot.name == name]
        if slots[mine[0]].owner is None:
            return numbers[mine[0]]
        by_owner = {slots[i].owner: numbers[i] for i in mine}
        runs = [(owner, len(list(run))) for owner, run in itertools.groupby(self.below)]
        return torch.cat([by_owner[owner].expand(count) for owner, count in runs])

    @property
    def by_tensor(self) -> bool:
        """Whether, on level 0, tensors have values of their own, so that each is a shard."""
        return not self.below and any(isinstance(slot.owner, str) for slot in self.tuned)

    def structure(self) -> tuple:
        """What tells two blocks apart but for numbers; equal structures share a compiled step."""
        rule = self.rule
        return (
            type(rule),
            tuple(rule.settings.items()),
            tuple((name, how.domain.name) for name, how in rule.tuned.items()),
            tuple(name for name in rule.hypers if rule.on(name)),
            (self.horizon, self.normalize, self.bounded),
            self.tuned,
            self.fixed,
            self.below,
            self.depends_on_weights,
            self.count,
        )


def _names(slots: Sequence[Slot]) -> list[str]:
    return list(dict.fromkeys(slot.name for slot in slots))


def build(
    stack: Stack,
    overrides: Sequence[frozenset[str]] = (frozenset(),),
    counts: Sequence[int] = (1,),
) -> tuple[Block, ...]:
    """The blocks of a stack whose weights come in param groups.

    Args:
        overrides: for each param group, the hyperparameters of the lowest level for which it has a
            value of its own. One that is tuned and not overridden is shared by the groups, unless
            its tuning says otherwise.
        counts: for each param group, the number of its parameters.

    Raises:
        ValueError, TypeError: as `check` does.
    """
    groups = range(len(overrides))
    blocks: list[Block] = []
    for k, rule in enumerate(stack.levels):
        top = k == stack.height
        check(rule)
        tuned: list[Slot] = []
        fixed: list[Slot] = []
        for name in rule.hypers:
            owners: list[int | str | None] = [None]
            value = rule.values[name]
            if k > 0 and isinstance(value, dict):
                owners = list(value)
            elif k == 0:
                how = rule.tuned.get(name) if not top else None
                if how is not None and how.per == "tensor":
                    owners = [f"p{i}" for i in range(sum(counts))]
                elif how is not None and how.per == "group":
                    owners = [*groups]
                elif len(groups) > 1:
                    owners = [g for g in groups if name in overrides[g] or how is None]
                    if len(owners) < len(groups):
                        owners.insert(0, None)
            slots = tuned if name in rule.tuned and not top else fixed
            slots += [Slot(name, owner) for owner in owners]
        below = tuple(slot.name for slot in blocks[-1].tuned) if k else ()
        above = None if top else stack.levels[k + 1]
        block = Block(rule, tuple(tuned), tuple(fixed), below, False, above)
        if tuned and block.horizon == 1 and (block.bounds_updates or depends_on_weights(rule)):
            block = replace(block, depends_on_weights=True)
        if k > 1 and replace(blocks[-1], count=1).structure() == block.structure():
            blocks[-1] = replace(blocks[-1], count=blocks[-1].count + 1)
        else:
            blocks.append(block)
    return tuple(blocks)


@functools.lru_cache(256)
def check(rule: Rule) -> None:
    """Try a rule out on three weights.

    Raises:
        ValueError: its state is not such as can be kept, or has a name that means something else;
            or an update does not return what it should.
        TypeError: it has attributes beside its hyperparameters and options.
    """
    for name in vars(rule).keys() - vars(Rule()).keys() - {"hypers"}:
        raise TypeError(
            f"{rule.name}: {name} is an attribute of this one object, of which neither the "
            f"notation nor a compiled step knows; declare it in the class, as {name} = Option(...)"
        )
    with torch.device("cpu"):
        w = torch.linspace(0.1, 0.9, 3)
        state = rule.init(w)
        for name, value in state.items():
            if name in RESERVED or name.startswith("path_"):
                raise ValueError(
                    f"{rule.name}: its state cannot have the name {name!r}; taken are path_... and "
                    f"{', '.join(sorted(RESERVED))}"
                )
            if not value.is_floating_point() or value.shape not in (w.shape, ()):
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
            f"those of [3] and a state of {', '.join(map(repr, result[1])) or 'no entries'}"
        )


@functools.lru_cache(256)
def depends_on_weights(rule: Rule) -> bool:
    """Whether an update is more than ``w`` minus something that does not depend on ``w``.

    Asked of the derivative at random points: only such rules need the weights of the last step.
    """
    with torch.device("cpu"):  # whatever the default device
        generator = torch.Generator().manual_seed(0)
        w, g = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        h = SimpleNamespace(
            **{name: torch.tensor(0.5, dtype=torch.float64) for name in rule.hypers}
        )
        (_, state), pullback = torch.func.vjp(  # type: ignore[misc]
            lambda w: rule.update(w, g, rule.init(g), h), w
        )
        zeros = {name: torch.zeros_like(value) for name, value in state.items()}
        (through_weights,) = pullback((g, zeros))
        (through_state,) = pullback(
            (torch.zeros_like(w), {n: torch.ones_like(v) for n, v in state.items()})
        )
    return not torch.equal(through_weights, g) or bool(through_state.any())


def step(
    blocks: Sequence[Block],
    owners: Sequence[Owner],
    tower: TowerState,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> tuple[list[Tensor], TowerState]:
    """One step of the whole stack.

    Args:
        blocks: the static shape of the stack.
        owners: whose hyperparameters each shard of the weights is moved by.
        weights, grads: the weights and their gradient, one pair of equally long 1-D tensors for
            each shard.

    Returns:
        the new weights, shard by shard, and the new state of the tower.
    """
    lowest = blocks[0]
    tuned = [owner.among(lowest.tuned) for owner in owners]
    constant = [owner.among(lowest.fixed) for owner in owners]
    states, sums = [], tower.raw[0].new_zeros(lowest.sums * len(lowest.tuned))
    largest = torch.zeros_like(tower.steps)
    for own, fixed, last, w, g in zip(tuned, constant, tower.lowest, weights, grads, strict=True):
        raw = tower.raw[0][0][own]
        state, part = replay(lowest, raw, tower.last_fixed[fixed], last, w, g)
        states.append(state)
        sums = sums.index_add(0, torch.tensor(lowest.places(own), dtype=torch.long), part[:-1])
        largest = largest + part[-1]

    tower, going = climb(blocks, tower, sums, largest)

    moved, moves = [], []
    everything = zip(tuned, constant, states, weights, grads, strict=True)
    for own, fixed, state, w, g in everything:
        numbers = tower.raw[0][0][own], tower.fixed[0][0][fixed]
        new, after = advance(lowest, *numbers, w, g, state, going)
        moved.append(new)
        kept = Move(w if lowest.depends_on_weights else None, g, state, going)
        moves.append(kept if lowest.reruns else Move(None, None, after, going))
    return moved, tower._replace(lowest=tuple(moves))


def replay(
    block: Block, raw: Tensor, fixed: Tensor, last: Move, w: Tensor, g: Tensor
) -> tuple[State, Tensor]:
    """Run the last move of one shard again: the state that it led to, and the hypergradients.

    Args:
        raw, fixed: its owner's hyperparameters of level 0, as the move was made with.
        w, g: the shard's weights, and its new gradient.

    Returns:
        the state after the move, or the one before where none was made; and the gradient with
        respect to ``raw``, in which a move that was not made has no part, what else `judge` needs,
        in rows like it, and the largest square in ``g``.
    """
    before, gradient, start, moved = last
    if not block.tuned:
        return start, raw.new_zeros(1)
    state, paths = start, [start[f"path_{name}"] for name in block.names if block.horizon > 1]
    if gradient is not None:
        # Where w was not kept, no derivative and no state depends on it: any vector will do.
        read = gradient if before is None else before, gradient, start

        def rerun(raw: Tensor) -> tuple[Tensor, State]:
            return block.rule.update(*read, block.values(raw, fixed))

        there = moved > 0
        if block.normalize:
            paths, after = tangents(rerun, raw, g)
            paths = cleared(block, raw, paths, rerun(raw)[0] - read[0])
            paths = [torch.where(there, path, 0.0) for path in paths]
        else:
            _, pullback, after = torch.func.vjp(rerun, raw, has_aux=True)  # type: ignore[misc]
            rows = [torch.where(there, pullback(g)[0], 0.0)]
        state = {name: torch.where(there, after[name], old) for name, old in start.items()}
    if paths:
        rows = [torch.stack([(g * path).sum() for path in paths])]
    if block.normalize:
        rows += [(g * g).sum().expand(len(raw)), torch.stack([(p * p).sum() for p in paths])]
    if block.bounded:

        def ahead(raw: Tensor) -> tuple[Tensor, State]:
            return block.rule.update(w, g, state, block.values(raw, fixed))

        # What an lr of 1 would add, since what a large one adds may overflow when it is squared.
        lr = block.names.index("lr")
        unit = units(raw)[lr] / block.numbers(raw)[lr]
        (update,), _ = tangents(ahead, raw, g, [unit])
        least = SMALL**2 * len(w)
        squares = (update * update).sum().to(raw.dtype)
        # What these are at most, where they overflow or vanish and the update itself does not.
        largest = (update.abs().amax() if len(update) else update.sum()).to(raw.dtype)
        sound = squares.isfinite() & (squares > 0)
        squares = torch.where(sound, squares, len(update) * largest * largest)
        rows += [squares.expand(len(raw)), ((w * w).sum() + least).expand(len(raw))]
    largest = g.abs().amax(0, keepdim=True) if len(g) else g.new_zeros(1)
    rows = [*rows, largest * largest]
    return state, torch.cat([row.to(raw.dtype) for row in rows])


def tangents(
    move: Callable[[Tensor], tuple[Tensor, State]],
    raw: Tensor,
    like: Tensor,
    directions: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], State]:
    """The derivatives of the weights that a move leads to, [n] for each direction, and its state.

    A row of the Jacobian's transpose is reverse mode's derivative of reverse mode, which is linear
    in what it is given; forward mode itself cannot be traced without traces of its bookkeeping.

    Args:
        like: a vector of the weights' kind, [n].
        directions: in which ``raw`` changes, each like it; by default one for each raw value.
    """

    def pullback(vector: Tensor) -> tuple[Tensor, State]:
        _, back, state = torch.func.vjp(move, raw, has_aux=True)  # type: ignore[misc]
        return back(vector)[0], state

    _, forward, state = torch.func.vjp(pullback, like, has_aux=True)  # type: ignore[misc]
    return [forward(d)[0] for d in (units(raw) if directions is None else directions)], state


def cleared(block: Block, raw: Tensor, derivatives: list[Tensor], update: Tensor) -> list[Tensor]:
    """The derivatives of an update by its owner's raw values, without what rounding has left of 0.

    Only a factor that forgets, as a beta, has terms that may cancel, of about its own inverse or
    that of 1 - beta times the update.
    """
    forget = [block.rule.hypers[name].high == 1.0 for name in block.names]
    if not any(forget):
        return derivatives
    values, pullback = torch.func.vjp(block.numbers, raw)  # type: ignore[misc]
    (slopes,) = pullback(torch.ones_like(values))
    terms = slopes / torch.minimum(values, 1 - values) * torch.finfo(update.dtype).eps
    least = (ROUNDING * terms) ** 2 * (update * update).sum()
    return [
        torch.where((d * d).sum() > least[i], d, 0.0) if forget[i] else d
        for i, d in enumerate(derivatives)
    ]


def units(raw: Tensor) -> Sequence[Tensor]:
    """The unit vectors, one for each raw value."""
    return torch.eye(len(raw), dtype=raw.dtype, device=raw.device).unbind()


def judge(block: Block, raw: Tensor, sums: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the level above the lowest makes of the sums of what `replay` has returned.

    Args:
        raw: the lowest level's, [tuned slots].
        sums: [block.sums * tuned slots].

    Returns:
        the hypergradient; and, if the updates' size is bounded, the raw values with which they
        would be as large as the weights.
    """
    hypergradient, *rows = sums.view(block.sums, len(raw)).unbind()
    if block.normalize:
        hypergradient = cosine(hypergradient, *rows[:2])
    if not block.bounded:
        return hypergradient, None
    # What lr adds to the weights is proportional to it, and its raw value is its logarithm.
    update, weights = rows[-2:]
    room = torch.log(torch.sqrt(weights / update))
    names = [slot.name for slot in block.tuned]
    first, end = names.index("lr"), names.index("lr") + names.count("lr")
    free = torch.full_like(raw, math.inf)
    return hypergradient, torch.cat([free[:first], room[first:end], free[end:]])


def cosine(product: Tensor, squares: Tensor, others: Tensor) -> Tensor:
    """An inner product by the norms of both vectors, given as their squares; 0 if one is 0."""
    norms = torch.sqrt(squares) * torch.sqrt(others)
    return torch.where(norms > 0, product / norms, product)


def climb(
    blocks: Sequence[Block], tower: TowerState, sums: Tensor, largest: Tensor
) -> tuple[TowerState, Tensor]:
    """Move the hyperparameters of all levels.

    Args:
        sums: what `replay` returns for level 0, summed over the shards, [block.sums * tuned slots].
        largest: not finite where a gradient of the weights, or its square, is not, 0-dim.

    Returns:
        the tower with its new raw values and the upper levels' moves, level 0's being left alone;
        and whether the weights are to be moved, 1 or 0.
    """
    raws = [row for raw in tower.raw for row in raw]
    bounds = [row for bound in tower.bounds for row in bound.unbind(1)]
    upper = list(enumerate(blocks))[1:]
    going = largest.isfinite().to(tower.steps.dtype)

    # Hypergradients, bottom up: dr_k = dr_{k-1}^T dU_k/dr_k.
    hypergradient, room = judge(blocks[0], raws[0], sums)
    # A gradient that is to leave the weights where they are moves nothing else.
    hypergradients = [torch.where(going > 0, hypergradient, math.nan)]
    states, skipped = [], [1 - going.view(1)]
    for b, block in upper:
        last = tower.upper[b - 1]
        after, jacobians, missed = differentiate(block, tower.raw[b], tower.fixed[b], last)
        states.append(after)
        skipped.append(missed)
        for i, jacobian in enumerate(jacobians, len(hypergradients) - 1):
            # What a bound holds back does not depend on the level that would move it.
            low, high = bounds[i]
            free = (low < raws[i]) & (raws[i] < high)
            jacobian = torch.where(free[:, None], jacobian, 0.0)
            hypergradients[-1] = clipped(block.rule, hypergradients[-1])
            product = (hypergradients[-1][:, None] * jacobian).sum(0)
            if block.normalize:
                squares = (hypergradients[-1] * hypergradients[-1]).sum()
                product = cosine(product, squares, (jacobian * jacobian).sum(0))
            hypergradients.append(product)

    # Hyperparameters, top down.
    moves: list[Move] = []
    k = len(raws) - 1
    for b, block in reversed(upper):
        state, below = states[b - 1], range(k - block.count, k)
        if "room" in state and room is not None:
            # Of an update of 0 it is infinite, and of one that is not finite, nothing.
            state = {**state, "room": torch.nan_to_num(room, ROOMY, ROOMY).clamp(max=ROOMY)[None]}
        vectors = [raws[i] for i in below]
        gradients = torch.stack([hypergradients[i] for i in below])
        sound = gradients.isfinite().all(1)
        turn = its_turn(block.rule, tower.steps)
        fine = [*sound]
        for i in reversed(range(block.count)):
            own = {name: rows[i] for name, rows in state.items()}
            h = block.values(raws[k], tower.fixed[b][i])
            new, _ = block.rule.update(vectors[i], gradients[i], own, h)
            fine[i] = sound[i] & ((new * 0).sum() == 0)  # NaN unless all are finite
            made = fine[i] if turn is None else fine[i] & turn
            low, high = bounds[k - 1]
            raws[k - 1] = torch.where(made, new.clamp(low, high), vectors[i])
            k -= 1
        w = torch.stack(vectors) if block.depends_on_weights else None
        moved, missed = torch.stack(fine), ~torch.stack(fine)
        if turn is not None:
            moved, missed = moved & turn, missed & turn
        skipped[b] = skipped[b] + missed
        if room is not None and k == 0:
            most = room + torch.log(h.trust)
            above = (most < raws[0]) & (going > 0)
            raws[0] = torch.where(above, most.maximum(bounds[0][0]), raws[0])
        moves.insert(0, Move(w, gradients, state, moved.to(gradients.dtype)))

    ends = itertools.accumulate(block.count for block in blocks)
    raw = [
        torch.stack(raws[end - block.count : end]) for block, end in zip(blocks, ends, strict=True)
    ]
    return tower._replace(
        raw=tuple(raw),
        last_fixed=tower.fixed[0][0],
        steps=tower.steps + 1,
        skipped=tower.skipped + torch.cat(skipped),
        upper=tuple(moves),
    ), going


def clipped(rule: Rule, g: Tensor) -> Tensor:
    """The gradient that a level's rule is given: each element within clip_value, its norm within
    clip_norm. One that is not finite stays so."""
    if rule.clip_value < math.inf:
        g = torch.where(g.isfinite(), g.clamp(-rule.clip_value, rule.clip_value), g)
    if rule.clip_norm < math.inf:
        norm = torch.linalg.vector_norm(g)
        g = torch.where(norm > rule.clip_norm, g * (rule.clip_norm / norm), g)
    return g


def its_turn(rule: Rule, steps: Tensor) -> Tensor | None:
    """Whether a level moves what is below it in this step, 0-dim; None where it always does."""
    if rule.every == 1 and rule.until == math.inf:
        return None
    return (steps % rule.every == 0) & (steps < rule.until)


def advance(
    block: Block, raw: Tensor, fixed: Tensor, w: Tensor, g: Tensor, state: State, going: Tensor
) -> tuple[Tensor, State]:
    """Where the lowest rule moves one shard, and the state after it.

    Args:
        raw, fixed: its owner's hyperparameters.
        going: whether it is moved at all, where its rule is tuned; 1 or 0.
    """

    def move(raw: Tensor) -> tuple[Tensor, State]:
        return block.rule.update(w, g, state, block.values(raw, fixed))

    new, after = move(raw)
    if block.horizon > 1:
        derivatives, _ = tangents(move, raw, g)
        if block.normalize:
            derivatives = cleared(block, raw, derivatives, new - w)
        values = dict(zip(block.names, block.numbers(raw).abs().unbind(), strict=True))
        most = {name: state[f"path_most_{name}"].maximum(value) for name, value in values.items()}
        anew = torch.stack([values[name] < ANEW * most[name] for name in values]).any()
        length = torch.where(anew, 1.0, state["path_length"] + 1)
        kept = 1 - 1 / length.clamp(max=block.horizon)
        after = {**after, "path_length": length}
        for (name, value), derivative in zip(values.items(), derivatives, strict=True):
            after[f"path_{name}"] = kept * state[f"path_{name}"] + derivative
            after[f"path_most_{name}"] = torch.where(anew, value, most[name])
        after = {name: torch.where(going > 0, after[name], old) for name, old in state.items()}
    return torch.where(going > 0, new, w) if block.tuned else new, after


def differentiate(
    block: Block, raw: Tensor, fixed: Tensor, move: Move
) -> tuple[State, list[Tensor], Tensor]:
    """Run the last moves of a block's levels again, all at once.

    Returns:
        the states that they led to; for each level the derivative of the raw values that it moved
        with respect to its own, [tuned slots below, tuned slots]; and whether its state has to stay
        as it was since the new one is not finite, [levels]. Where no move was made, the state is
        that before, and the derivative 0.
    """
    n = raw.shape[1]

    def rerun(
        raw: Tensor, fixed: Tensor, w: Tensor, g: Tensor, state: State
    ) -> tuple[Tensor, State]:
        return block.update(w, g, state, raw, fixed)

    assert move.g is not None
    w = move.g if move.w is None else move.w
    inputs = raw, fixed, w, move.g, move.state
    if n:
        jacobian, after = torch.vmap(torch.func.jacrev(rerun, has_aux=True))(*inputs)
    else:
        jacobian, after = w.new_zeros(*w.shape, n), torch.vmap(rerun)(*inputs)[1]
    made = move.moved > 0
    sound = made
    for rows in after.values():
        sound = sound & rows.isfinite().reshape(len(rows), -1).all(1)

    def where(new: Tensor, old: Tensor | float) -> Tensor:
        return torch.where(sound.view(-1, *[1] * (new.ndim - 1)), new, old)

    state = {name: where(after[name], rows) for name, rows in move.state.items()}
    return state, list(where(jacobian, 0.0)), made & ~sound
