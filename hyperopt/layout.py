"""Where the numbers of a stack are kept between steps, and the step that works on them in place.

Everything small, all hyperparameters of all levels and the whole state of the upper levels, lies in
one float64 vector, `packed`, and is worked on as views of it; everything large is one flat vector
per shard and kind. A step is then a function of these tensors, whose halves compile into one kernel
each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .rule import State
from .tower import Block, Move, Owner, TowerState, advance, climb, replay


class Vectors(NamedTuple):
    """The large tensors of one shard of n weights that a step reads and writes, [n] each.

    Attributes:
        w, g: the weights and their gradient.
        last_w, last_g: those of the last move, or None where they are not needed.
        state: the rule's state before the last move; of its 0-dim parts `packed` has the values.
    """

    w: Tensor
    g: Tensor
    last_w: Tensor | None
    last_g: Tensor | None
    state: State

    def flat(self) -> list[Tensor]:
        kept = [last for last in (self.last_w, self.last_g) if last is not None]
        return [self.w, self.g, *kept, *self.state.values()]


class Parts(NamedTuple):
    """What `packed` holds: views of it, new values for them, or their shapes.

    A compiled step writes to them in this order. `upper`, which keeps raw values as they were, has
    to come before `raw`.

    Attributes:
        values: those of the tuned hyperparameters; to be read only. With `fixed`, which follows,
            these are all in the order of `Layout.names`.
        small: for each shard its `Move.moved`, and the 0-dim parts of its state.

    The others are those of a `TowerState`.
    """

    values: Any
    fixed: Any
    upper: Any
    bounds: Any
    raw: Any
    last_fixed: Any
    steps: Any
    skipped: Any
    going: Any
    small: Any


@dataclass(frozen=True)
class Layout:
    """The static shape of a stack and its weights: what a compiled step depends on.

    Attributes:
        blocks: the stack.
        owners: whose hyperparameters each shard of the weights is moved by.
        sizes: the number of weights of each shard.
        processes: the names of the process groups over whose members the weights are divided.
    """

    blocks: tuple[Block, ...]
    owners: tuple[Owner, ...]
    sizes: tuple[int, ...]
    processes: tuple[str, ...] = ()

    @cached_property
    def levels(self) -> list[tuple[int, int]]:
        """For each level of the stack, its block and its row in it."""
        return [(b, row) for b, block in enumerate(self.blocks) for row in range(block.count)]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What `packed` begins with: every hyperparameter's value, the tuned ones first."""
        slots = [(k, slot) for k, (b, _) in enumerate(self.levels) for slot in self.blocks[b].tuned]
        slots += [
            (k, slot) for k, (b, _) in enumerate(self.levels) for slot in self.blocks[b].fixed
        ]
        return tuple(f"{k}.{slot}" for k, slot in slots)

    @cached_property
    def states(self) -> tuple[dict[str, bool], ...]:
        """For each block, the names of its rule's state, and whether each is a vector."""
        empty = torch.empty(0)
        return tuple(
            {name: value.ndim > 0 for name, value in block.init(empty).items()}
            for block in self.blocks
        )

    @cached_property
    def tuned(self) -> list[list[int]]:
        """For each shard the places of its owner's raw values among those of level 0."""
        return [owner.among(self.blocks[0].tuned) for owner in self.owners]

    @cached_property
    def fixed(self) -> list[list[int]]:
        """For each shard the places of its owner's fixed values among those of level 0."""
        return [owner.among(self.blocks[0].fixed) for owner in self.owners]

    @cached_property
    def shapes(self) -> Parts:
        """The shapes of the parts of `packed`."""
        raw = [(block.count, len(block.tuned)) for block in self.blocks]
        fixed = [(block.count, len(block.fixed)) for block in self.blocks]
        upper = []
        for block, state in zip(self.blocks[1:], self.states[1:], strict=True):
            rows = block.count, len(block.below)
            parts = {name: rows if vector else rows[:1] for name, vector in state.items()}
            upper.append(Move(rows, rows, parts, rows[:1]))  # type: ignore[arg-type]
        counters = sum(not vector for vector in self.states[0].values())
        return Parts(
            values=(sum(count * slots for count, slots in raw),),
            fixed=fixed,
            upper=upper,
            bounds=[(2, *shape) for shape in raw],
            raw=raw,
            last_fixed=(len(self.blocks[0].fixed),),
            steps=(),
            skipped=(len(self.levels),),
            going=(),
            small=[(1 + counters,)] * len(self.sizes),
        )

    def parts(self, packed: Tensor) -> Parts:
        """The parts of `packed`, as views."""
        shapes, tree = tree_flatten(self.shapes, is_leaf=_is_shape)
        pieces = packed.split([math.prod(shape) for shape in shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return tree_unflatten(views, tree)

    def tower(self, parts: Parts, shards: Sequence[Vectors] = ()) -> TowerState:
        """The tower's state; where no shards are given, without their last moves."""
        return TowerState(
            raw=tuple(parts.raw),
            bounds=tuple(parts.bounds),
            fixed=tuple(parts.fixed),
            last_fixed=parts.last_fixed,
            steps=parts.steps,
            skipped=parts.skipped,
            lowest=tuple(
                self.last(small, shard.last_w, shard.last_g, shard.state)
                for small, shard in zip(parts.small, shards, strict=False)
            ),
            upper=tuple(parts.upper),
        )

    def last(self, small: Tensor, w: Tensor | None, g: Tensor | None, vectors: State) -> Move:
        """The last move of a shard: its large vectors, and what `Parts.small` has of it."""
        moved, *counters = small.unbind()
        rest = iter(counters)
        state = {
            name: vectors[name] if vector else next(rest) for name, vector in self.states[0].items()
        }
        return Move(w, g, state, moved)

    def parts_of(self, tower: TowerState, going: Tensor) -> Parts:
        """The inverse of `tower`.

        Args:
            going: whether the weights are to be moved, as `climb` says.
        """
        values = [
            block.numbers(raw).reshape(-1)
            for block, raw in zip(self.blocks, tower.raw, strict=True)
        ]
        upper = [
            move if move.w is not None else move._replace(w=move.g.new_zeros(move.g.shape))  # type: ignore[union-attr]
            for move in tower.upper
        ]
        small = [
            torch.stack([move.moved, *(s for s in move.state.values() if not s.ndim)])
            for move in tower.lowest
        ]
        return Parts(
            values=torch.cat(values),
            fixed=[*tower.fixed],
            upper=upper,
            bounds=[*tower.bounds],
            raw=[*tower.raw],
            last_fixed=tower.last_fixed,
            steps=tower.steps,
            skipped=tower.skipped,
            going=going,
            small=small,
        )

    # One step in place. What is read and what is written come as two arguments, which are the same
    # memory: see `compile`.

    def step(self, parts: Parts, shards: Sequence[Vectors]) -> None:
        """One step of the stack: writes to all parts, and to the shards but for ``g``."""
        if self.blocks[0].tuned:
            self.tune(parts, shards, shards)
        self.move(parts, shards, shards)

    def tune(self, parts: Parts, shards: Sequence[Vectors], into: Sequence[Vectors]) -> None:
        """The first half of a step: the hyperparameters, and the state of the last move's end."""
        raw, last_fixed = parts.raw[0][0], parts.last_fixed
        everything = zip(self.tuned, self.fixed, parts.small, shards, into, strict=True)
        found = [
            self.replay(pick(raw, tuned), pick(last_fixed, fixed), small, shard, new)
            for tuned, fixed, small, shard, new in everything
        ]
        self.climb(parts, *self.total(found))

    def move(self, parts: Parts, shards: Sequence[Vectors], into: Sequence[Vectors]) -> None:
        """The second half of a step: the weights."""
        raw, constant = parts.raw[0][0], parts.fixed[0][0]
        everything = zip(self.tuned, self.fixed, parts.small, shards, into, strict=True)
        for tuned, fixed, small, shard, new in everything:
            numbers = pick(raw, tuned), pick(constant, fixed)
            self.advance(*numbers, parts.going, small, shard, new)

    def replay(
        self, raw: Tensor, last_fixed: Tensor, small: Tensor, shard: Vectors, into: Vectors
    ) -> Tensor:
        """The state that a shard's last move led to, in place; returns what `tower.replay` does.

        Args:
            raw, last_fixed: the values of its owner.
            small: what `Parts.small` has of it.
        """
        last = self.last(small, shard.last_w, shard.last_g, shard.state)
        state, part = replay(self.blocks[0], raw, last_fixed, last, shard.w, shard.g)
        if self.blocks[0].reruns:
            self.store(small, into, state)
        return part

    def total(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What `climb` is given: the sums of what `replay` has returned for each shard."""
        lowest = self.blocks[0]
        every = range(len(lowest.tuned))
        if all(tuned == [*every] for tuned in self.tuned):
            whole = torch.stack([*parts]).sum(0)
            return whole[:-1], whole[-1]
        of_slot: list[list[Tensor]] = [[] for _ in range(lowest.sums * len(every))]
        for tuned, part in zip(self.tuned, parts, strict=True):
            for place, number in zip(lowest.places(tuned), part, strict=False):
                of_slot[place].append(number)
        sums = [sum(numbers, start=parts[0].new_zeros(())) for numbers in of_slot]
        return torch.stack(sums), sum((part[-1] for part in parts), start=parts[0].new_zeros(()))

    def store(self, small: Tensor, into: Vectors, state: State) -> None:
        for name, value in into.state.items():
            value.copy_(state[name])
        if len(small) > 1:
            counters = [name for name, vector in self.states[0].items() if not vector]
            small[1:].copy_(torch.stack([state[name] for name in counters]))

    def climb(self, parts: Parts, sums: Tensor, largest: Tensor) -> None:
        """Move the hyperparameters of all levels, in place.

        Args:
            sums, largest: what `total` returns.
        """
        for group in self.processes:
            part = torch.cat([sums, largest.view(1)])
            part = torch.ops._c10d_functional.all_reduce(part, "sum", group)
            part = torch.ops._c10d_functional.wait_tensor(part)
            sums, largest = part[:-1], part[-1]
        tower, going = climb(self.blocks, self.tower(parts), sums, largest)
        new = self.parts_of(tower, going)
        for old, value in zip(tree_leaves(parts._replace(small=[])), tree_leaves(new), strict=True):
            if value is not old:
                old.copy_(value)

    def advance(
        self,
        raw: Tensor,
        fixed: Tensor,
        going: Tensor,
        small: Tensor,
        shard: Vectors,
        into: Vectors,
    ) -> None:
        """Move a shard's weights, in place."""
        state = self.last(small, None, None, shard.state).state
        w, state = advance(self.blocks[0], raw, fixed, shard.w, shard.g, state, going)
        if self.blocks[0].tuned:
            small[:1].copy_(going)
        if not self.blocks[0].reruns:
            self.store(small, into, state)
        if into.last_g is not None:
            into.last_g.copy_(shard.g)
        if into.last_w is not None:
            into.last_w.copy_(shard.w)
        into.w.copy_(w)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def pick(values: Tensor, places: Sequence[int]) -> Tensor:
    """Some of the values; all of them in their order are a view."""
    if list(places) == [*range(len(values))]:
        return values
    return torch.stack([values[place] for place in places])
