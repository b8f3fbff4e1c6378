"""Kernels: pure functions of tensors, traced with their derivatives and compiled.

A function is traced, with its derivatives, into a graph of plain tensor operations, which Inductor
compiles. It is traced only once, and has no guards. The length of the vectors is a symbol. So a
kernel depends on the rule, the dtype and the device, but not on the size.

Vectors are changed in place. Inductor would write new values to temporary memory first, in case
another operation still reads the old values. So a kernel is compiled with separate vectors to read
and to write, and is then called with the same vectors for both. This is correct if each element is
read before it is written, as in a loop over elements. `_works_in_place` tests this for each kernel.
A kernel that fails the test is compiled again with a single set of vectors. The tests must not use
collectives: other ranks may not be running them.
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

_compiled: dict[tuple, Any] = {}  # a kernel, or None if each length has its own kernel


class Kernel:
    """A compiled function; see `compiled`.

    `ready`, or the first call, runs the C++ compiler on this kernel and all pending kernels.
    """

    def __init__(self, making: Callable[[], Run], sized: bool) -> None:
        self._making: Callable[[], Run] | None = making
        self._sized = sized  # whether its first argument is the length of the vectors
        self._run: Run

    def ready(self) -> Kernel:
        """Finish compiling. Returns the kernel itself.

        Raises:
            Exception: an error of a missing or broken compiler.
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
    """Get the kernel of a function of small tensors and of vectors of equal length.

    A process makes one kernel for each name, key, dtypes and devices. It works for vectors of any
    length except 0. Kernels are pending until one of them is called or made `ready`. All pending
    kernels are then compiled together, which takes little longer than compiling one.

    Args:
        name: the name of the function.
        function: takes the small tensors, the vectors to read, and the same vectors to write. It
            may also write to the small tensors. Its result is ignored.
        key: everything else that the function depends on.
        small: example arguments, with the shapes of later calls.
        vectors: example arguments, of any equal length.

    Raises:
        Untraced: torch could not trace the function.
        Exception: an error of a missing or broken compiler.
    """
    threads = torch.get_num_threads() if small[0].device.type == "cpu" else None
    of_small = tuple((t.shape, t.dtype, t.device) for t in small)
    of_vectors = tuple((t.dtype, t.device) for t in vectors)
    whole = name, key, of_small, of_vectors, threads
    shapes = [t.shape for t in vectors]
    with compiling():
        if any(shape != shapes[0] or len(shape) > 1 for shape in shapes):
            _compiled.setdefault(whole, None)  # the rule is not elementwise
        if whole not in _compiled:
            try:
                _compiled[whole] = _kernel(function, of_small, of_vectors, None)
            except Sized:
                _compiled[whole] = None
        kernel, n = _compiled[whole], vectors[0].numel() if vectors else 0
        if kernel is not None and n < 1 << 31:  # above this, a GPU needs 64-bit indices
            return kernel
        # A kernel for this length or shape only.
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
    """Start to make a kernel.

    Args:
        function: as for `compiled`.
        small: (shape, dtype, device) of each small tensor.
        vectors: (dtype, device) of each vector.
        shapes: the shapes of the vectors; None for 1-D vectors of any length.
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
    """Whether a kernel that writes to the vectors it reads gives the same results, bit by bit.

    The reference call writes to separate vectors with other numbers. All numbers are between 0.1
    and 0.9, so that the result depends on each of them. With a beta of 1, for example, Adam moves
    nothing.
    """
    device = small[0][2]
    generator = torch.Generator(device).manual_seed(0)  # do not change the user's generator

    def draw(shape: Any, dtype: torch.dtype, on: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=on).uniform_(0.1, 0.9, generator=generator)

    # Lengths 1 and 4099: neither divides evenly into vector registers or threads.
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
    """Whether torch's environment variables allow compiling."""
    switches = "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"
    return not any(os.environ.get(switch) == "1" for switch in switches)
