"""The compiled step: the pure step, traced with its derivatives, as one kernel.

The step is traced into a graph of plain tensor operations, in which differentiation is already
done, and the graph goes to Inductor. Nothing is guarded or traced again afterwards: a compiled step
belongs to a layout, and layouts that differ in numbers alone share one.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    name = "step", _structure(layout), layout.owners, layout.sizes
    run = _kernel(name, step, packed, *(t for s in shards for t in s.flat()))
    return lambda packed, shards: run(packed, *[t for shard in shards for t in shard.flat()])


def _kernel_by_shard(layout: Layout, packed: Tensor, shards: Sequence[Vectors]) -> Step:
    structure = _structure(layout)
    parts = layout.parts(packed)
    raw, fixed, last_fixed = parts.raw[0][0], parts.fixed[0][0], parts.last_fixed
    of_raw = _Gather(layout.tuned, raw)
    of_fixed = _Gather(layout.fixed, fixed)
    replays, advances = [], []
    everything = zip(of_raw(raw), of_fixed(fixed), parts.small, shards, strict=True)
    for own, constant, small, shard in everything:
        # Clones: stand-ins for views would say that they share the memory of something unknown.
        numbers = own.clone(), constant.clone()
        vectors = shard.flat()

        def replay(
            own: Tensor, constant: Tensor, small: Tensor, *tensors: Tensor, of: Vectors = shard
        ) -> Tensor:
            return layout.replay(own, constant, small, _regroup(layout, of, iter(tensors)))

        def advance(
            own: Tensor,
            constant: Tensor,
            going: Tensor,
            small: Tensor,
            *tensors: Tensor,
            of: Vectors = shard,
        ) -> None:
            layout.advance(own, constant, going, small, _regroup(layout, of, iter(tensors)))

        lowest = layout.blocks[0]
        kind = type(lowest.rule), *structure[0][:4], bool(lowest.tuned), len(shard.w)
        own_small = small.clone()
        replays.append(_kernel(("replay", *kind), replay, *numbers, own_small, *vectors))
        going = parts.going.clone()
        advances.append(_kernel(("advance", *kind), advance, *numbers, going, own_small, *vectors))

    climb = _kernel(
        ("climb", structure),
        lambda *tensors: layout.climb(*tensors),
        packed,
        torch.zeros_like(raw),
        torch.zeros_like(parts.steps),
    )

    def step(packed: Tensor, shards: Sequence[Vectors]) -> None:
        vectors = [shard.flat() for shard in shards]
        everything = [*zip(parts.small, vectors, strict=True)]
        numbers = zip(of_raw(raw), of_fixed(last_fixed), everything, strict=True)
        found = [run(a, b, c, *d)[0] for run, (a, b, (c, d)) in zip(replays, numbers, strict=True)]
        climb(packed, *of_raw.total(found))
        numbers = zip(of_raw(raw), of_fixed(fixed), everything, strict=True)
        for run, (a, b, (c, d)) in zip(advances, numbers, strict=True):
            run(a, b, parts.going, c, *d)

    return step


class _Gather:
    """The values of each shard's owner; all of them, where all shards are of one owner, are a view.

    Args:
        places: for each shard those of its values.
        values: a vector like those that will be gathered from.
    """

    def __init__(self, places: Sequence[Sequence[int]], values: Tensor) -> None:
        def index(rows: Iterable[Sequence[int]]) -> Tensor:
            return torch.tensor([i for row in rows for i in row], device=values.device).long()

        self.counts = [len(own) for own in places]
        self.n = len(values)
        self.shared = all(list(own) == [*range(self.n)] for own in places)
        self.index = index(places)
        self.index_of_parts = index([*own, self.n] for own in places)

    def __call__(self, values: Tensor) -> Sequence[Tensor]:
        if self.shared:
            return [values] * len(self.counts)
        return values.index_select(0, self.index).split(self.counts)

    def total(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`Layout.total`, in as few calls as may be."""
        if self.shared:
            whole = torch.stack([*parts]).sum(0)
        else:
            whole = parts[0].new_zeros(self.n + 1)
            whole.index_add_(0, self.index_of_parts, torch.cat([*parts]))
        return whole[:-1], whole[-1]


def _structure(layout: Layout) -> tuple:
    return tuple(block.structure() for block in layout.blocks)


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
