"""One step of a stack, in place, made of the three parts in `updates`.

A part is a function of small tensors, of a shard's vectors to read, and of vectors to write. The
vectors to read and to write share memory; `compiler` explains why. A part runs eagerly or as a
compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import warn_user
from ..rule import State
from . import compiler
from .blocks import Block
from .fingerprint import fingerprint
from .packed import Layout, Vectors
from .torch_private import load_forward_mode, sum_over, tree_flatten, tree_leaves, tree_unflatten
from .updates import Numbers, recompute_last_update, update_hyperparameters, update_weights

Part = Callable[..., None]
Run = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]  # small tensors and vectors in
Make = Callable[[str, Part, Sequence[Tensor], Sequence[Tensor]], Run]

_broken: list[str] = []  # the first error of the compiler, if it has failed
_untraced: set[tuple] = set()  # the structures of layouts whose rules cannot be traced


class Parts:
    """The three parts of a step, in place.

    Args:
        layout: the structure of the stack and its shards.
        numbers: views of `packed`.
    """

    def __init__(self, layout: Layout, numbers: Numbers) -> None:
        self.layout, self.lowest = layout, layout.blocks[0]
        self.leaves, self.tree = tree_flatten(numbers._replace(shard_scalars=[]))

    def recompute_last_update(
        self,
        raw: Tensor,
        fixed: Tensor,
        now: Tensor,
        scalars: Tensor,
        sums: Tensor,
        *vectors: Tensor,
    ) -> None:
        """Recompute one shard's last update, and store the state after it."""
        shard, into = self._both(vectors)
        last = self.layout.last_update(scalars, shard.last_w, shard.last_g, shard.state)
        state, own = recompute_last_update(self.lowest, raw, fixed, now, last, shard.w, shard.g)
        if self.lowest.recomputes:
            self._store(scalars, into, state)
        sums += own

    def update_hyperparameters(self, sums: Tensor, *leaves: Tensor) -> None:
        """Update the hyperparameters of all levels."""
        for group in self.layout.processes:
            sums = sum_over(group, sums)
        numbers = tree_unflatten(leaves, self.tree)
        new = update_hyperparameters(self.layout.blocks, numbers, sums[:-1], sums[-1])
        for old, value in zip(leaves, tree_leaves(new), strict=True):
            if value is not old:
                old.copy_(value)

    def update_weights(
        self, raw: Tensor, fixed: Tensor, scalars: Tensor, finite: Tensor, *vectors: Tensor
    ) -> None:
        """Update one shard's weights and state."""
        shard, into = self._both(vectors)
        state = self.layout.last_update(scalars, None, None, shard.state).state
        w, state = update_weights(self.lowest, raw, fixed, shard.w, shard.g, state, finite)
        if self.lowest.tuned:
            scalars[:1].copy_(finite)
        if not self.lowest.recomputes:
            self._store(scalars, into, state)
        if into.last_g is not None:
            into.last_g.copy_(shard.g)
        if into.last_w is not None:
            into.last_w.copy_(shard.w)
        into.w.copy_(w)

    def _both(self, tensors: Iterable[Tensor]) -> tuple[Vectors, Vectors]:
        each = iter(tensors)
        return self._vectors(each), self._vectors(each)

    def _vectors(self, tensors: Iterator[Tensor]) -> Vectors:
        """The inverse of `Vectors.flat`."""
        w, g = next(tensors), next(tensors)
        last_w = next(tensors) if self.lowest.keeps_weights else None
        last_g = next(tensors) if self.lowest.recomputes else None
        names = [name for name, vector in self.layout.states[0].items() if vector]
        return Vectors(w, g, last_w, last_g, {name: next(tensors) for name in names})

    def _store(self, scalars: Tensor, into: Vectors, state: State) -> None:
        for name, value in into.state.items():
            value.copy_(state[name])
        if len(scalars) > 1:
            counters = [name for name, vector in self.layout.states[0].items() if not vector]
            scalars[1:].copy_(torch.stack([state[name] for name in counters]))


class Step:
    """One step of a stack.

    Args:
        layout: the structure of the stack and its shards.
        numbers: views of `packed`.
        shards: examples of the vectors of later calls.
        make: makes a function that runs a part. Its arguments are the name of the part, the part,
            and examples of the part's small tensors and vectors.
    """

    def __init__(
        self, layout: Layout, numbers: Numbers, shards: Sequence[Vectors], make: Make
    ) -> None:
        lowest, parts = layout.blocks[0], Parts(layout, numbers)
        if not lowest.rule.compiles:
            load_forward_mode()
        tuned = [owner.places(lowest.tuned) for owner in layout.owners]
        fixed = [owner.places(lowest.fixed) for owner in layout.owners]
        self.tuned = Gather(tuned, numbers.raw[0][0])
        self.fixed = Gather(fixed, numbers.fixed[0][0])
        self.last_fixed = Gather(fixed, numbers.last_fixed)
        self.sums = Sums(tuned, numbers.raw[0][0], lowest.rows)

        # The small tensors of each call. Every step uses the same memory.
        scalars, finite = numbers.shard_scalars, [numbers.grads_finite] * len(shards)
        own = self.tuned.parts
        fixed_then, fixed_now = self.last_fixed.parts, self.fixed.parts
        self.small_to_recompute = [
            *zip(own, fixed_then, fixed_now, scalars, self.sums.parts, strict=True)
        ]
        self.small_to_tune = [self.sums.whole, *parts.leaves]
        self.small_to_move = [*zip(own, fixed_now, scalars, finite, strict=True)]

        vectors = [shard.flat() for shard in shards]
        self.tune_run: Run | None = None
        self.recompute_runs: list[Run] = []
        if lowest.tuned:
            self.recompute_runs = [
                make("recompute_last_update", parts.recompute_last_update, *tensors)
                for tensors in zip(self.small_to_recompute, vectors, strict=True)
            ]
            name, tune = "update_hyperparameters", parts.update_hyperparameters
            self.tune_run = make(name, tune, self.small_to_tune, [])
        self.move_runs = [
            make("update_weights", parts.update_weights, *tensors)
            for tensors in zip(self.small_to_move, vectors, strict=True)
        ]

    def __call__(self, shards: Sequence[Vectors]) -> None:
        """Make a step. It writes to all numbers, and to all vectors of the shards except ``g``."""
        vectors = [shard.flat() for shard in shards]
        self.tuned.read()
        self.fixed.read()
        if self.tune_run is not None:
            self.last_fixed.read()
            self.sums.clear()
            for i, run in enumerate(self.recompute_runs):
                run(self.small_to_recompute[i], vectors[i])
            self.sums.add()
            self.tune_run(self.small_to_tune, [])
            self.tuned.read()
        # In reverse order: the shard that was read last is most likely still in the cache.
        for i in reversed(range(len(vectors))):
            self.move_runs[i](self.small_to_move[i], vectors[i])


def code_of(block: Block) -> Hashable:
    """The fingerprint of a block's rule and domains. It changes when their code is edited."""
    return fingerprint(type(block.rule), *(how.domain for how in block.rule.tuned.values()))


def structure_of(layout: Layout) -> tuple:
    """The key of a layout's kernels: everything they depend on, except numbers and shards."""
    code = tuple(map(code_of, layout.blocks))
    return code, *(block.structure for block in layout.blocks), layout.processes


def eager_step(layout: Layout, numbers: Numbers, shards: Sequence[Vectors]) -> Step:
    """Make a step that is not compiled."""

    def make(name: str, part: Part, small: Any, vectors: Any) -> Run:
        return lambda small, vectors: part(*small, *vectors, *vectors)

    return Step(layout, numbers, shards, make)


def compiled_step(layout: Layout, numbers: Numbers, shards: Sequence[Vectors]) -> Step | None:
    """Make a compiled step, or return None if it cannot be compiled.

    The first failure of the compiler gives a warning. This process then does not try again. If a
    rule cannot be traced, it does not try again for stacks of the same structure.
    """
    structure = structure_of(layout)
    if not compiler.enabled() or _broken or structure in _untraced:
        return None
    lowest = layout.blocks[0]
    of_shard = code_of(lowest), lowest.kind
    kernels: list[compiler.Kernel] = []

    def make(name: str, part: Part, small: Sequence[Tensor], vectors: Sequence[Tensor]) -> Run:
        # Run eagerly if this process has no elements of a shard: no kernel takes length 0.
        if vectors and not (vectors[0].numel() and lowest.rule.compiles):
            return lambda small, vectors: part(*small, *vectors, *vectors)
        key = of_shard if vectors else structure
        kernel = compiler.compiled(name, part, key, small, vectors)
        kernels.append(kernel)
        return kernel

    try:
        with torch.no_grad():
            step = Step(layout, numbers, shards, make)
            for kernel in kernels:  # the first call compiles all of them
                kernel.ready()
            return step
    except compiler.Untraced as error:
        _untraced.add(structure)
        warn_user(
            f"the steps of {lowest.rule.name} could not be compiled ({error}); they run "
            "eagerly, which computes the same and is slower. A compiled update may not branch on "
            "the values of a tensor: use torch.where in place of if."
        )
    except Exception as error:  # any error of a missing or broken compiler
        _broken.append(compiler.reason(error))
        warn_user(
            f"the optimizer's steps could not be compiled ({_broken[0]}); they run eagerly, "
            "which computes the same and is slower. On a CPU, compiling needs a C++ compiler "
            "such as g++."
        )
    return None


class Gather:
    """Gather the values of each shard's owner. With a single owner they are views.

    Args:
        places: for each shard, the indices of its owner's values.
        values: all values, a view of `packed`.

    Attributes:
        parts: the values of each shard, as of the last `read`.
    """

    def __init__(self, places: Sequence[Sequence[int]], values: Tensor) -> None:
        self.values = values
        self.parts: Sequence[Tensor] = [values] * len(places)
        self.index: Tensor | None = None
        if not _is_one_owner(places, len(values)):
            self.index = _index([i for own in places for i in own], values)
            self.copies = values.index_select(0, self.index)
            self.parts = self.copies.split([len(own) for own in places])

    def read(self) -> None:
        if self.index is not None:
            torch.index_select(self.values, 0, self.index, out=self.copies)


class Sums:
    """Sum the results of `recompute_last_update` over all shards.

    Args:
        places: for each shard, the indices of its owner's raw values.
        raw: all raw values.
        rows: the number of sums for each raw value.

    Attributes:
        parts: for each shard, the vector to which it adds its numbers.
        whole: the sums for `combine_estimate`, and the sum of the largest squared gradients.
    """

    def __init__(self, places: Sequence[Sequence[int]], raw: Tensor, rows: int) -> None:
        size = rows * len(raw)
        self.whole = raw.new_zeros(size + 1)
        self.parts: Sequence[Tensor] = [self.whole] * len(places)
        self.index: Tensor | None = None
        if not _is_one_owner(places, len(raw)):
            starts = range(0, size, len(raw) or 1)
            owned = [[*(start + i for start in starts for i in own), size] for own in places]
            self.index = _index([i for own in owned for i in own], raw)
            self.pieces = raw.new_zeros(len(self.index))
            self.parts = self.pieces.split([len(own) for own in owned])

    def clear(self) -> None:
        self.whole.zero_()
        if self.index is not None:
            self.pieces.zero_()

    def add(self) -> None:
        if self.index is not None:
            self.whole.index_add_(0, self.index, self.pieces)


def _is_one_owner(places: Sequence[Sequence[int]], n: int) -> bool:
    """Whether all shards use all n values, in order."""
    return all(list(own) == [*range(n)] for own in places)


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(places, dtype=torch.long, device=like.device)
