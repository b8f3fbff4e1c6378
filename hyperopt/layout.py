"""Where the numbers of a stack are kept between steps, and the step that works on them in place.

Everything small, all hyperparameters of all levels and the whole state of the upper levels, is one
float64 vector, `packed`; everything large is one flat vector per shard and kind. A step is then one
function of a handful of tensors, which compiles into one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .domains import DOMAINS, REAL
from .rules import State
from .tower import Block, Move, TowerState, step


class Vectors(NamedTuple):
    """The large tensors of one shard of n weights that a step reads and writes, [n] each.

    Attributes:
        w, g: the weights and their gradient.
        last_w, last_g: those of the last move; the first is None where the rule does not need it.
        state: the rule's state before the last move; of its 0-dim parts `packed` has the values.
    """

    w: Tensor
    g: Tensor
    last_w: Tensor | None
    last_g: Tensor
    state: State

    def flat(self) -> list[Tensor]:
        # The compiler writes in this order: last_w has to get w before w is written.
        kept = [] if self.last_w is None else [self.last_w]
        return [*kept, self.w, self.g, self.last_g, *self.state.values()]


@dataclass(frozen=True)
class Layout:
    """The static shape of a stack and its weights: what a compiled step depends on.

    Attributes:
        blocks: the stack.
        sizes: the number of weights of each shard.
        moved: for each shard, whether it has a last move.
        started: whether the upper levels have made a step.
    """

    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]
    moved: tuple[bool, ...]
    started: bool

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
        return self.started and all(self.moved)

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
        shapes += [(1, len(self.blocks[0].fixed)), *raw]
        for block, state in zip(self.blocks[1:], self.states[1:], strict=True):
            rows = block.count, len(block.owners[0])  # type: ignore[arg-type]
            shapes += [rows, rows, *(rows if vector else rows[:1] for vector in state.values())]
        counters = sum(not vector for vector in self.states[0].values())
        return shapes + [()] * (counters * len(self.sizes))

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
        for shard, moved in zip(shards, self.moved, strict=True):
            state = {
                name: shard.state[name] if vector else next(parts)
                for name, vector in self.states[0].items()
            }
            lowest.append(
                Move(shard.last_w, shard.last_g, state) if moved else Move(None, None, state)
            )
        return TowerState(raw, fixed, last_fixed, tuple(lowest), tuple(upper))

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

    def step(self, packed: Tensor, shards: Sequence[Vectors]) -> None:
        """One step of the stack, in place: all of `packed` and of the shards but for ``g``."""
        tower = self.unpack(packed, shards)
        weights, tower = step(self.blocks, tower, [s.w for s in shards], [s.g for s in shards])
        packed.copy_(self.pack(tower))
        for shard, w, move in zip(shards, weights, tower.lowest, strict=True):
            for name, value in shard.state.items():
                if value.ndim:
                    value.copy_(move.state[name])
            shard.last_g.copy_(shard.g)
            if shard.last_w is not None:
                shard.last_w.copy_(shard.w)
            shard.w.copy_(w)
