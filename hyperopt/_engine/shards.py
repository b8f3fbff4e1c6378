"""Shards: groups of parameters that are moved together, as one flat vector.

They are not those of `torch.distributed.fsdp`, which divide a parameter over several processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import State
from .blocks import Block, Owner
from .packed import Vectors
from .torch_private import copy_lists, local, tree_map
from .updates import LastUpdate

# A parameter of at least this many elements is updated in place, and not gathered with others: the
# copies would cost more than one more loop in the step.
LARGE = 1 << 16


class Shard:
    """Parameters of one param group that have been moved together since their first step.

    A large parameter is a shard of its own, and the step updates its memory directly. Smaller
    parameters are gathered into a flat vector and scattered back. If the rule is not elementwise,
    each parameter is a shard of its own and keeps its shape. Half-precision parameters are moved in
    float32, and all others in their own dtype.

    Args:
        params: the parameters, n elements in total.
        owner: the owner of their hyperparameters.
        last: their last update, with vectors of [n], or in the shape of a single parameter.
        shape: (n,), or the shape of a single parameter.
    """

    def __init__(
        self, params: list[Tensor], owner: Owner, last: LastUpdate, shape: torch.Size
    ) -> None:
        self.params, self.owner, self.last, self._shape = params, owner, last, shape
        self._n = sum(local(p).numel() for p in params)
        self._gathered: tuple[Tensor, ...] | None = None  # w and g
        self._views: tuple[list[Tensor], list[Tensor]]
        self._in_place = False
        self._kinds = [_kind(p) for p in params]
        self._divided = local(params[0]) is not params[0]
        self._here: list[Tensor]

    @classmethod
    def new(cls, params: list[Tensor], owner: Owner, block: Block) -> Shard:
        """Make a shard that has not been moved yet.

        Args:
            params: the parameters.
            owner: the owner of their hyperparameters.
            block: the lowest level.
        """
        flat = [local(p).detach().reshape(-1).to(precision(p)) for p in params]
        weights = torch.cat(flat)  # a copy, even of a single parameter
        if not block.rule.elementwise:
            (p,) = params
            weights = weights.view(p.shape or (1,))
        w = torch.zeros_like(weights) if block.keeps_weights else None
        g = torch.zeros_like(weights) if block.recomputes else None
        with weights.device:
            state = block.init(weights)
        applied = torch.zeros((), dtype=torch.float64, device=weights.device)
        return cls(params, owner, LastUpdate(w, g, state, applied), weights.shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_gathered": None, "_views": None}  # views of each other

    def __len__(self) -> int:
        return self._n

    def read(self) -> Vectors:
        """Gather the vectors of a step: current weights and gradients, last update and state."""
        grads: list[Any] = [p.grad for p in self.params]
        self._here = self.params
        if self._divided:
            self._here, grads = [local(p) for p in self.params], [local(g) for g in grads]
        first, grad = self._here[0], grads[0]
        self._in_place = (
            len(self.params) == 1
            and first.dtype == grad.dtype == precision(first)
            and first.is_contiguous()
            and grad.is_contiguous()
        )
        if self._in_place:
            w, g = first.view(self._shape), grad.view(self._shape)
        else:
            if self._gathered is None:
                self._gathered = tuple(
                    torch.empty(self._shape, dtype=precision(first), device=first.device)
                    for _ in range(2)
                )
                self._views = self.shaped(self._gathered[0]), self.shaped(self._gathered[1])
            w, g = self._gathered
            copy_lists(self._views[0], self._here)
            copy_lists(self._views[1], grads)
        state = {name: value for name, value in self.last.state.items() if value.ndim}
        return Vectors(w, g, self.last.w, self.last.g, state)

    def write(self) -> None:
        """Copy the new weights from the result of `read` to the parameters."""
        if self._in_place:
            torch.autograd.graph.increment_version(self._here[0])
        else:
            copy_lists(self._here, self._views[0])

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """Split a flat vector, [n], into tensors of the parameters' shapes."""
        if flat.shape != (len(self),):  # a single parameter that keeps its shape
            return [flat]
        pieces = flat.split([local(p).numel() for p in self.params])
        return [piece.view(local(p).shape) for piece, p in zip(pieces, self.params, strict=True)]

    def by_parameter(self, kept: State | None = None) -> dict[Tensor, State]:
        """The rule's state of each parameter, in its shape and divided over processes like it.

        Args:
            kept: entries of the shard to split; by default the rule's state. Parameters share 0-dim
                entries.

        Returns:
            views, which may be written to.
        """
        kept = self.last.state if kept is None else kept
        views = {name: self.shaped(value) for name, value in kept.items() if value.ndim}
        return {
            p: {name: whole(views[name][i], p) if v.ndim else v for name, v in kept.items()}
            for i, p in enumerate(self.params)
        }

    def part(self, params: Sequence[Tensor]) -> Shard:
        """Make a shard of some of the parameters, with copies of their part of the state."""
        chosen = set(params)

        def cut(value: Any) -> Any:
            if value is None:
                return None
            if not value.ndim or len(chosen) == len(self.params):
                return value.clone()
            pieces = zip(self.shaped(value), self.params, strict=True)
            return torch.cat([piece.reshape(-1) for piece, p in pieces if p in chosen])

        shape = self._shape
        if len(chosen) < len(self.params):
            shape = torch.Size([sum(local(p).numel() for p in params)])
        return Shard(list(params), self.owner, tree_map(cut, self.last), shape)

    @property
    def is_stale(self) -> bool:
        """Whether a parameter has changed its dtype, shape or device."""
        return [_kind(p) for p in self.params] != self._kinds

    def check_shapes(self) -> None:
        """Raise a ValueError if a parameter has changed its shape."""
        for p, (shape, *_) in zip(self.params, self._kinds, strict=True):
            if p.shape != shape:
                raise ValueError(
                    f"a parameter of shape {tuple(shape)} has become one of {tuple(p.shape)}; put "
                    "a new parameter into its param group, or make a new optimizer"
                )

    def sync(self) -> None:
        """Move the last update to the parameters' current device and precision."""

        def to(value: Any) -> Any:
            return (
                value
                if value is None
                else value.to(first.device, precision(first) if value.ndim else value.dtype)
            )

        first = self.params[0]
        self.last = tree_map(to, self.last)


def _kind(p: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return p.shape, p.dtype, p.device


def precision(p: Tensor) -> torch.dtype:
    """The dtype in which a parameter is moved."""
    return torch.promote_types(p.dtype, torch.float32)


def whole(tensor: Tensor, p: Any) -> Tensor:
    """The inverse of `local`: make a DTensor, divided like ``p``, from this process's part."""
    if local(p) is p:
        return tensor
    own = {"run_check": False, "shape": p.shape, "stride": p.stride()}
    return type(p).from_local(tensor, p.device_mesh, p.placements, **own)


def processes(params: Sequence[Tensor]) -> tuple[str, ...]:
    """The names of the process groups over which the parameters are divided.

    Raises:
        ValueError: the parameters are not all divided in the same way.
    """

    def division(p: Any) -> tuple[str, ...]:
        axes = enumerate(getattr(p, "placements", ()))
        return tuple(p.device_mesh.get_group(i).group_name for i, how in axes if how.is_shard())

    found = {division(p) for p in params}
    if len(found) > 1:
        raise ValueError(
            "parameters are divided over processes in different ways; make one optimizer for "
            "each way"
        )
    return found.pop() if found else ()


def divide(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Divide parameters of one group into new shards, in the same way in all processes."""

    def size(p: Any) -> int:
        return p.numel() if local(p) is p else p.numel() // p.device_mesh.size()

    large = [[p] for p in params if size(p) >= LARGE]
    small: dict[torch.dtype, list[Tensor]] = {}
    for p in params:
        if size(p) < LARGE:
            small.setdefault(precision(p), []).append(p)
    return large + list(small.values())
