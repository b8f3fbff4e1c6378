"""Memory does not grow from step to step or from optimizer to optimizer."""

import gc
import tracemalloc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import hyperopt._engine.compiler
import hyperopt._engine.shards
from hyperopt import HyperOptimizer

STACK = "AdamW(0.01) / Adam(1e-3) / SGD(1e-5)"


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    tracemalloc.stop()


def tensors() -> int:
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def step(net: nn.Module, optimizer: HyperOptimizer, t: int) -> None:
    x = torch.linspace(-1, 1, 32).view(8, 4) * (t + 1)
    optimizer.zero_grad()
    net(x).square().mean().backward()
    if t % 50 == 7:  # now and then one has no gradient, and the layout changes
        next(net.parameters()).grad = None
    optimizer.step()
    optimizer.hyperparameters()
    optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("stack", ["SGD(0.01)", STACK])
def test_memory_is_flat_from_step_to_step(stack, without_collector):
    net = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 2))
    optimizer = HyperOptimizer(net.parameters(), stack, compile=False)
    tracemalloc.start()
    for t in range(100):
        step(net, optimizer, t)
    gc.collect()  # torch.func.vjp leaves cycles of small Python objects, but no tensors
    before = tensors()
    traced = tracemalloc.get_traced_memory()[0]
    for t in range(200):
        step(net, optimizer, t)
    assert tensors() == before
    gc.collect()
    assert tracemalloc.get_traced_memory()[0] - traced < 40_000  # bytes; 200 a step


@pytest.mark.slow
def test_memory_of_compiled_steps_is_flat(without_collector):
    w = torch.randn(1000, requires_grad=True)
    optimizer = HyperOptimizer([w], STACK, compile=True)

    def steps(n: int) -> None:
        for _ in range(n):
            w.grad = torch.randn(1000)
            optimizer.step()
            optimizer.hyperparameters()

    steps(3)
    if not optimizer.compiled:
        pytest.skip("needs a C++ compiler")
    tracemalloc.start()
    steps(100)
    before, traced = tensors(), tracemalloc.get_traced_memory()[0]
    steps(500)
    assert tensors() == before
    assert tracemalloc.get_traced_memory()[0] - traced < 100_000


def test_a_deleted_optimizer_leaves_no_memory(without_collector):
    counts: list[int] = []
    gone: list[weakref.ref[Any]] = []
    for _ in range(8):
        net = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 2))
        optimizer = HyperOptimizer(net.parameters(), STACK, compile=False)
        for t in range(8):
            step(net, optimizer, t)
        gone += [weakref.ref(optimizer), weakref.ref(next(net.parameters()))]
        del net, optimizer
        counts.append(tensors())
    assert counts[1:] == [counts[0]] * 7
    assert not any(ref() is not None for ref in gone), "an optimizer is in a reference cycle"


@pytest.mark.slow
def test_a_compiled_step_holds_no_optimizer_and_no_weights(monkeypatch):
    monkeypatch.setattr(hyperopt._engine.compiler, "_compiled", {})
    monkeypatch.setattr(hyperopt._engine.shards, "LARGE", 1)

    def train() -> weakref.ref:
        params = [torch.randn(1234, requires_grad=True) for _ in range(6)]
        optimizer = HyperOptimizer(params, "SGD(0.1, momentum=0.9) / SGD(1e-3)", compile=True)
        for _ in range(4):
            for w in params:
                w.grad = torch.randn(1234)
            optimizer.step()
        if not optimizer.compiled:
            pytest.skip("needs a C++ compiler")
        return weakref.ref(optimizer)

    def large() -> int:
        gc.collect()
        return sum(
            type(o) in (torch.Tensor, nn.Parameter) and o.numel() == 1234 for o in gc.get_objects()
        )

    before = large()
    gone = [train()]
    after, kernels = large(), len(hyperopt._engine.compiler._compiled)
    gone += [train() for _ in range(19)]
    assert large() == after == before
    assert not any(ref() is not None for ref in gone)
    assert len(hyperopt._engine.compiler._compiled) == kernels
