"""Where the numbers of a stack are kept between steps, and the step that works on them in place.

Everything small, all hyperparameters of all levels and the whole state of the upper levels, is one
float64 vector, `packed`; everything large is one flat vector per shard and kind. A step is then one
function of a handful of tensors, which compiles into one kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .domains import DOMAINS, REAL
from .rules import State
from .tower import Block, Move, TowerState, advance, climb, replay


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
        # The compiler writes in this order: last_w has to get w before w is written.
        kept = [last for last in (self.last_w, self.last_g) if last is not None]
        return [*kept, self.w, self.g, *self.state.values()]


@dataclass(frozen=True)
class Layout:
    """The static shape of a stack and its weights: what a compiled step depends on.

    Attributes:
        blocks: the stack.
        sizes: the number of weights of each shard.
        moved: for each shard, whether it has a last move.
        started: whether the upper levels have made a step.
        processes: the names of the process groups over whose members the weights are divided.
    """

    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]
    moved: tuple[bool, ...]
    started: bool
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
    def regular(self) -> bool:
        """Whether nothing moves for the first time, as in every step but few."""
        return self.started and (all(self.moved) or not self.blocks[0].tuned)

    @cached_property
    def states(self) -> tuple[dict[str, bool], ...]:
        """For each block, the names of its rule's state, and whether each is a vector."""
        empty = torch.empty(0)
        return tuple(
            {name: value.ndim > 0 for name, value in block.rule.init(empty).items()}
            for block in self.blocks
        )

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the parts of `packed`."""
        raw = [(block.count, len(block.tuned)) for block in self.blocks]
        shapes: list[tuple[int, ...]] = [(sum(count * n for count, n in raw),)]
        shapes += [(block.count, len(block.fixed)) for block in self.blocks]
        shapes += [(len(self.blocks[0].fixed),), *raw]
        for block, state in zip(self.blocks[1:], self.states[1:], strict=True):
            rows = block.count, len(block.owners[0])  # type: ignore[arg-type]
            shapes += [rows, rows, *(rows if vector else rows[:1] for vector in state.values())]
        counters = sum(not vector for vector in self.states[0].values())
        return [*shapes, *[(counters,)] * len(self.sizes)]

    def unpack(self, packed: Tensor, shards: Sequence[Vectors]) -> TowerState:
        """The tower's state as views of `packed` and of the shards' vectors."""
        pieces = packed.split([math.prod(shape) for shape in self.shapes])
        parts = (piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))
        next(parts)
        fixed = tuple(next(parts) for _ in self.blocks)
        last_fixed = next(parts)
        raw = tuple(next(parts) for _ in self.blocks)
        upper = []
        for names in self.states[1:]:
            w, g = next(parts), next(parts)
            state = {name: next(parts) for name in names}
            upper.append(Move(w, g, state) if self.started else Move(None, None, state))
        lowest = []
        for shard, moved in zip(shards, self.moved, strict=False):
            lowest.append(self.last(next(parts), shard, moved))
        return TowerState(raw, fixed, last_fixed, tuple(lowest), tuple(upper))

    def last(self, counters: Tensor, shard: Vectors, moved: bool) -> Move:
        """The last move of a shard, given the 0-dim parts of its state as one vector."""
        each = iter(counters)
        state = {
            name: shard.state[name] if vector else next(each)
            for name, vector in self.states[0].items()
        }
        return Move(shard.last_w, shard.last_g, state) if moved else Move(None, None, state)

    def pack(self, tower: TowerState) -> Tensor:
        """The inverse of `unpack`, but for the large vectors."""
        raw = torch.cat([rows.reshape(-1) for rows in tower.raw])
        domains = [
            block.rule.tuned[slot.name]
            for block in self.blocks
            for slot in block.tuned * block.count
        ]
        values = raw
        for domain in DOMAINS.values():
            if domain is not REAL and domain in domains:
                here = torch.tensor([d is domain for d in domains], device=raw.device)
                values = torch.where(here, domain.value(raw), values)
        parts = [values, *tower.fixed, tower.last_fixed, raw]
        for block, (w, g, state) in zip(self.blocks[1:], tower.upper, strict=True):
            blank = raw.new_zeros(block.count, len(block.owners[0]))  # type: ignore[arg-type]
            parts += [blank if w is None else w, blank if g is None else g, *state.values()]
        parts += [s for move in tower.lowest for s in move.state.values() if not s.ndim]
        return torch.cat([part.reshape(-1) for part in parts])

    # One step in place, in three parts: of each shard, of the tower, and of each shard again.

    def step(self, packed: Tensor, shards: Sequence[Vectors]) -> None:
        """One step of the stack: writes all of `packed` and of the shards but for ``g``."""
        everything = list(zip(self.counters(packed), shards, self.blocks[0].owners, strict=True))
        hypergradient = torch.zeros_like(self.lowest(packed)[0])
        for (counters, shard, owner), moved in zip(everything, self.moved, strict=True):
            part = self.replay(packed, counters, shard, owner, moved)
            hypergradient = hypergradient + part
        self.climb(packed, hypergradient)
        for counters, shard, owner in everything:
            self.advance(packed, counters, shard, owner)

    def lowest(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The raw values, the fixed ones and the last fixed ones of level 0, as views."""
        sizes = [math.prod(shape) for shape in self.shapes]
        starts = [0, *itertools.accumulate(sizes)]
        last = 1 + len(self.blocks)
        views = [packed[starts[i] : starts[i] + sizes[i]] for i in (last + 1, 1, last)]
        return views[0], views[1], views[2]

    def counters(self, packed: Tensor) -> list[Tensor]:
        """For each shard the 0-dim parts of its state, as one vector, a view."""
        *_, (n,) = self.shapes if self.sizes else [(0,)]
        end = packed[len(packed) - n * len(self.sizes) :]
        return [end[i * n : (i + 1) * n] for i in range(len(self.sizes))]

    def replay(
        self, packed: Tensor, counters: Tensor, shard: Vectors, owner: Any, moved: bool
    ) -> Tensor:
        """The state that a shard's last move led to, in place; returns its hypergradient."""
        if not self.blocks[0].tuned:
            return packed.new_zeros(0)
        last = self.last(counters, shard, moved)
        raw, _, last_fixed = self.lowest(packed)
        state, part = replay(self.blocks[0], raw, last_fixed, owner, last, shard.g)
        self.store(counters, shard, state)
        if shard.last_g is not None:
            shard.last_g.copy_(shard.g)
        if shard.last_w is not None:
            shard.last_w.copy_(shard.w)
        return part

    def store(self, counters: Tensor, shard: Vectors, state: State) -> None:
        for name, value in shard.state.items():
            if value.ndim:
                value.copy_(state[name])
        if len(counters):
            counters.copy_(torch.stack([value for value in state.values() if not value.ndim]))

    def climb(self, packed: Tensor, hypergradient: Tensor) -> None:
        """Move the hyperparameters of all levels, in place.

        Args:
            hypergradient: that of level 0, summed over the shards, [tuned slots].
        """
        if len(hypergradient):
            for group in self.processes:
                part = torch.ops._c10d_functional.all_reduce(hypergradient, "sum", group)
                hypergradient = torch.ops._c10d_functional.wait_tensor(part)
        tower = self.unpack(packed, ())
        new = self.pack(climb(self.blocks, tower, hypergradient))
        packed[: len(new)].copy_(new)

    def advance(self, packed: Tensor, counters: Tensor, shard: Vectors, owner: Any) -> None:
        """Move a shard's weights, in place."""
        state = self.last(counters, shard, True).state
        raw, fixed, _ = self.lowest(packed)
        w, state = advance(self.blocks[0], raw, fixed, owner, shard.w, shard.g, state)
        if not self.blocks[0].tuned:
            self.store(counters, shard, state)
        shard.w.copy_(w)
