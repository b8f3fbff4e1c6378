"""The compiled step: the pure step, traced with its derivatives, as one kernel.

The step is traced into a graph of plain tensor operations, in which differentiation is already
done, and the graph goes to Inductor. Nothing is guarded or traced again afterwards: a compiled step
belongs to a layout, and layouts that differ in numbers alone share one.

Large vectors are changed in place. Inductor would first write their new values elsewhere, since
something might still have to read the old ones; so the kernel is told that it writes to other
vectors than it reads from, and is given the same ones. That is right if each element is read before
it is written, as in a loop over the elements; `_works_in_place` tries this out on each kernel, and
one for which it is wrong is compiled again, knowing what it does.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .layout import Layout, Parts, Vectors

Step = Callable[[Sequence[Vectors]], Any]
Kernel = Callable[..., Any]

# Up to this many shards a step is two kernels; with more of them, each shard has two of its own,
# which shards of the same size share. That costs a few calls more, and compiles much faster. So
# it is, too, where not always the same shards are moved: each set of them would have its own.
TOGETHER = 4

# Inductor writes to memory what is read twice and itself reads more than four things. To compute it
# twice saves a pass over memory, but not where a move is run again: the state that it leads to is
# written there in any case. In a graph of more nodes than this there would be no end to it.
FEW = 500

FLAGS = "_get_optimization_cflags"  # of Inductor: what gives the C++ compiler its -O3

_compiled: dict[tuple, Kernel] = {}
_broken: list[str] = []  # why compiling failed, once it has
_untraced: set[tuple] = set()  # the structures of stacks that have a rule which cannot be compiled


class Untraced(Exception):
    """What torch makes a graph of failed, which concerns no other rules than those in it."""


def _reason(error: Exception) -> str:
    lines = (line for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {next(lines, '')}"


def compiled(
    layout: Layout, parts: Parts, shards: Sequence[Vectors], always: bool = True
) -> Step | None:
    """`Layout.step` of these parts, compiled, or None where no compiler works.

    The first failure of the compiler is a warning; after it, this process does not try again. Nor
    does it where a rule cannot be traced, for the stacks that are like it.

    Args:
        always: whether these are all shards that were ever moved.
    """
    structure = _structure(layout)
    if _broken or structure in _untraced:
        return None
    try:
        with torch.no_grad():
            # The trial of a kernel must not call other processes, which may not be trying theirs.
            together = len(shards) <= TOGETHER and always and not layout.processes
            return (_all_at_once if together else _by_shard)(layout, parts, shards)
    except Untraced as error:
        _untraced.add(structure)
        warnings.warn(
            f"the steps of {layout.blocks[0].rule.name} could not be compiled ({error}); they run "
            "eagerly, which computes the same and is slower. An update that is compiled may not "
            "branch on what a tensor holds: write torch.where in place of if.",
            stacklevel=7,
        )
        return None
    except Exception as error:  # whatever a missing or broken compiler raises
        _broken.append(_reason(error))
        warnings.warn(
            f"the optimizer's steps could not be compiled ({_broken[0]}); they run eagerly, "
            "which computes the same and is slower. On a CPU, compiling needs a C++ compiler "
            "such as g++.",
            stacklevel=7,  # compiled, step, and the four wrappers that torch puts around step
        )
        return None


def _all_at_once(layout: Layout, parts: Parts, shards: Sequence[Vectors]) -> Step:
    leaves, tree = tree_flatten(parts)

    def half(do: Callable[..., None], *tensors: Tensor) -> None:
        each = iter(tensors)
        own = tree_unflatten([next(each) for _ in leaves], tree)
        do(own, *([_regroup(layout, shard, each) for shard in shards] for _ in range(2)))

    halves = [layout.tune, layout.move] if layout.blocks[0].tuned else [layout.move]
    vectors = [tensor for shard in shards for tensor in shard.flat()]
    name = _structure(layout), layout.owners, layout.sizes
    again = not layout.blocks[0].reruns
    kernels = [
        _kernel((do.__name__, *name), functools.partial(half, do), leaves, vectors, again)
        for do in halves
    ]

    def step(shards: Sequence[Vectors]) -> None:
        vectors = [tensor for shard in shards for tensor in shard.flat()]
        for run in kernels:
            run(*leaves, *vectors, *vectors)

    return step


def _by_shard(layout: Layout, parts: Parts, shards: Sequence[Vectors]) -> Step:
    lowest, structure = layout.blocks[0], _structure(layout)
    raw, fixed, last_fixed = parts.raw[0][0], parts.fixed[0][0], parts.last_fixed
    of_raw = _Gather(layout.tuned, raw, lowest.sums)
    of_fixed = _Gather(layout.fixed, fixed)
    again = not lowest.reruns
    replays, advances = [], []
    everything = zip(of_raw(raw), of_fixed(fixed), parts.small, shards, strict=True)
    for own, constant, small, shard in everything:

        def both(tensors: Sequence[Tensor], like: Vectors = shard) -> tuple[Vectors, Vectors]:
            each = iter(tensors)
            return _regroup(layout, like, each), _regroup(layout, like, each)

        def replay(a: Tensor, b: Tensor, c: Tensor, *tensors: Tensor, both: Any = both) -> Tensor:
            return layout.replay(a, b, c, *both(tensors))

        def advance(
            a: Tensor, b: Tensor, c: Tensor, d: Tensor, *tensors: Tensor, both: Any = both
        ) -> None:
            layout.advance(a, b, c, d, *both(tensors))

        kind = structure[0][:5], bool(lowest.tuned), len(shard.w)
        if lowest.tuned:
            numbers = [own, constant, small]
            replays.append(_kernel(("replay", *kind), replay, numbers, shard.flat(), again))
        numbers = [own, constant, parts.going, small]
        advances.append(_kernel(("advance", *kind), advance, numbers, shard.flat(), again))

    leaves, tree = tree_flatten(parts._replace(small=[]))

    def climb(sums: Tensor, largest: Tensor, *tensors: Tensor) -> None:
        layout.climb(tree_unflatten(tensors, tree), sums, largest)

    if lowest.tuned:
        sums = raw.repeat(lowest.sums)
        run_climb = _kernel(("climb", structure), climb, [sums, parts.steps, *leaves])

    def step(shards: Sequence[Vectors]) -> None:
        vectors = [shard.flat() * 2 for shard in shards]
        if lowest.tuned:
            numbers = zip(of_raw(raw), of_fixed(last_fixed), parts.small, strict=True)
            calls = zip(replays, numbers, vectors, strict=True)
            found = [run(*own, *tensors)[0] for run, own, tensors in calls]
            run_climb(*of_raw.total(found), *leaves)
        owners = zip(of_raw(raw), of_fixed(fixed), parts.small, strict=True)
        # Backwards: what was read last is the likeliest to be in the cache still.
        for run, (a, b, c), tensors in [*zip(advances, owners, vectors, strict=True)][::-1]:
            run(a, b, parts.going, c, *tensors)

    return step


class _Gather:
    """The values of each shard's owner; all of them, where all shards are of one owner, are a view.

    Args:
        places: for each shard those of its values.
        values: a vector like those that will be gathered from.
        rows: how many numbers there are to add up for each value.
    """

    def __init__(self, places: Sequence[Sequence[int]], values: Tensor, rows: int = 1) -> None:
        def index(rows: Iterable[Sequence[int]]) -> Tensor:
            return torch.tensor([i for row in rows for i in row], device=values.device).long()

        self.counts = [len(own) for own in places]
        self.n, self.sums = len(values), rows * len(values)
        self.shared = all(list(own) == [*range(self.n)] for own in places)
        self.index = index(places)
        starts = range(0, self.sums, self.n or 1)
        self.index_of_parts = index(
            [*(start + i for start in starts for i in own), self.sums] for own in places
        )

    def __call__(self, values: Tensor) -> Sequence[Tensor]:
        if self.shared:
            return [values] * len(self.counts)
        return values.index_select(0, self.index).split(self.counts)

    def total(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`Layout.total`, in as few calls as may be."""
        if self.shared:
            whole = torch.stack([*parts]).sum(0)
        else:
            whole = parts[0].new_zeros(self.sums + 1)
            whole.index_add_(0, self.index_of_parts, torch.cat([*parts]))
        return whole[:-1], whole[-1]


def _structure(layout: Layout) -> tuple:
    return *(block.structure() for block in layout.blocks), layout.processes


def _regroup(layout: Layout, like: Vectors, tensors: Iterator[Tensor]) -> Vectors:
    """The inverse of `Vectors.flat`."""
    w, g = next(tensors), next(tensors)
    last_w = None if like.last_w is None else next(tensors)
    last_g = None if like.last_g is None else next(tensors)
    names = [name for name, vector in layout.states[0].items() if vector]
    return Vectors(w, g, last_w, last_g, {name: next(tensors) for name in names})


def _kernel(
    name: tuple,
    function: Callable[..., Any],
    small: Sequence[Tensor],
    vectors: Sequence[Tensor] = (),
    again: bool = False,
) -> Kernel:
    """A function of tensors, compiled once in this process for each name and kind of them.

    Args:
        small: its first arguments.
        vectors: the others, which it is given twice: to read, and to write.
        again: whether it may compute something twice rather than keep it.
    """
    vectors = [*vectors]
    kinds = tuple((tensor.dtype, tensor.device) for tensor in (*small, *vectors))
    key = (*name, kinds, torch.get_num_threads() if small[0].device.type == "cpu" else None)
    if key not in _compiled:
        _compiled[key] = run = _compile(function, [*small, *vectors, *vectors], again)
        if vectors and not _works_in_place(run, small, vectors):
            n, once = len(small), len(small) + len(vectors)  # and not the vectors: this is kept
            careful = _compile(lambda *t: function(*t, *t[n:]), [*small, *vectors], again)
            _compiled[key] = lambda *tensors: careful(*tensors[:once])
    return _compiled[key]


def _compile(function: Callable[..., Any], arguments: Sequence[Tensor], again: bool) -> Kernel:
    from torch._functorch.compile_utils import fx_graph_cse

    # Clones, since arguments that are views, or are given twice, would be taken for one memory.
    arguments = [tensor.clone() for tensor in arguments]
    try:
        graph = trace(function, arguments)
    except ImportError:  # of a broken torch
        raise
    except Exception as error:
        raise Untraced(_reason(error)) from error
    # What is there twice is, for the most part, a move beside its own derivative.
    graph.graph = fx_graph_cse(graph.graph)
    _realize_scalars(graph)
    again = again and len(graph.graph.nodes) < FEW
    options = {"realize_reads_threshold": 16} if again else {}
    return compile_graph(graph, arguments, **options)


def _works_in_place(run: Kernel, small: Sequence[Tensor], vectors: Sequence[Tensor]) -> bool:
    """Whether writing to the vectors that are read gives the same results, bit by bit.

    They are compared with those of writing to others, which hold something else. All numbers are
    such that the result depends on each; with a beta of 1 Adam would not move anything.
    """
    generator = torch.Generator(small[0].device).manual_seed(0)  # the user's is left alone

    def draw(like: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty_like(t).uniform_(0.1, 0.9, generator=generator) for t in like]

    old, other, numbers = draw(vectors), draw(vectors), draw(small)
    new, same, also = ([t.clone() for t in each] for each in (other, old, numbers))
    run(*numbers, *old, *new)
    run(*also, *same, *same)
    written = [(a, b) for a, b, before in zip(new, same, other, strict=True) if a.ne(before).any()]
    return all(
        torch.allclose(a, b, rtol=0, atol=0)  # and neither is NaN
        for a, b in [*written, *zip(numbers, also, strict=True)]
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for garbage, which compiling makes little of, for a quarter of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def trace(function: Callable[..., Any], arguments: Sequence[Tensor]) -> fx.GraphModule:
    """The graph of what a function does to tensors like these; it writes to them at its end."""
    from torch._inductor.decomposition import select_decomp_table

    pure = torch.func.functionalize(function, remove="mutations")
    graph = make_fx(pure, select_decomp_table(), tracing_mode="fake")(*arguments)
    _read_first(graph)
    return graph


def _read_first(graph: fx.GraphModule) -> None:
    """Let what is kept of an argument as it was be copied before the argument is written to.

    At its end the graph writes to the arguments in their order. Inductor reads what is a mere copy
    of one only there.
    """
    aten = torch.ops.aten

    def memory(node: Any) -> int:
        while node.target is aten.copy.default:
            node = node.args[1]
        return node.meta["val"].untyped_storage()._cdata

    copies = [node for node in graph.graph.nodes if node.target is aten.copy_.default]
    written: dict[int, fx.Node] = {}
    for node in copies:
        target, source = node.args
        if memory(source) in written:
            written[memory(source)].prepend(node)
        written.setdefault(memory(target), node)
    graph.recompile()


@_uncollected()
def compile_graph(graph: fx.GraphModule, arguments: Sequence[Tensor], **options: Any) -> Kernel:
    """A graph from `trace`, compiled by Inductor for arguments like these.

    Args:
        options: of Inductor, beside our own.

    Raises:
        Exception: whatever a missing or broken compiler raises.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import codecache, config, cpp_builder, cpu_vec_isa
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor looks into its cache on disk only where there is an environment of shapes; it need
    # not be told that the shapes are fixed if the arguments are stand-ins of fixed shapes already.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    stand_ins: list[Any] = [mode.from_tensor(t, static_shapes=True) for t in arguments]

    # Where there is no GPU, Inductor reads all of Triton for a hash, and then leaves it out.
    unhashed: Any = contextlib.nullcontext()
    if not torch.cuda.is_available():
        unhashed = mock.patch.object(codecache, "triton_key", lambda: "", create=True)

    # Its loops are vectors already: the C++ compiler finds nothing more in twice the time.
    moderately: Any = contextlib.nullcontext()
    if flags := getattr(cpp_builder, FLAGS, None):

        def moderate(*args: Any) -> tuple[list[str], list[str]]:
            compiling, linking = flags(*args)
            return ["O2" if flag == "O3" else flag for flag in compiling], linking

        moderately = mock.patch.object(cpp_builder, FLAGS, moderate)

    def attempt(options: dict[str, Any]) -> Kernel:
        with (
            tracing(TracingContext(mode)),
            config.patch(options),
            V.set_fake_mode(mode),
            unhashed,
            moderately,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
            run = compile_fx_inner(graph, stand_ins, is_inference=True)
        return lambda *tensors: run([*tensors])

    options = {"size_asserts": False, **options}
    try:
        # Taking the C++ compiler's word for what this processor can do saves the ten seconds in
        # which Inductor would try all of its instruction sets, once on each machine.
        return attempt({"cpp.vec_isa_ok": True, **options})
    except Exception:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        return attempt(options)


def _realize_scalars(graph: fx.GraphModule, large: int = 256) -> None:
    """Make the scalars that a vector operation reads outputs of the graph, in its precision.

    Inductor writes outputs to memory. Without that it repeats the arithmetic of a scalar, powers
    and rounding included, for each element of the vector.
    """
    scalars: dict[tuple, fx.Node] = {}
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.numel() < large or node.op != "call_function":
            continue
        for scalar in node.all_input_nodes:
            number = scalar.meta["val"]
            if not isinstance(number, Tensor) or not number.is_floating_point():
                continue
            if number.numel() >= large:
                continue
            key = scalar, value.dtype
            if key not in scalars:
                with graph.graph.inserting_after(scalar):
                    convert = torch.ops.prims.convert_element_type.default
                    scalars[key] = graph.graph.call_function(convert, (scalar, value.dtype))
                scalars[key].meta["val"] = number.to(value.dtype)
            node.replace_input_with(scalar, scalars[key])
    output = graph.graph.output_node()
    own = [output.args[0]] if isinstance(output.args[0], fx.Node) else []
    output.args = ((*own, *scalars.values()),)
    graph.recompile()
