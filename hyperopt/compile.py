"""The compiled step: the pure step, traced with its derivatives, as one kernel.

The step is traced into a graph of plain tensor operations, in which differentiation is already
done, and the graph goes to Inductor. Nothing is guarded or traced again afterwards: a compiled step
belongs to a layout, and layouts that differ in numbers alone share one.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .layout import Layout, Vectors

Step = Callable[[Tensor, Sequence[Vectors]], Any]
Kernel = Callable[..., Any]

# Up to this many shards a step is one kernel; with more of them, each shard has kernels of its own,
# which shards of the same size share. That costs a few calls more, and compiles much faster.
TOGETHER = 4

_compiled: dict[tuple, Kernel] = {}
_broken: list[str] = []  # why compiling failed, once it has


def compiled(layout: Layout, packed: Tensor, shards: Sequence[Vectors]) -> Step | None:
    """`Layout.step`, compiled for this layout, or None where no compiler works.

    The first failure is a warning; after it, this process does not try again.
    """
    if _broken:
        return None
    try:
        with torch.no_grad():
            together = len(shards) <= TOGETHER
            return (_one_kernel if together else _kernel_by_shard)(layout, packed, shards)
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        _broken.append(f"{type(error).__name__}: {reason}")
        warnings.warn(
            f"the optimizer's steps could not be compiled ({_broken[0]}); they run eagerly, "
            "which computes the same and is slower. On a CPU, compiling needs a C++ compiler "
            "such as g++.",
            stacklevel=5,  # compiled, step, and the two wrappers that torch puts around step
        )
        return None


def _one_kernel(layout: Layout, packed: Tensor, shards: Sequence[Vectors]) -> Step:
    def step(packed: Tensor, *tensors: Tensor) -> None:
        each = iter(tensors)
        layout.step(packed, [_regroup(layout, shard, each) for shard in shards])

    run = _kernel(
        ("step", _structure(layout), layout.sizes),
        step,
        packed,
        *(t for s in shards for t in s.flat()),
    )
    return lambda packed, shards: run(packed, *[t for shard in shards for t in shard.flat()])


def _kernel_by_shard(layout: Layout, packed: Tensor, shards: Sequence[Vectors]) -> Step:
    structure = _structure(replace(layout, sizes=()))
    replays, advances = [], []
    everything = zip(shards, layout.counters(packed), layout.blocks[0].owners, strict=True)
    for shard, counters, owner in everything:
        arguments = counters.clone(), *shard.flat()

        def replay(
            packed: Tensor, counters: Tensor, *tensors: Tensor, of: Vectors = shard, by: Any = owner
        ) -> Tensor:
            own = _regroup(layout, of, iter(tensors))
            return layout.replay(packed, counters, own, by, moved=True)

        def advance(
            packed: Tensor, counters: Tensor, *tensors: Tensor, of: Vectors = shard, by: Any = owner
        ) -> None:
            layout.advance(packed, counters, _regroup(layout, of, iter(tensors)), by)

        key = structure, len(shard.w), owner
        replays.append(_kernel(("replay", *key), replay, packed, *arguments))
        advances.append(_kernel(("advance", *key), advance, packed, *arguments))

    hypergradient = torch.zeros_like(layout.lowest(packed)[0])
    climb = _kernel(
        ("climb", structure), lambda *tensors: layout.climb(*tensors), packed, hypergradient
    )

    def step(packed: Tensor, shards: Sequence[Vectors]) -> None:
        inputs = [
            (packed, counters, *shard.flat())
            for counters, shard in zip(layout.counters(packed), shards, strict=True)
        ]
        parts = [run(*own)[0] for run, own in zip(replays, inputs, strict=True)]
        climb(packed, torch.stack(parts).sum(0))
        for run, own in zip(advances, inputs, strict=True):
            run(*own)

    return step


def _structure(layout: Layout) -> tuple:
    return tuple(block.structure() for block in layout.blocks), layout.sizes, layout.processes


def _regroup(layout: Layout, like: Vectors, tensors: Iterator[Tensor]) -> Vectors:
    """The inverse of `Vectors.flat`."""
    last_w = None if like.last_w is None else next(tensors)
    last_g = None if like.last_g is None else next(tensors)
    w, g = next(tensors), next(tensors)
    names = [name for name, vector in layout.states[0].items() if vector]
    return Vectors(w, g, last_w, last_g, {name: next(tensors) for name in names})


def _kernel(name: tuple, function: Callable[..., Any], *arguments: Tensor) -> Kernel:
    """A function of these tensors, compiled once in this process for each name and kind of them."""
    kinds = tuple((tensor.dtype, tensor.device) for tensor in arguments)
    key = (*name, kinds, torch.get_num_threads() if arguments[0].device.type == "cpu" else None)
    if key not in _compiled:
        _compiled[key] = _compile(function, arguments)
    return _compiled[key]


def _compile(function: Callable[..., Any], arguments: Sequence[Tensor]) -> Kernel:
    graph = make_fx(function, tracing_mode="fake")(*arguments)
    _realize_scalars(graph)
    return compile_graph(graph, arguments)


def compile_graph(graph: fx.GraphModule, arguments: Sequence[Tensor]) -> Kernel:
    """A graph of tensor operations, compiled by Inductor for arguments like these.

    Raises:
        Exception: whatever a missing or broken compiler raises.
    """
    from torch import _inductor
    from torch._guards import TracingContext, tracing
    from torch._inductor import cpu_vec_isa
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor looks into its cache on disk only where there is an environment of shapes; it need
    # not be told that the shapes are fixed if the arguments are stand-ins of fixed shapes already.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    stand_ins: list[Any] = [mode.from_tensor(t, static_shapes=True) for t in arguments]

    def attempt(options: dict[str, Any]) -> Kernel:
        with tracing(TracingContext(mode)):
            return _inductor.compile(graph, stand_ins, options)

    try:
        # Taking the C++ compiler's word for what this processor can do saves the ten seconds in
        # which Inductor would try all of its instruction sets, once on each machine.
        return attempt({"cpp.vec_isa_ok": True})
    except Exception:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        return attempt({})


def _realize_scalars(graph: fx.GraphModule, large: int = 256) -> None:
    """Make the scalars that a vector operation reads outputs of the graph.

    Inductor writes outputs to memory. Without that it repeats the arithmetic of a scalar, powers
    included, for each element of the vector.
    """

    def numel(node: fx.Node) -> int:
        value = node.meta.get("val")
        return value.numel() if isinstance(value, Tensor) else 0

    def is_view(node: fx.Node) -> bool:
        return node.target is operator.getitem or getattr(node.target, "is_view", False)

    def meets_vector(node: fx.Node) -> bool:
        return any(
            meets_vector(user) if is_view(user) else numel(user) >= large for user in node.users
        )

    scalars = [
        node
        for node in graph.graph.nodes
        if node.op == "call_function"
        and node.all_input_nodes
        and not is_view(node)
        and 0 < numel(node) < large
        and meets_vector(node)
    ]
    output = graph.graph.output_node()
    own = [output.args[0]] if isinstance(output.args[0], fx.Node) else []
    output.args = ((*own, *scalars),)
    graph.recompile()
