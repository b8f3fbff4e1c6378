"""All uses of torch's private API in this package.

The numbers are the torch versions that introduced these names:

- `torch.fx.experimental.symbolic_shapes`: ShapeEnv, DimDynamic (2.1)
- `torch._guards`: TracingContext, tracing (2.1); `torch._dynamo.source.ConstantSource` (2.1)
- `torch._subclasses.FakeTensorMode` (2.0)
- `torch._functorch.compile_utils.fx_graph_cse` (2.0)
- `torch._inductor.compile_fx.compile_fx_inner` (2.0), and `current_callable` of its result (2.2)
- `torch._inductor.decomposition.select_decomp_table` (2.0)
- `torch._inductor.virtualized.V` (2.0)
- `torch._inductor.config`: size_asserts (2.0)
- used only to save time, and skipped if missing: `codecache.triton_key`,
  `cpp_builder._get_optimization_cflags` and `.is_gcc` (2.6), `AsyncCompile.cpp_pybinding` and
  `CppPythonBindingsCodeCache.load_pybinding` (2.2),
  `codecache._get_cpp_prefix_header` (2.8), `cpu_vec_isa.valid_vec_isa_list`, `.x86_isa_checker`
  and `.supported_vec_isa_list` (2.5)
- `torch.utils._pytree`, `torch._decomp.decompositions_for_jvp` (2.0)
- for autograd, modes and lists: `torch._C._is_any_autocast_enabled`, `_len_torch_dispatch_stack`,
  `torch._subclasses.fake_tensor`, `torch._foreach_copy_`, `torch._disable_dynamo`,
  `Tensor._version` (2.0)
- for distributed training: `torch.ops._c10d_functional` (2.1), `DTensor._local_tensor` (2.0), and
  `_fsdp_flattened`, an attribute of the parameters of a FullyShardedDataParallel (2.0)
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

# The example size for tracing a kernel of any size. Inductor uses it in heuristics, such as whether
# to use several threads.
TYPICAL = 100_003

# A process that compiles more kernels than this precompiles the C++ headers.
MANY = 8

FLAGS = "_get_optimization_cflags"  # the Inductor function that sets -O3

Run = Callable[[list], Any]

_lock = threading.RLock()  # held while tracing or compiling
_graphs = 0  # the number of graphs that this process has compiled

copy_lists = torch._foreach_copy_
disable_dynamo = torch._disable_dynamo  # for training loops inside torch.compile


def local(tensor: Any) -> Tensor:
    """This process's part of a DTensor. Any other tensor is returned unchanged."""
    return getattr(tensor, "_local_tensor", tensor)


def is_flattened(p: Tensor) -> bool:
    """Whether a parameter belongs to a FullyShardedDataParallel."""
    return getattr(p, "_fsdp_flattened", False)


def sum_over(group: str, tensor: Tensor) -> Tensor:
    """Sum a tensor over the members of a process group, by an operation that can be traced."""
    whole = torch.ops._c10d_functional.all_reduce(tensor, "sum", group)
    return torch.ops._c10d_functional.wait_tensor(whole)


def version_of(tensor: Tensor) -> int:
    """A number that grows with each operation that writes to the tensor's memory."""
    return tensor._version


def has_modes() -> bool:
    """Whether autocast or a dispatch mode, such as FakeTensorMode, is on."""
    return bool(torch._C._is_any_autocast_enabled() or torch._C._len_torch_dispatch_stack())


class Untraced(Exception):
    """torch could not trace a function. Other functions may still compile."""


class Sized(Exception):
    """A function depends on the length of its vectors, so each length needs its own kernel."""


def reason(error: Exception) -> str:
    """The type and the first line of an error."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {next(lines, '')}"


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Let one thread compile at a time, with garbage collection turned off.

    Compiling makes little garbage, and collecting it would take a quarter of the time.
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
    """Trace a function into a graph of tensor operations.

    The graph makes all writes to its arguments at its end.

    Args:
        function: a function of tensors. It may write to its arguments.
        arguments: example arguments, with the shapes, dtypes and devices of later calls.
    """
    with compiling():
        return _trace(function, arguments, "fake")


def _trace(function: Callable[..., Any], arguments: Sequence[Any], mode: Any) -> fx.GraphModule:
    from torch._inductor.decomposition import select_decomp_table

    pure = torch.func.functionalize(function, remove="mutations")
    graph = make_fx(pure, select_decomp_table(), tracing_mode=mode)(*arguments)
    # Inductor needs `shape_env`, but cannot cache a graph with this attribute. So move it to the
    # class: each graph has its own class.
    type(graph).shape_env = vars(graph).pop("shape_env", None)
    _read_first(graph)
    return graph


def _read_first(graph: fx.GraphModule) -> None:
    """Reorder the writes at the end of a graph: copy an argument's old value before it changes.

    The graph writes to its arguments in their order. If a written value is only a copy of another
    argument, Inductor reads that argument at the time of the write. It must still be unchanged.
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
    """Compile a graph from `trace` with Inductor.

    Args:
        graph: the graph.
        arguments: example arguments, with the shapes, dtypes and devices of later calls.
        options: more Inductor options.

    Returns:
        a function of tensors.

    Raises:
        Exception: an error of a missing or broken compiler.
    """
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor uses its cache on disk only if there is a ShapeEnv. The stand-ins have static shapes,
    # so the ShapeEnv stays empty.
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
    """Let Inductor generate code. Returns a function that compiles it and returns the kernel.

    Args:
        graph: the graph.
        stand_ins: fake arguments.
        mode: the FakeTensorMode of the stand-ins.
        options: more Inductor options.
        together: whether to compile C++ functions together with those of other graphs.
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
            warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
            run = compile_fx_inner(graph, stand_ins, is_inference=True)
        return getattr(run, "current_callable", None) or run

    try:
        run = attempt(_settings(), together)
    except Exception:
        _collected.clear()
        return lambda: attempt(contextlib.nullcontext(), False)

    def finish() -> Run:
        with contextlib.suppress(Exception):  # if compiling separately fails too, that raises
            _compile_collected()
        if any(isinstance(f, _Function) and f.entry is None for f in _globals(run).values()):
            return attempt(contextlib.nullcontext(), False)
        return run

    return finish


def _globals(run: Run) -> dict[str, Any]:
    return getattr(getattr(run, "__func__", run), "__globals__", {})


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Patch Inductor to compile faster. If that fails, the caller retries without the patches."""
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa

    with contextlib.ExitStack() as stack:

        def replace(module: Any, name: str, function: Callable[..., Any]) -> None:
            stack.enter_context(mock.patch.object(module, name, function, create=True))

        # Without a GPU, Inductor reads all of Triton for a hash that it does not use.
        if not torch.cuda.is_available():
            replace(codecache, "triton_key", lambda: "")

        # Inductor's loops are vectorized already, so -O3 gains nothing over -O2 and takes twice the
        # time. But -O2 needs one more flag to split off the last elements of a loop.
        if flags := getattr(cpp_builder, FLAGS, None):

            def moderate(*args: Any) -> Any:
                found = flags(*args)  # torch >= 2.9: two lists, for compiling and for linking
                compiling = found[0] if isinstance(found, tuple) else found
                compiling[:] = ["O2" if flag == "O3" else flag for flag in compiling]
                if "O2" in compiling and cpp_builder.is_gcc():
                    compiling.append("fsplit-loops")
                return found

            replace(cpp_builder, FLAGS, moderate)

        # Read the instruction sets from the processor. Otherwise Inductor tests them with the C++
        # compiler, which takes seconds, once on each machine.
        if sets := _instruction_sets():
            replace(cpu_vec_isa, "valid_vec_isa_list", lambda: sets)

        # Precompiling the headers takes as long as compiling four kernels with them.
        if _graphs < MANY:
            replace(codecache, "_get_cpp_prefix_header", lambda device: None)
        yield


class _Function:
    """A C++ function from Inductor, to be compiled together with others.

    Most of the compile time goes into the headers, which the functions share.
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
        """Arrange arguments in the order of ``entry``. ``keep`` converts constants to arguments."""
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
    """Compile the collected functions as one C++ function, which takes a number to select one."""
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
    """This processor's vector instruction sets. If empty, Inductor has to test for them."""
    from torch._inductor import cpu_vec_isa

    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return []
    try:
        able, known = cpu_vec_isa.x86_isa_checker(), cpu_vec_isa.supported_vec_isa_list
    except AttributeError:
        return []
    ours = [type(one) for one in known if str(one) in ("avx512", "avx2") and str(one) in able]
    # Inductor's bool() of an instruction set runs a test with the compiler. Skip that test.
    return [type(one.__name__, (one,), {"__bool__": lambda self: True})() for one in ours]


def _realize_scalars(graph: fx.GraphModule, shape: list) -> None:
    """Make the scalars that vector operations read outputs of the graph, in the vectors' dtype.

    Inductor computes an output once and writes it to memory. Otherwise it would repeat the
    arithmetic of a scalar, with powers and rounding, for each element of a vector.
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
    """Import the module that torch's forward mode needs, and ignore its FutureWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def compile_sized(
    function: Callable[..., Any],
    small: Sequence[tuple],
    vectors: Sequence[tuple],
    shapes: Sequence[torch.Size] | None,
) -> Callable[[], Run]:
    """Trace a function and let Inductor generate its code.

    Args:
        function: a function of small tensors and vectors. It may write to them.
        small: (shape, dtype, device) of each small tensor.
        vectors: (dtype, device) of each vector.
        shapes: the shapes of the vectors; None for 1-D vectors of any length.

    Returns:
        a function that compiles the code and returns the kernel.

    Raises:
        Untraced: torch could not trace the function.
        Sized: the function depends on the length of the vectors.
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
    # Each argument has its own memory here, although later calls pass some tensors twice.
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
    except ImportError:  # torch is broken
        raise
    except Exception as error:
        raise Untraced(reason(error)) from error
    if size and (env.guards or env.replacements):
        raise Sized
    # Merge equal operations: mostly those of an update and of its derivative.
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
    """Wrap a kernel for faster calls, which pass the vectors to read and write only once.

    On a CPU, Inductor's Python caller takes as long as the kernel of a small vector, because it
    makes a new tensor for each scalar. If it only makes such tensors and calls one C++ function,
    the wrapper calls this function directly, with tensors that are made once. The function holds
    the global interpreter lock, so that no other thread can write to these tensors.

    Args:
        run: the kernel.
        small, vectors, shapes: as for `compile_sized`.
        again: the number of vectors at the end of ``vectors`` that equal the ones before them.
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


# The names that Inductor's caller uses to make a tensor.
_MAKES_TENSORS = {"clear", "empty_strided_cpu", "reinterpret_tensor", "torch", "float32", "float64"}


def _free_threaded() -> bool:
    return not getattr(sys, "_is_gil_enabled", lambda: True)()
