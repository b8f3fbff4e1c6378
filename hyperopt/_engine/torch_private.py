"""All that this package uses of torch's private parts, and the only place that does.

Each with the version that brought it:

- `torch.fx.experimental.symbolic_shapes`: ShapeEnv, DimDynamic (2.1)
- `torch._guards`: TracingContext, tracing (2.1); `torch._dynamo.source.ConstantSource` (2.1)
- `torch._subclasses.FakeTensorMode` (2.0)
- `torch._functorch.compile_utils.fx_graph_cse` (2.0)
- `torch._inductor.compile_fx.compile_fx_inner` (2.0), of whose result `current_callable` (2.2)
- `torch._inductor.decomposition.select_decomp_table` (2.0)
- `torch._inductor.virtualized.V` (2.0)
- `torch._inductor.config`: size_asserts (2.0)
- what saves time, and is passed over where it is not found: `codecache.triton_key`,
  `cpp_builder._get_optimization_cflags` and `.is_gcc` (2.6), `AsyncCompile.cpp_pybinding` and
  `CppPythonBindingsCodeCache.load_pybinding` (2.2),
  `codecache._get_cpp_prefix_header` (2.8), `cpu_vec_isa.valid_vec_isa_list`, `.x86_isa_checker`
  and `.supported_vec_isa_list` (2.5)
- `torch.utils._pytree`, `torch._decomp.decompositions_for_jvp` (2.0)
- of autograd, modes and lists: `torch._C._is_any_autocast_enabled`, `_len_torch_dispatch_stack`,
  `torch._subclasses.fake_tensor`, `torch._foreach_copy_`, `torch._disable_dynamo`,
  `Tensor._version` (2.0)
- of distributed training: `torch.ops._c10d_functional` (2.1), `DTensor._local_tensor` (2.0), and
  `_fsdp_flattened`, a mark of the parameters of a FullyShardedDataParallel (2.0)
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import operator
import platform
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["FakeTensor", "make_fx", "unset_fake_temporarily"]
__all__ += ["tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]

# The size with which a kernel of any size is made. Inductor asks for it where it has to decide what
# pays, such as whether to use several threads.
TYPICAL = 100_003

# In a process that compiles more kernels than this, headers are compiled in advance.
MANY = 8

FLAGS = "_get_optimization_cflags"  # of Inductor: what gives the C++ compiler its -O3

Run = Callable[[list], Any]

_lock = threading.RLock()  # held by whoever traces or compiles
_graphs = 0  # how many this process has compiled

copy_lists = torch._foreach_copy_
disable_dynamo = torch._disable_dynamo  # in a loop that is compiled as a whole


def local(tensor: Any) -> Tensor:
    """The part of a tensor that lies on this process: all of it, unless it is a DTensor."""
    return getattr(tensor, "_local_tensor", tensor)


def is_flattened(p: Tensor) -> bool:
    """Whether a parameter belongs to a FullyShardedDataParallel."""
    return getattr(p, "_fsdp_flattened", False)


def sum_over(group: str, tensor: Tensor) -> Tensor:
    """The sum over the members of a process group, as an operation that can be traced."""
    whole = torch.ops._c10d_functional.all_reduce(tensor, "sum", group)
    return torch.ops._c10d_functional.wait_tensor(whole)


def version_of(tensor: Tensor) -> int:
    """A number that grows with each operation that writes to the tensor's memory."""
    return tensor._version


def has_modes() -> bool:
    """Whether autocast or a dispatch mode, as FakeTensorMode, is on."""
    return bool(torch._C._is_any_autocast_enabled() or torch._C._len_torch_dispatch_stack())


class Untraced(Exception):
    """torch could not make a graph of this function. Other functions are not concerned."""


class Sized(Exception):
    """A function depends on the length of its vectors, and so cannot have one kernel for all."""


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {next(lines, '')}"


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """One thread at a time.

    And without looking for garbage, which compiling makes little of, for a quarter of its time.
    """
    with _lock:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def trace(function: Callable[..., Any], arguments: Sequence[Tensor]) -> fx.GraphModule:
    """The graph of what a function does to tensors like these; it writes to them at its end."""
    with compiling():
        return _trace(function, arguments, "fake")


def _trace(function: Callable[..., Any], arguments: Sequence[Any], mode: Any) -> fx.GraphModule:
    from torch._inductor.decomposition import select_decomp_table

    pure = torch.func.functionalize(function, remove="mutations")
    graph = make_fx(pure, select_decomp_table(), tracing_mode=mode)(*arguments)
    # Inductor asks for it, and has no name in its cache for a graph of which it is a part. A graph
    # has a class to itself.
    type(graph).shape_env = vars(graph).pop("shape_env", None)
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


def compile_graph(
    graph: fx.GraphModule, arguments: Sequence[Tensor], **options: Any
) -> Callable[..., Any]:
    """A graph from `trace`, compiled by Inductor for arguments like these.

    Args:
        options: of Inductor, beside our own.

    Raises:
        Exception: whatever a missing or broken compiler raises.
    """
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor looks into its cache on disk only where there is an environment of shapes; it need
    # not be told that the shapes are fixed if the arguments are stand-ins of fixed shapes already.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with compiling():
        stand_ins = [mode.from_tensor(t, static_shapes=True) for t in arguments]
        run = _start(graph, stand_ins, mode, options)()
    return lambda *tensors: run([*tensors])


def _start(
    graph: fx.GraphModule,
    stand_ins: Sequence[Any],
    mode: Any,
    options: dict[str, Any],
    together: bool = False,
) -> Callable[[], Run]:
    """Let Inductor generate code; returns what has it compiled.

    Args:
        mode: that of the stand-ins.
        options: of Inductor, beside our own.
        together: whether C++ functions are compiled with those of other graphs.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V

    separately, thread = AsyncCompile.cpp_pybinding, threading.get_ident()

    def collect(own: Any, types: list[str], source: str) -> Any:
        function = _Function(types, source)
        if threading.get_ident() != thread or not function.fits:
            return separately(own, types, source)
        _collected.append(function)
        return function

    def attempt(settings: Any, together: bool) -> Run:
        with (
            tracing(TracingContext(mode)),
            config.patch({"size_asserts": False, **options}),
            V.set_fake_mode(mode),
            settings,
            mock.patch.object(AsyncCompile, "cpp_pybinding", collect if together else separately),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
            run = compile_fx_inner(graph, stand_ins, is_inference=True)
        return getattr(run, "current_callable", None) or run

    try:
        run = attempt(_settings(), together)
    except Exception:
        _collected.clear()
        return lambda: attempt(contextlib.nullcontext(), False)

    def finish() -> Run:
        with contextlib.suppress(Exception):  # it is raised below, if it is not only of this way
            _compile_collected()
        if any(isinstance(f, _Function) and f.entry is None for f in _globals(run).values()):
            return attempt(contextlib.nullcontext(), False)
        return run

    return finish


def _globals(run: Run) -> dict[str, Any]:
    return getattr(getattr(run, "__func__", run), "__globals__", {})


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """What makes Inductor's work shorter. Where it does not do, Inductor is asked without it."""
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa

    with contextlib.ExitStack() as stack:

        def replace(module: Any, name: str, function: Callable[..., Any]) -> None:
            stack.enter_context(mock.patch.object(module, name, function, create=True))

        # Where there is no GPU, Inductor reads all of Triton for a hash, and then leaves it out.
        if not torch.cuda.is_available():
            replace(codecache, "triton_key", lambda: "")

        # Its loops are vectors already: the C++ compiler finds nothing more in twice the time. But
        # a loop over any number of elements ends with a rest, which has to be taken out of it.
        if flags := getattr(cpp_builder, FLAGS, None):

            def moderate(*args: Any) -> Any:
                found = flags(*args)  # from torch 2.9 on two lists, for compiling and for linking
                compiling = found[0] if isinstance(found, tuple) else found
                compiling[:] = ["O2" if flag == "O3" else flag for flag in compiling]
                if "O2" in compiling and cpp_builder.is_gcc():
                    compiling.append("fsplit-loops")
                return found

            replace(cpp_builder, FLAGS, moderate)

        # Taking the processor's word for what it can do saves the seconds in which Inductor would
        # let the C++ compiler try its instruction sets, once on each machine.
        if sets := _instruction_sets():
            replace(cpu_vec_isa, "valid_vec_isa_list", lambda: sets)

        # To compile the headers in advance takes as long as to compile four kernels with them.
        if _graphs < MANY:
            replace(codecache, "_get_cpp_prefix_header", lambda device: None)
        yield


class _Function:
    """A C++ function of Inductor's that is compiled together with others.

    Most of the compiler's time goes into the headers, which they have in common.
    """

    def __init__(self, types: Sequence[str], source: str) -> None:
        self.types = [kind.replace("const ", "").strip() for kind in types]
        self.body, found = re.subn(r'extern\s+"C"\s+void\s+kernel\s*\(', "static void @(", source)
        pointers = {i for i, kind in enumerate(self.types) if kind.endswith("*")}
        self.pointers = sorted(pointers)
        self.sizes = [i for i in range(len(types)) if i not in pointers]
        self.fits = found == 1 and all(self.types[i] == "int64_t" for i in self.sizes)
        self.entry: Callable[..., Any] | None = None  # takes its number, sizes, pointers
        self.number = self.spare_sizes = self.spare_pointers = 0

    def arrange(self, own: Sequence[Any], keep: Callable[[Any], Any]) -> list:
        """Its arguments as ``entry`` takes them; what stands for a constant is made by ``keep``."""
        zero, nothing = keep(0), keep(torch.empty(1))
        return [
            keep(self.number),
            *(own[i] for i in self.sizes),
            *[zero] * self.spare_sizes,
            *(own[i] for i in self.pointers),
            *[nothing] * self.spare_pointers,
        ]

    def __call__(self, *own: Any) -> None:
        assert self.entry is not None
        self.entry(*self.arrange(own, lambda constant: constant))


_collected: list[_Function] = []


def _compile_collected() -> None:
    """Compile what was collected, as one function that is told which of them is meant."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    functions = [*_collected]
    _collected.clear()
    if not functions:
        return
    sizes = max(len(function.sizes) for function in functions)
    pointers = max(len(function.pointers) for function in functions)
    types = ["int64_t"] * (1 + sizes) + ["void*"] * pointers
    names = ["which", *(f"n{i}" for i in range(sizes)), *(f"p{i}" for i in range(pointers))]
    source, cases = [], []
    for number, function in enumerate(functions):
        function.number = number
        function.spare_sizes = sizes - len(function.sizes)
        function.spare_pointers = pointers - len(function.pointers)
        given = {i: f"n{j}" for j, i in enumerate(function.sizes)}
        given |= {i: f"({function.types[i]})p{j}" for j, i in enumerate(function.pointers)}
        source.append(function.body.replace("@(", f"kernel_{number}(", 1))
        arguments = ", ".join(given[i] for i in range(len(function.types)))
        cases.append(f"case {number}: kernel_{number}({arguments}); break;")
    parameters = ", ".join(f"{kind} {name}" for kind, name in zip(types, names, strict=True))
    source.append(
        f'extern "C" void kernel({parameters}) {{ switch (which) {{ {" ".join(cases)} }} }}'
    )
    with _settings():
        entry = CppPythonBindingsCodeCache.load_pybinding(types, "\n".join(source))
    for function in functions:
        function.entry = entry


def _instruction_sets() -> list:
    """Those of this processor that Inductor makes vectors for; none, where it should find out."""
    from torch._inductor import cpu_vec_isa

    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return []
    try:
        able, known = cpu_vec_isa.x86_isa_checker(), cpu_vec_isa.supported_vec_isa_list
    except AttributeError:
        return []
    ours = [type(one) for one in known if str(one) in ("avx512", "avx2") and str(one) in able]
    # Whether one is true says whether the compiler and the processor have passed a trial of it.
    return [type(one.__name__, (one,), {"__bool__": lambda self: True})() for one in ours]


def _realize_scalars(graph: fx.GraphModule, shape: list) -> None:
    """Make the scalars that a vector operation reads outputs of the graph, in its precision.

    Inductor writes outputs to memory. Without that it repeats the arithmetic of a scalar, powers
    and rounding included, for each element of the vector.
    """

    def is_vector(node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and list(value.shape) == shape

    vectors = {node for node in graph.graph.nodes if is_vector(node)}
    scalars: dict[tuple, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node not in vectors or node.op != "call_function":
            continue
        value = node.meta["val"]
        for scalar in node.all_input_nodes:
            number = scalar.meta["val"]
            if not isinstance(number, Tensor) or not number.is_floating_point():
                continue
            if scalar in vectors:
                continue
            key = scalar, value.dtype
            if key not in scalars:
                with graph.graph.inserting_after(scalar):
                    convert = torch.ops.prims.convert_element_type.default
                    scalars[key] = graph.graph.call_function(convert, (scalar, value.dtype))
                scalars[key].meta["val"] = number.to(value.dtype)
            node.replace_input_with(scalar, scalars[key])
    graph.graph.output_node().args = ((*scalars.values(),),)
    graph.recompile()


@functools.cache
def load_forward_mode() -> None:
    """Import what torch's forward mode needs, without torch's warning about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def compile_sized(
    function: Callable[..., Any],
    small: Sequence[tuple],
    vectors: Sequence[tuple],
    shapes: Sequence[torch.Size] | None,
) -> Callable[[], Run]:
    """Trace a function and let the compiler start on it; returns what waits for the compiler.

    Args:
        small, vectors: what its arguments are like.
        shapes: of the vectors; None for 1-D ones of any length.
    """
    from torch._dynamo.source import ConstantSource
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    global _graphs
    _graphs += 1
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    size: list[Any] = []
    if vectors and shapes is None:
        source = ConstantSource("n")
        symbol = env.create_symbol(TYPICAL, source, DimDynamic.DYNAMIC, None)
        size = [env.create_symintnode(symbol, hint=TYPICAL, source=source)]
    # Each argument has a memory of its own here, also where two of them will be given the same.
    with mode:
        arguments = [torch.empty(shape, dtype=d, device=on) for shape, d, on in small]
        of: Sequence[Any] = shapes or [size] * len(vectors)
        arguments += [
            torch.empty(shape, dtype=d, device=on)
            for shape, (d, on) in zip(of, vectors, strict=True)
        ]

    def silent(*tensors: Any) -> list[Tensor]:
        function(*tensors[len(size) :])
        return []

    try:
        graph = _trace(silent, [*size, *arguments], "symbolic")
    except ImportError:  # of a broken torch
        raise
    except Exception as error:
        raise Untraced(reason(error)) from error
    if size and (env.guards or env.replacements):
        raise Sized
    # What is there twice is, for the most part, a move beside its own derivative.
    graph.graph.eliminate_dead_code()
    graph.graph = fx_graph_cse(graph.graph)
    if vectors and [*of[0]] != [1]:
        _realize_scalars(graph, [*of[0]])
    return _start(graph, [*size, *arguments], mode, {}, together=True)


def direct(
    run: Run,
    small: Sequence[tuple],
    vectors: Sequence[tuple],
    shapes: Sequence[torch.Size] | None,
    again: int,
) -> Run:
    """A kernel that is given its last ``again`` vectors once: those before them are the same.

    On a CPU, Inductor's own caller takes as long as the kernel of a small vector: for each scalar
    it makes a tensor anew. Where it does nothing but that, and calls one C++ function, this one is
    called as it has been called before, with what was made then. The function holds the global
    interpreter lock, so that no other thread writes to that.
    """
    sized = bool(vectors) and shapes is None
    until = int(sized) + len(small) + len(vectors) - again

    def through(tensors: list) -> Any:
        return run([*tensors, *tensors[until - again :]] if again else tensors)

    caller = getattr(run, "__func__", run)
    code, space = getattr(caller, "__code__", None), _globals(run)
    names = getattr(code, "co_names", ())
    found = [name for name in names if name.startswith("cpp_fused")]
    if len(found) != 1 or {*names} - {*found, *_MAKES_TENSORS} or _free_threaded():
        return through
    kernel: Any = space[found[0]]
    records: list[tuple[list, tuple]] = []
    try:
        for length in (11, 23) if sized else (0,):
            given: list[Any] = [length] if sized else []
            given += [torch.empty(shape, dtype=d, device=on) for shape, d, on in small]
            given += [
                torch.empty(shape, dtype=d, device=on)
                for shape, (d, on) in zip(
                    shapes or [torch.Size([length])] * len(vectors), vectors, strict=True
                )
            ]
            space[found[0]] = lambda *own, given=given: records.append(([*given], own))
            run([*given])
    finally:
        space[found[0]] = kernel
    if len(records) != 1 + sized:
        return through
    places: list[int] = []
    kept: list[Any] = []
    (given, own), (others, theirs) = records[0], records[-1]
    for mine, other in zip(own, theirs, strict=True):
        place = next((i for i, one in enumerate(given) if one is mine), None)
        if place is not None and others[place] is other:
            places.append(place if place < until else place - again)
        elif isinstance(mine, Tensor) and mine.shape == other.shape:
            places.append(until + len(kept))
            kept.append(mine)
        else:  # something that depends on the length
            return through
    if isinstance(kernel, _Function):

        def keep(constant: Any) -> int:
            kept.append(constant)
            return until + len(kept) - 1

        kernel, places = kernel.entry, kernel.arrange(places, keep)
    pick = operator.itemgetter(*places)
    return lambda tensors: kernel(*pick(tensors + kept))


# What a caller of Inductor's uses to make a tensor.
_MAKES_TENSORS = {"clear", "empty_strided_cpu", "reinterpret_tensor", "torch", "float32", "float64"}


def _free_threaded() -> bool:
    return not getattr(sys, "_is_gil_enabled", lambda: True)()
