"""The compiled step: the pure step, traced with its derivatives, as one kernel.

The step is traced into a graph of plain tensor operations, in which differentiation is already
done, and the graph goes to Inductor. Nothing is guarded or traced again afterwards: a compiled step
belongs to a layout, and layouts that differ in numbers alone share one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .layout import Layout, Vectors

Step = Callable[[Tensor, Sequence[Vectors]], Any]

_compiled: dict[tuple, Step] = {}
_broken: list[str] = []  # why compiling failed, once it has


def compiled(layout: Layout, packed: Tensor, shards: Sequence[Vectors]) -> Step | None:
    """`Layout.step`, compiled for this layout, or None where no compiler works.

    The first failure is a warning; after it, this process does not try again.
    """
    key = (
        tuple(block.structure() for block in layout.blocks),
        layout.sizes,
        packed.device,
        packed.dtype,
        *(shard.w.dtype for shard in shards),
        torch.get_num_threads() if packed.device.type == "cpu" else None,
    )
    if key not in _compiled and not _broken:
        try:
            _compiled[key] = _compile(layout, packed, shards)
        except Exception as error:  # whatever a missing or broken compiler raises
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            _broken.append(f"{type(error).__name__}: {reason}")
            warnings.warn(
                f"the optimizer's steps could not be compiled ({_broken[0]}); they run eagerly, "
                "which computes the same and is slower. On a CPU, compiling needs a C++ compiler "
                "such as g++.",
                stacklevel=5,  # compiled, step, and the two wrappers that torch puts around step
            )
    return _compiled.get(key)


def _compile(layout: Layout, packed: Tensor, shards: Sequence[Vectors]) -> Step:
    from torch import _inductor

    names = [name for name, vector in layout.states[0].items() if vector]

    def flat_step(packed: Tensor, *tensors: Tensor) -> None:
        each = iter(tensors)
        inputs = []
        for shard in shards:
            last_w = None if shard.last_w is None else next(each)
            w, g, last_g = next(each), next(each), next(each)
            inputs.append(Vectors(w, g, last_w, last_g, {name: next(each) for name in names}))
        layout.step(packed, inputs)

    arguments: list[Any] = [packed, *(tensor for shard in shards for tensor in shard.flat())]
    with torch.no_grad():
        graph = make_fx(flat_step, tracing_mode="fake")(*arguments)
        _realize_scalars(graph)
        run = _inductor.compile(graph, arguments)

    def call(packed: Tensor, shards: Sequence[Vectors]) -> Any:
        return run(packed, *[tensor for shard in shards for tensor in shard.flat()])

    return call


def _realize_scalars(graph: fx.GraphModule, large: int = 256) -> None:
    """Make the scalars that a vector operation reads outputs of the graph.

    Inductor writes outputs to memory. Without that it repeats the arithmetic of a scalar, powers
    included, for each element of the vector.
    """

    def numel(node: fx.Node) -> int:
        value = node.meta.get("val")
        return value.numel() if isinstance(value, Tensor) else 0

    scalars = [
        node
        for node in graph.graph.nodes
        if node.op == "call_function"
        and node.all_input_nodes
        and numel(node) == 1
        and any(numel(user) >= large for user in node.users)
    ]
    graph.graph.output_node().args = (tuple(scalars),)
    graph.recompile()
