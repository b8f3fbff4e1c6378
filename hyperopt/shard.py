"""Shards: parameters that are moved together, as one flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import Vectors
from .tower import Block, Move, Owner

# From this many elements on, a parameter is worked on where it lies, and not gathered with others:
# the copies would cost more than one more loop in the step.
LARGE = 1 << 16


class Shard:
    """Parameters of one param group that have been moved together since their first step.

    A large parameter is a shard of its own, on whose memory the step works directly; the others are
    gathered into a flat vector and scattered back. Half-precision parameters are moved in float32;
    no other cast is made.

    Args:
        params: the parameters, n elements in all.
        owner: whose hyperparameters they are moved by.
        last: their last move, with vectors of [n].
    """

    def __init__(self, params: list[Tensor], owner: Owner, last: Move) -> None:
        self.params, self.owner, self.last = params, owner, last
        self._n = sum(p.numel() for p in params)
        self._gathered: tuple[Tensor, ...] | None = None  # w and g
        self._views: tuple[list[Tensor], list[Tensor]]
        self._in_place = False

    @classmethod
    def new(cls, params: list[Tensor], owner: Owner, block: Block) -> Shard:
        """A shard that has not been moved yet.

        Args:
            block: the lowest level.
        """
        n = sum(p.numel() for p in params)
        blank = torch.zeros(n, dtype=precision(params[0]), device=params[0].device)
        w = blank.clone() if block.depends_on_weights else None
        g = blank.clone() if block.tuned else None
        moved = torch.zeros((), dtype=torch.float64, device=blank.device)
        return cls(params, owner, Move(w, g, block.rule.init(blank), moved))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_gathered": None, "_views": None}  # which share their memory

    def __len__(self) -> int:
        return self._n

    def read(self) -> Vectors:
        """What a step reads and writes: the weights and gradients as they are now, and the rest."""
        first, grad = self.params[0], self.params[0].grad
        self._in_place = (
            len(self) >= LARGE
            and len(self.params) == 1
            and grad is not None
            and first.dtype == grad.dtype == precision(first)
            and first.is_contiguous()
            and grad.is_contiguous()
        )
        if self._in_place and grad is not None:
            w, g = first.view(-1), grad.view(-1)
        else:
            if self._gathered is None:
                self._gathered = tuple(
                    torch.empty(len(self), dtype=precision(first), device=first.device)
                    for _ in range(2)
                )
                self._views = self.shaped(self._gathered[0]), self.shaped(self._gathered[1])
            w, g = self._gathered
            grads: list[Any] = [p.grad for p in self.params]
            torch._foreach_copy_(self._views[0], self.params)
            torch._foreach_copy_(self._views[1], grads)
        state = {name: value for name, value in self.last.state.items() if value.ndim}
        return Vectors(w, g, self.last.w, self.last.g, state)

    def write(self) -> None:
        """Give the parameters the weights that a step has left in what `read` returned."""
        if self._in_place:
            torch.autograd.graph.increment_version(self.params[0])
        else:
            torch._foreach_copy_(self.params, self._views[0])

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """A flat vector, [n], cut and shaped like the parameters."""
        pieces = flat.split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]

    def part(self, chosen: Sequence[bool]) -> Shard:
        """A shard of some of the parameters, with their share of the state."""

        def cut(value: Tensor) -> Tensor:
            if not value.ndim:
                return value.clone()
            pieces = zip(self.shaped(value), chosen, strict=True)
            return torch.cat([piece.reshape(-1) for piece, here in pieces if here])

        w, g, state, moved = self.last
        last = Move(
            None if w is None else cut(w),
            None if g is None else cut(g),
            {name: cut(value) for name, value in state.items()},
            moved.clone(),
        )
        params = [p for p, here in zip(self.params, chosen, strict=True) if here]
        return Shard(params, self.owner, last)


def precision(p: Tensor) -> torch.dtype:
    """The dtype in which a parameter is moved."""
    return torch.promote_types(p.dtype, torch.float32)


def divide(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters of one group, divided into those of new shards."""
    large = [[p] for p in params if p.numel() >= LARGE]
    small: dict[torch.dtype, list[Tensor]] = {}
    for p in params:
        if p.numel() < LARGE:
            small.setdefault(precision(p), []).append(p)
    return large + list(small.values())
