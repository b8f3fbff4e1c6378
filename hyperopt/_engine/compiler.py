"""Kernels: pure functions of tensors, traced with their derivatives and compiled.

A function is traced into a graph of plain tensor operations, in which differentiation is already
done, and the graph goes to Inductor. Nothing is guarded or traced again afterwards. The length of
the vectors is a symbol: a kernel belongs to what a rule computes, to a dtype and a device, and to
no size.

Vectors are changed in place. Inductor would write their new values elsewhere first, in case
something still has to read the old ones. So a kernel is compiled to write to other vectors than it
reads, and is then given the same ones. That is right if each element is read before it is written,
as in a loop over the elements. `_works_in_place` tests this for each kernel. A kernel that fails is
compiled again, for one set of vectors. The tests use no collectives: other ranks may not be running
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_private import (
    Run,
    Sized,
    Untraced,
    compile_sized,
    compiling,
    direct,
    reason,
)

__all__ = ["Untraced", "reason"]

_compiled: dict[tuple, Any] = {}  # a kernel, or None where each length has its own


class Kernel:
    """A compiled function; see `compiled`.

    `ready` lets the C++ compiler work on it and on all others that were asked for, and so does the
    first call.
    """

    def __init__(self, making: Callable[[], Run], sized: bool) -> None:
        self._making: Callable[[], Run] | None = making
        self._sized = sized  # whether its first argument is the length of the vectors
        self._run: Run

    def ready(self) -> Kernel:
        """Wait until it can be called.

        Raises:
            Exception: whatever a missing or broken compiler raises.
        """
        with compiling():
            if self._making is not None:
                self._run = self._making()
                self._making = None
        return self

    def __call__(self, small: Sequence[Tensor], vectors: Sequence[Tensor] = ()) -> None:
        if self._making is not None:
            self.ready()
        if self._sized:
            self._run([vectors[0].numel(), *small, *vectors])
        else:
            self._run([*small, *vectors])


def compiled(
    name: str,
    function: Callable[..., Any],
    key: Hashable,
    small: Sequence[Tensor],
    vectors: Sequence[Tensor] = (),
) -> Kernel:
    """The kernel of a function of small tensors and of vectors of one length.

    It is made once in this process for each name, key and kind of tensors, and serves vectors of
    any length but 0. Those that are asked for before the first is called or made `ready` are given
    to the C++ compiler together, which takes little longer than for one.

    Args:
        name: what the function does.
        function: takes the small tensors, the vectors to read, and the same vectors to write. It
            may write to the small ones, too. What it returns is lost.
        key: what the function depends on beside its arguments.
        small: tensors like those that it will be given, of the same shapes.
        vectors: the same, of any one length.

    Raises:
        Untraced: torch could not make a graph of the function.
        Exception: whatever a missing or broken compiler raises.
    """
    threads = torch.get_num_threads() if small[0].device.type == "cpu" else None
    of_small = tuple((t.shape, t.dtype, t.device) for t in small)
    of_vectors = tuple((t.dtype, t.device) for t in vectors)
    whole = name, key, of_small, of_vectors, threads
    shapes = [t.shape for t in vectors]
    with compiling():
        if any(shape != shapes[0] or len(shape) > 1 for shape in shapes):
            _compiled.setdefault(whole, None)  # of a rule that is not elementwise
        if whole not in _compiled:
            try:
                _compiled[whole] = _kernel(function, of_small, of_vectors, None)
            except Sized:
                _compiled[whole] = None
        kernel, n = _compiled[whole], vectors[0].numel() if vectors else 0
        if kernel is not None and n < 1 << 31:  # from there on a GPU needs other numbers
            return kernel
        # Each length, or shape, has a kernel of its own.
        own = (*whole, *shapes)
        if own not in _compiled:
            _compiled[own] = _kernel(function, of_small, of_vectors, shapes)
        return _compiled[own]


def _kernel(
    function: Callable[..., Any],
    small: Sequence[tuple],
    vectors: Sequence[tuple],
    shapes: Sequence[torch.Size] | None,
) -> Kernel:
    """A kernel that is being made.

    Args:
        small, vectors: what the tensors are like.
        shapes: of the vectors; None for 1-D ones of any length.
    """
    first, end = len(small), len(small) + len(vectors)

    def start(function: Callable[..., Any], times: int) -> Callable[[], Run]:
        return compile_sized(function, small, [*vectors] * times, shapes and [*shapes] * times)

    wait = start(function, 2)

    def finish() -> Run:
        run = wait()
        if not vectors or _works_in_place(run, small, vectors, shapes):
            return direct(run, small, [*vectors] * 2, shapes and [*shapes] * 2, len(vectors))
        careful = start(lambda *t: function(*t, *t[first:end]), 1)()
        return direct(careful, small, vectors, shapes, 0)

    return Kernel(finish, bool(vectors) and shapes is None)


def _works_in_place(
    run: Run,
    small: Sequence[tuple],
    vectors: Sequence[tuple],
    shapes: Sequence[torch.Size] | None,
) -> bool:
    """Whether writing to the vectors that are read gives the same results, bit by bit.

    The reference writes to other vectors, which hold other numbers. All numbers are between 0.1 and
    0.9, so that the result depends on each; with a beta of 1, for example, Adam moves nothing.
    """
    device = small[0][2]
    generator = torch.Generator(device).manual_seed(0)  # the user's is left alone

    def draw(shape: Any, dtype: torch.dtype, on: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=on).uniform_(0.1, 0.9, generator=generator)

    # One element, and a number that leaves a rest when it is cut into equal parts.
    for given in ([(1,)] * len(vectors), [(4099,)] * len(vectors)) if shapes is None else (shapes,):
        old, other = (
            [draw(shape, *kind) for shape, kind in zip(given, vectors, strict=True)]
            for _ in range(2)
        )
        numbers = [draw(*kind) for kind in small]
        new, same, also = ([t.clone() for t in each] for each in (other, old, numbers))
        size = [*given[0]] if shapes is None else []
        run([*size, *numbers, *old, *new])
        run([*size, *also, *same, *same])
        pairs = zip(new, same, other, strict=True)
        written = [(a, b) for a, b, before in pairs if a.ne(before).any()]
        if not all(
            torch.allclose(a, b, rtol=0, atol=0)  # and neither is NaN
            for a, b in [*written, *zip(numbers, also, strict=True)]
        ):
            return False
    return True


def kernel_count() -> int:
    """The number of optimizer kernels that this process has compiled."""
    return sum(kernel is not None for kernel in _compiled.values())


def enabled() -> bool:
    """Whether torch's own switches allow to compile."""
    switches = "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"
    return not any(os.environ.get(switch) == "1" for switch in switches)
