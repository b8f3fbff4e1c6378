"""The memory of a stack between steps.

All small values are in one float64 vector, `packed`: the hyperparameters of all levels, and the
state of the upper levels. `Numbers` are views of it. Large values are flat vectors: each shard of
the weights has its `Vectors`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rule import State
from .blocks import Block, Owner
from .torch_private import tree_flatten, tree_unflatten
from .updates import LastUpdate, Numbers


class Vectors(NamedTuple):
    """The large tensors of one shard of n weights that a step reads and writes, [n] each.

    Attributes:
        w, g: the weights and their gradient.
        last_w, last_g: the weights and gradient of the last update, or None if not needed.
        state: the rule's state, without its 0-dim entries, which are in `packed`. It is the state
            before the last update if `Block.recomputes`, otherwise the one after it.
    """

    w: Tensor
    g: Tensor
    last_w: Tensor | None
    last_g: Tensor | None
    state: State

    def flat(self) -> list[Tensor]:
        kept = [last for last in (self.last_w, self.last_g) if last is not None]
        return [self.w, self.g, *kept, *self.state.values()]


@dataclass(frozen=True)
class Layout:
    """The static structure of a stack and its shards.

    Attributes:
        blocks: the blocks of the stack.
        owners: for each shard, the owner of its hyperparameters.
        processes: the names of the process groups over which the weights are divided.
    """

    blocks: tuple[Block, ...]
    owners: tuple[Owner, ...]
    processes: tuple[str, ...] = ()

    @cached_property
    def levels(self) -> list[tuple[int, int]]:
        """For each level of the stack, its block and its row in it."""
        return [(b, row) for b, block in enumerate(self.blocks) for row in range(block.count)]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the first numbers in `packed`: all hyperparameters, tuned ones first."""
        levels = [*enumerate(self.blocks[b] for b, _ in self.levels)]
        slots = [(k, slot) for k, block in levels for slot in block.tuned]
        slots += [(k, slot) for k, block in levels for slot in block.fixed]
        return tuple(f"{k}.{slot}" for k, slot in slots)

    @cached_property
    def states(self) -> tuple[dict[str, bool], ...]:
        """For each block, the names of the entries of its state, and whether each is a vector."""
        return tuple(
            {name: value.ndim > 0 for name, value in block.init(block.rule.example()).items()}
            for block in self.blocks
        )

    @cached_property
    def shapes(self) -> Numbers:
        """The shapes of the views of `packed`."""
        raw = [(block.count, len(block.tuned)) for block in self.blocks]
        fixed = [(block.count, len(block.fixed)) for block in self.blocks]
        updates = []
        for block, state in zip(self.blocks[1:], self.states[1:], strict=True):
            rows = block.count, len(block.below)
            parts = {name: rows if vector else rows[:1] for name, vector in state.items()}
            updates.append(LastUpdate(rows, rows, parts, rows[:1]))  # type: ignore[arg-type]
        counters = sum(not vector for vector in self.states[0].values())
        return Numbers(
            values=(sum(count * slots for count, slots in raw),),
            fixed=fixed,
            hyper_updates=updates,
            bounds=[(2, *shape) for shape in raw],
            raw=raw,
            last_fixed=(len(self.blocks[0].fixed),),
            steps=(),
            skipped=(len(self.levels),),
            effective_lr=(len(self.blocks[0].lr_slots),),
            grads_finite=(),
            shard_scalars=[(1 + counters,)] * len(self.owners),
        )

    def numbers(self, packed: Tensor) -> Numbers:
        """The views of `packed`."""
        shapes, tree = tree_flatten(self.shapes, is_leaf=_is_shape)
        pieces = packed.split([math.prod(shape) for shape in shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return tree_unflatten(views, tree)

    def last_update(
        self, scalars: Tensor, w: Tensor | None, g: Tensor | None, vectors: State
    ) -> LastUpdate:
        """Combine the vectors of a shard's last update with its row of `shard_scalars`."""
        applied, *counters = scalars.unbind()
        rest = iter(counters)
        state = {
            name: vectors[name] if vector else next(rest) for name, vector in self.states[0].items()
        }
        return LastUpdate(w, g, state, applied)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def scalars_of(last: LastUpdate) -> Tensor:
    """A shard's row of `shard_scalars`, from its last update."""
    return torch.stack([last.applied, *(part for part in last.state.values() if not part.ndim)])
