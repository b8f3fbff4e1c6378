"""The compiled step matches the eager one, is compiled once, and does not synchronize."""

import gc
import math
import os
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hyperopt._engine.compiler
import hyperopt._engine.engine
import hyperopt._engine.shards
import hyperopt._engine.step
import hyperopt._engine.torch_private
from hyperopt import SGD, Hyper, HyperOptimizer, Rule, Stack
from hyperopt.domains import DOMAINS, Domain
from hyperopt.rule import State, Values


@pytest.fixture(autouse=True)
def from_the_first_step_on(monkeypatch):
    """Steps are compiled at once, with compile="auto" too."""
    monkeypatch.setattr(hyperopt._engine.engine, "EAGER_STEPS", 0)


@pytest.fixture(scope="module")
def compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("needs a C++ compiler")


@pytest.fixture
def compilations(monkeypatch) -> list:
    """The functions that the test compiles, beginning with an empty cache."""
    functions = []
    compile = hyperopt._engine.compiler.compile_sized

    def counted(function, *args):
        functions.append(function)
        return compile(function, *args)

    monkeypatch.setattr(hyperopt._engine.compiler, "compile_sized", counted)
    monkeypatch.setattr(hyperopt._engine.compiler, "_compiled", {})
    monkeypatch.setattr(hyperopt._engine.step, "_broken", [])
    monkeypatch.setattr(hyperopt._engine.step, "_untraced", set())
    monkeypatch.setattr(
        hyperopt._engine.shards, "LARGE", 500
    )  # so that there are shards of both kinds
    return functions


SHAPES = [(40, 20), (20,), (), (300,), (3, 4)]
# Together: every rule, all ways in which weights reach the step, and all kinds of hyperparameters.
STACKS = [
    (
        "SGD(0.05, momentum=0.9, weight_decay=0.01, nesterov=True) / AdaGrad(1e-3)",
        torch.float32,
        {},
    ),
    ("Adam(0.01) / Adam({lr: 1e-4, beta1: 1e-3, beta2: 1e-2}) / SGD(1e-4)", torch.float64, {}),
    (
        # eps is large, or else the first hypergradient of beta2, 0 but for rounding, would count.
        "AdamW(0.01)[lr: log, beta2, eps: log] / RMSProp(1e-3, eps=0.1)",
        torch.float32,
        {"lr": 0.02, "weight_decay": 0.0},
    ),
    ("RMSProp(0.01, weight_decay=0.1)", torch.float64, {"lr": 0.02}),
    (
        "ScheduleFreeAdam(0.01, eps=0.1, r=8)[lr: log, eps] / "
        "SGD(0.05, horizon=inf, normalize=True, trust=0.1)",
        torch.float64,
        {"lr": 0.05},
    ),
    (
        # State of upper levels about the values that they moved.
        "SGD(0.05)[lr: log] / SGD(0.1, weight_decay=0.1, trust=0.05)[lr, weight_decay, trust] / "
        "SGD(0.01, weight_decay=0.1) / SGD(0.01, weight_decay=0.1) / SGD(1e-3)",
        torch.float64,
        {"lr": 0.02},
    ),
]


def made(dtype: torch.dtype, own: dict) -> tuple[list[Tensor], list[dict]]:
    generator = torch.Generator().manual_seed(0)
    w = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in SHAPES]
    return w, [{"params": w[:2]}, {"params": w[2:], **own}] if own else [{"params": w}]


def step(w: list[Tensor], optimizer: HyperOptimizer, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    for p in w:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad.view(-1)[::7] = 0  # weights without a gradient, as under the border pixels of MNIST
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize(("stack", "dtype", "own"), STACKS, ids=[s[0] for s in STACKS])
def test_compiled_matches_eager_to_rounding_and_compiles_once(
    stack, dtype, own, compiler, compilations, monkeypatch
):
    precision = 1e-9 if dtype == torch.float64 else 1e-5
    ours, groups = made(dtype, own)
    theirs, their_groups = made(dtype, own)
    fast = HyperOptimizer(groups, stack)
    slow = HyperOptimizer(their_groups, stack, compile=False)
    for t in range(20):
        step(ours, fast, t)
        step(theirs, slow, t)
        assert fast.compiled and not slow.compiled
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=precision, atol=precision)
        torch.testing.assert_close(fast.snapshot(), slow.snapshot(), rtol=precision, atol=0)
        if t == 0:
            done = len(compilations)
            monkeypatch.setattr(hyperopt._engine.torch_private, "make_fx", None)  # no more tracing
        if t == 10 and fast.stack.height == 0:  # settings that need no new compilation
            for group in fast.param_groups + slow.param_groups:
                group["lr"] /= 2
    assert len(compilations) == done >= 1 + (fast.stack.height > 0)
    start = HyperOptimizer(made(dtype, own)[1], stack).snapshot()
    assert not torch.equal(fast.snapshot(), start), "the hyperparameters must have moved"

    # Another run of the same structure, with other numbers, shares it.
    for numbers in ("0.05", "0.01"):
        stack = stack.replace(numbers, "0.003", 1)
    w, groups = made(dtype, {**own, "lr": 0.1} if own else {})
    other = HyperOptimizer(groups, stack)
    for t in range(3):
        step(w, other, t)
    assert other.compiled
    assert len(compilations) == done


@pytest.mark.slow
@pytest.mark.parametrize(
    # Two for the weights, and the one of the upper levels.
    ("stack", "kernels"),
    [
        ("AdamW(0.01)", 1),
        ("AdamW(0.01)[lr: log] / SGD(0.1, horizon=inf, normalize=True, trust=0.1)", 3),
    ],
)
def test_many_shards_share_kernels(stack, kernels, compiler, compilations):

    def many() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(40, 20), (20, 40), (800,), (800,), (7,), ()]
        return [
            torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
            for s in shapes
        ]

    ours, theirs = many(), many()
    fast = HyperOptimizer(ours, stack)
    slow = HyperOptimizer(theirs, stack, compile=False)
    for t in range(20):
        step(ours, fast, t)
        step(theirs, slow, t)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fast.snapshot(), slow.snapshot(), rtol=1e-9, atol=0)
        if t == 0:
            done = len(compilations)
    assert fast.compiled
    assert len(fast.state_dict()["state"]) == 6
    assert len({entry["shard"] for entry in fast.state_dict()["state"].values()}) == 5
    assert len(compilations) == done == kernels


@pytest.mark.slow
def test_changing_sets_of_parameters_share_kernels(compiler, compilations):
    """Like a mixture of experts, where each step moves some."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (300, 1, 700)]
    theirs = [w.clone() for w in ours]
    stack = "SGD(0.1, momentum=0.9) / SGD(1e-3)"
    fast, slow = HyperOptimizer(ours, stack), HyperOptimizer(theirs, stack, compile=False)
    everyone = (0, 1, 2)
    sets = [everyone, (0,), (1, 2), (1,), everyone, (0, 2), (2,), (0, 1), everyone, (1, 2)]
    for t, moved in enumerate(sets):
        for i, (w, v) in enumerate(zip(ours, theirs, strict=True)):
            g = torch.randn(w.shape, generator=generator, dtype=w.dtype)
            w.grad = v.grad = g if i in moved else None
        fast.step()
        slow.step()
        assert fast.compiled
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fast.snapshot(), slow.snapshot(), rtol=1e-9, atol=0)
        if t == 0:
            done = len(compilations)
    assert len(compilations) == done


@pytest.mark.slow
def test_compiling_does_not_change_the_user_s_random_state(compiler, compilations):
    """So a run's result does not depend on compilation, its own or an earlier run's."""
    w, groups = made(torch.float32, {})
    step(w, HyperOptimizer(groups, "AdamW(0.01)", compile=False), 0)
    before = torch.get_rng_state()
    optimizer = HyperOptimizer(groups, "AdamW(0.01)")
    step(w, optimizer, 1)
    assert optimizer.compiled and len(compilations) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_epochs_schedules_seeds_and_shorter_batches_compile_nothing_anew(compiler, compilations):
    for seed in range(2):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = HyperOptimizer(
            net.parameters(), "SGD(0.1, momentum=0.9, weight_decay=0.1)[momentum] / SGD(0.01)"
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        x, y = torch.randn(20, 6), torch.randn(20, 2)
        for epoch in range(3):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**epoch)
            for batch in torch.arange(20).split(8):  # 8, 8 and 4
                optimizer.zero_grad()
                ((net(x[batch]) - y[batch]) ** 2).mean().backward()
                optimizer.step()
            schedule.step()
        assert optimizer.compiled
        if seed == 0:
            done = len(compilations)
    assert len(compilations) == done > 0


@pytest.mark.slow
def test_a_kernel_that_cannot_work_in_place_is_compiled_differently(
    compiler, compilations, monkeypatch
):
    """Both ways give the same result, and the self-test detects a kernel that fails in place."""
    vector, one = torch.rand(1000), torch.ones(())
    trial = [torch.rand(1000)]

    def backwards(small: Tensor, old: Tensor, new: Tensor) -> None:
        new.copy_(old.flip(0) * small)

    def forwards(small: Tensor, old: Tensor, new: Tensor) -> None:
        new.copy_(old * 2 * small)

    kinds = [((), torch.float32, one.device)], [(torch.float32, one.device)]
    for shapes in (None, [torch.Size([1000])]):
        assert not hyperopt._engine.compiler._works_in_place(
            backwards_eagerly(shapes is None), *kinds, shapes
        )
    run = hyperopt._engine.compiler.compiled("backwards", backwards, (), [one], trial).ready()
    assert len(compilations) == 2
    gone = weakref.ref(trial.pop())
    gc.collect()
    assert gone() is None, "the kernel keeps what it was made for"
    expected = vector.flip(0)
    run([one], [vector])
    assert torch.equal(vector, expected)
    run = hyperopt._engine.compiler.compiled("forwards", forwards, (), [one], [vector]).ready()
    assert len(compilations) == 3
    run([one], [vector])
    assert torch.equal(vector, expected * 2)
    for n in (1, 7, 100_000):
        other = torch.rand(n)
        expected = other * 2
        run([one], [other])
        assert torch.equal(other, expected)


@pytest.mark.slow
def test_a_function_that_depends_on_the_length_has_a_kernel_for_each(compiler, compilations):
    def centred(small: Tensor, old: Tensor, new: Tensor) -> None:
        new.copy_((old - old.sum() / len(old)) * small)

    one = torch.full((), 2.0)
    for n in (5, 7, 5, 1):
        vector = torch.rand(n)
        expected = (vector - vector.mean()) * 2
        hyperopt._engine.compiler.compiled("centred", centred, (), [one], [vector])([one], [vector])
        torch.testing.assert_close(vector, expected)
    # Once for any length, in vain; then for three, of which one may not write where it reads.
    assert len(compilations) in (4, 5)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["AdamW(0.01) / SGD(1e-3)", STACKS[5][0]])
@pytest.mark.parametrize("sizes", [(1,), (600,) * 5])
def test_what_is_kept_of_a_weight_is_what_it_was(stack, sizes, compiler, compilations, monkeypatch):
    """Where no kernel works in place, among them those for one weight."""
    monkeypatch.setattr(hyperopt._engine.compiler, "_works_in_place", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
    theirs = [w.clone() for w in ours]
    fast, slow = HyperOptimizer(ours, stack), HyperOptimizer(theirs, stack, compile=False)
    for _ in range(4):
        for w, v in zip(ours, theirs, strict=True):
            w.grad = v.grad = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        fast.step()
        slow.step()
        torch.testing.assert_close(
            fast.hypergradients(), slow.hypergradients(), rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert fast.compiled and bool(fast.hypergradients().any())


@pytest.mark.slow
def test_a_kernel_for_a_single_weight_among_others(compiler, compilations):
    """It does not work in place; betas of 1 would hide this."""
    stack = "Adam(0.05)[lr: log, beta1] / SGD(0.1, horizon=3, normalize=True)"
    ends = []
    for compile in (True, False):
        generator = torch.Generator().manual_seed(0)
        w = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((21,), (), (300,))]
        optimizer = HyperOptimizer([{"params": [p]} for p in w], stack, compile=compile)
        for _ in range(3):
            for p in w:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        ends.append(w)
        assert optimizer.compiled is compile
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def backwards_eagerly(sized: bool):
    def run(tensors: list) -> None:
        small, old, new = tensors[sized:]
        for i in range(len(old)):
            new[i] = old[len(old) - 1 - i] * small

    return run


class Watch(TorchDispatchMode):
    """Detects synchronizations of the host with the device: reading a number, or copying."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero") or (
            name in ("_to_copy", "to") and (kwargs or {}).get("device")
        ):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_the_watch_detects_synchronizations():
    one = torch.ones(())
    for read in (Tensor.item, float, bool, lambda t: t > 0 and True, lambda t: t.to("meta")):
        with Watch() as watch:
            read(one)
        assert watch.waits, read


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("which", [2, 4], ids=["AdamW", "as Auto"])
def test_a_step_does_not_synchronize(which, compile, compiler, compilations, monkeypatch):
    stack, dtype, own = STACKS[which]
    w, groups = made(dtype, own)
    optimizer = HyperOptimizer(groups, stack, compile=compile)
    for t in range(3):
        step(w, optimizer, t)
    assert optimizer.compiled is compile
    # What reads memory without a call that can be watched.
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"called {name}()"))
    with Watch() as watch:
        for _ in range(3):
            optimizer.step()
            optimizer.snapshot()
    assert watch.calls > 3
    assert watch.waits == []


def test_without_a_compiler_it_warns_once_and_computes_the_same(compilations, monkeypatch):
    def broken(*_):
        raise RuntimeError("\n  no compiler\nhere is a long trace")

    monkeypatch.setattr(hyperopt._engine.compiler, "compile_sized", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ours, groups = made(torch.float64, {})
            optimizer = HyperOptimizer(groups, "Adam(0.01) / SGD(1e-4)")
            for t in range(4):
                step(ours, optimizer, t)
            assert optimizer.compiled is False
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "no compiler" in message and "eagerly" in message and "\n" not in message
    assert caught[0].filename == __file__, "the warning must point at the caller's step()"

    theirs, groups = made(torch.float64, {})
    slow = HyperOptimizer(groups, "Adam(0.01) / SGD(1e-4)", compile=False)
    for t in range(4):
        step(theirs, slow, t)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


class Branching(Rule, known=False):
    """A rule whose first step does nothing, by a Python branch that no graph can have."""

    lr = Hyper(0.1)

    def init(self, w: Tensor) -> State:
        return {"step": torch.zeros((), dtype=torch.float64)}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        return (w - h.lr * g if s["step"] > 0 else w), {"step": s["step"] + 1}


def test_a_rule_that_cannot_be_traced_runs_eagerly_and_leaves_the_others_compiled(
    compiler, compilations
):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for stack in (Branching(0.1) / SGD(0.0), Branching(0.2) / SGD(0.0), SGD(0.1)):
            w = torch.zeros(20, requires_grad=True)
            optimizer = HyperOptimizer([w], stack)
            for _ in range(2):
                w.grad = torch.ones(20)
                optimizer.step()
            lr, steps = optimizer.hyperparameters()[0]["lr"], 2 - isinstance(stack, Stack)
            assert w[0].item() == pytest.approx(-lr * steps)
            assert optimizer.compiled is not isinstance(stack, Stack)
    (warning,) = caught
    assert str(warning.message).startswith("the steps of Branching could not be compiled (")
    assert "torch.where in place of if" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    seen = []

    def failing(x: Tensor) -> Tensor:
        seen.append(gc.isenabled())
        raise ArithmeticError

    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ArithmeticError):
            hyperopt._engine.torch_private.trace(failing, [torch.ones(3)])
        assert gc.isenabled() is enabled
        assert seen == [False]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("make", "avx512", "avx2"),
    [
        (hyperopt.Auto, [3, 1, 2], [3, 2, 2]),
        (lambda p: HyperOptimizer(p, "Adam(0.01) / SGD(1e-3)"), [4, 2, 1], [4, 7, 3]),
        (lambda p: HyperOptimizer(p, "AdamW(0.01)"), [1], [1]),
    ],
)
def test_a_step_computes_nothing_twice_and_its_loops_are_few(
    make, avx512, avx2, compiler, compilations, monkeypatch
):
    from torch._inductor import metrics

    # Shorter vectors make loops of what is as short.
    most = avx2 if torch.backends.cpu.get_cpu_capability() == "AVX2" else avx512
    graphs, loops = [], []
    start = hyperopt._engine.torch_private._start

    def recorded(graph, arguments, mode, options, together=False):
        nodes = [node for node in graph.graph.nodes if node.users]
        graphs.append([str((node.target, node.args, node.kwargs)) for node in nodes])
        metrics.reset()
        run = start(graph, arguments, mode, options, together)
        loops.append(metrics.generated_cpp_vec_kernel_count)
        return run

    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    monkeypatch.setattr(hyperopt._engine.torch_private, "_start", recorded)
    w = torch.randn(10_000, requires_grad=True)
    w.grad = torch.randn_like(w)
    make([w]).step()
    assert all(len(done) == len(set(done)) for done in graphs)
    assert len(loops) == len(most)
    assert all(found <= bar for found, bar in zip(loops, most, strict=True)), loops


def test_the_cpp_compiler_is_used_where_it_helps(monkeypatch):
    from torch._inductor import compile_fx, cpp_builder

    asked = []

    def asking(*args, **kwargs):
        asked.append(cpp_builder._get_optimization_cflags("g++")[0])
        return lambda tensors: tensors

    monkeypatch.setattr(compile_fx, "compile_fx_inner", asking)
    arguments = [torch.ones(3)]
    graph = hyperopt._engine.torch_private.trace(lambda x: x.mul_(2), arguments)
    hyperopt._engine.torch_private.compile_graph(graph, arguments)
    assert len(asked) == 1 and "O2" in asked[0] and "O3" not in asked[0]
    assert "O3" in cpp_builder._get_optimization_cflags("g++")[0], "others are left alone"


@pytest.mark.parametrize("switch", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_torch_s_switches_are_followed(switch, compilations, monkeypatch):
    w = torch.ones(3, requires_grad=True)
    w.grad = torch.ones(3)
    optimizer = HyperOptimizer([w], "SGD(0.1)")
    monkeypatch.setenv(switch, "1")
    optimizer.step()
    assert not optimizer.compiled and not compilations


factor = 1.0


def _scaled(g: Tensor) -> Tensor:
    return factor * g


class Edited(Rule, known=False):
    lr = Hyper(0.1)
    share = 1.0

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        return w - h.lr * self.share * _scaled(g), {}


def moved_by(stack: Stack | Rule) -> float:
    """How far a step of a compiled stack, and of the same in eager mode, moves a weight."""
    ends = []
    for compile in (True, False):
        w = torch.zeros(5, requires_grad=True)
        w.grad = torch.ones(5)
        optimizer = HyperOptimizer([w], stack, compile=compile)
        optimizer.step()
        assert optimizer.compiled is compile
        ends.append(w[0].item())
    assert ends[0] == pytest.approx(ends[1])
    return -ends[0]


@pytest.mark.slow
def test_edited_code_is_compiled_again(compiler, compilations, monkeypatch):
    assert moved_by(Edited(0.5)) == pytest.approx(0.5)
    assert moved_by(Edited(0.25)) == pytest.approx(0.25)
    assert len(compilations) == 1
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "factor", 2.0)  # what a function that it calls reads
        assert moved_by(Edited(0.5)) == pytest.approx(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Edited, "share", 3.0)
        assert moved_by(Edited(0.5)) == pytest.approx(1.5)
    with monkeypatch.context() as patch:
        patch.setattr(Edited, "update", lambda self, w, g, s, h: (w - h.lr * 4.0 * g, {}))
        assert moved_by(Edited(0.5)) == pytest.approx(2.0)
    assert len(compilations) == 4

    class Cell(Rule, known=False):
        lr = Hyper(0.1)

        def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
            return w - h.lr * 5.0 * g, {}

    assert moved_by(Cell(0.5)) == pytest.approx(2.5)

    class Cell(Rule, known=False):  # type: ignore[no-redef]  # the cell, edited and run again
        lr = Hyper(0.1)

        def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
            return w - h.lr * 6.0 * g, {}

    assert moved_by(Cell(0.5)) == pytest.approx(3.0)
    assert moved_by(Edited(0.5)) == pytest.approx(0.5)
    assert len(compilations) == 6


@pytest.mark.slow
def test_a_redefined_domain_is_compiled_again(compiler, compilations):
    def stepped(value, raw, compile: bool) -> Tensor:
        Domain("cell", value, raw, low=0.0)
        w = torch.ones(5, requires_grad=True)
        optimizer = HyperOptimizer([w], "SGD(0.1)[lr: cell] / SGD(0.01)", compile=compile)
        for _ in range(3):
            w.grad = w.detach().clone()
            optimizer.step()
        return optimizer.snapshot()

    try:
        cells = [(torch.exp, math.log), (lambda r: r * r, math.sqrt), (lambda r: 2 * r * r, half)]
        found = [stepped(*cell, True) for cell in cells]
        expected = [stepped(*cell, False) for cell in cells]
        assert len({one[0].item() for one in expected}) == 3
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    finally:
        del DOMAINS["cell"]


def half(h: float) -> float:
    return math.sqrt(h / 2)


@pytest.mark.long
@pytest.mark.slow
def test_threads_and_processes_may_compile_at_once(tmp_path):
    program = """
import threading, torch
from torch import nn
from hyperopt import HyperOptimizer
def train(stack):
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    optimizer = HyperOptimizer(model.parameters(), stack, compile=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 10)).square().mean().backward()
        optimizer.step()
    print(f"{optimizer.compiled}\\n", end="", flush=True)
stacks = ["SGD(0.01)", "Adam(0.001) / SGD(1e-5)"]
threads = [threading.Thread(target=train, args=(stack,)) for stack in stacks]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    pipe = subprocess.PIPE
    both = [  # with one cache folder, initially empty
        subprocess.Popen(
            [sys.executable, "-c", program], env=env, stdout=pipe, stderr=pipe, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        output, errors = process.communicate(timeout=300)
        assert output.split() == ["True"] * 2, errors
        assert "could not be compiled" not in errors


def test_by_default_the_first_steps_are_eager(compiler, compilations, monkeypatch):
    monkeypatch.setattr(hyperopt._engine.engine, "EAGER_STEPS", 3)

    def train(optimizer: HyperOptimizer, w: list[Tensor], steps: range) -> list[bool]:
        found = []
        for t in steps:
            step(w, optimizer, t)
            found.append(optimizer.compiled)
        return found

    w, groups = made(torch.float32, {})
    whole = HyperOptimizer(groups, "Adam(0.01) / SGD(1e-4)")
    assert train(whole, w, range(6)) == [False] * 3 + [True] * 3
    assert len(compilations) == 3
    for cut in (2, 4):  # a run that is resumed compiles at the same step
        w, groups = made(torch.float32, {})
        first = HyperOptimizer(groups, "Adam(0.01) / SGD(1e-4)")
        train(first, w, range(cut))
        second = HyperOptimizer(groups, "Adam(0.01) / SGD(1e-4)")
        second.load_state_dict(first.state_dict())
        assert train(second, w, range(cut, 6)) == [t >= 3 for t in range(cut, 6)]
        assert torch.equal(second.snapshot(), whole.snapshot())


def test_compile_is_one_of_three():
    with pytest.raises(ValueError, match="compile must be True, False or 'auto', not 'yes'"):
        HyperOptimizer(made(torch.float32, {})[1], "SGD(0.1)", compile="yes")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_machine_without_a_compiler(tmp_path):
    program = """
import torch, hyperopt
w = torch.ones(300, requires_grad=True)
optimizer = hyperopt.HyperOptimizer([w], "Adam(0.01) / SGD(1e-4)", compile=True)
for _ in range(4):
    optimizer.zero_grad()
    w.square().sum().backward()
    optimizer.step()
print(optimizer.compiled, w[0].item())
"""
    env = {**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    compiled, w = done.stdout.split()
    assert compiled == "False" and float(w) < 1
    assert done.stderr.count("could not be compiled") == 1
    assert "Traceback" not in done.stderr
