"""Torch's learning-rate schedulers, and other hands that set what no level tunes."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_loops import PEERS, Net, Pair, made, same, same_weights, train, trained
from torch import nn
from torch.optim import lr_scheduler as s
from torch.optim.swa_utils import SWALR

import hyperopt._engine.compiler
from hyperopt import HyperOptimizer

# On an optimizer; those of one list are stepped together.
SCHEDULERS: dict[str, Callable[[Any], list[Any]]] = {
    "LambdaLR": lambda o: [s.LambdaLR(o, lambda t: 0.9**t)],
    "MultiplicativeLR": lambda o: [s.MultiplicativeLR(o, lambda t: 0.9)],
    "StepLR": lambda o: [s.StepLR(o, 3)],
    "PolynomialLR": lambda o: [s.PolynomialLR(o, 8)],
    "CosineAnnealingLR": lambda o: [s.CosineAnnealingLR(o, 5)],
    "CosineAnnealingWarmRestarts": lambda o: [s.CosineAnnealingWarmRestarts(o, 4)],
    "ReduceLROnPlateau": lambda o: [s.ReduceLROnPlateau(o, patience=1)],
    "OneCycleLR": lambda o: [s.OneCycleLR(o, 0.2, total_steps=12)],
    "OneCycleLR of lr": lambda o: [s.OneCycleLR(o, 0.2, total_steps=12, cycle_momentum=False)],
    "CyclicLR": lambda o: [s.CyclicLR(o, 0.01, 0.1, step_size_up=3)],
    "SequentialLR": lambda o: [
        s.SequentialLR(o, [s.LinearLR(o, 0.1, 1.0, 4), s.CosineAnnealingLR(o, 5)], [4])
    ],
    "ChainedScheduler": lambda o: [
        s.ChainedScheduler([s.ConstantLR(o, 0.1, 3), s.ExponentialLR(o, 0.9)])
    ],
    "two of them": lambda o: [s.LinearLR(o, 0.1, 1.0, 4), s.ExponentialLR(o, 0.9)],
    "SWALR": lambda o: [SWALR(o, 0.3, anneal_epochs=4)],
}


def train_by(schedulers: list[Any], model: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        train(model, optimizer, range(t, t + 1))
        for one in schedulers:
            one.step(*[1.0] * isinstance(one, s.ReduceLROnPlateau))  # which never gets better


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("stack", PEERS)
def test_schedulers_on_a_plain_optimizer(stack, name):
    def start(make: Callable[[Any], Any]) -> tuple[list[Any], Net, Any]:
        model = Net()
        optimizer = make(
            [
                {"params": model.first.parameters()},
                {"params": model.last.parameters(), "lr": 0.03},
            ]
        )
        return SCHEDULERS[name](optimizer), model, optimizer

    ours = start(lambda p: HyperOptimizer(p, stack, compile=False))
    theirs = start(PEERS[stack])
    for t in range(11):
        for run in (ours, theirs):
            train_by(*run, range(t, t + 1))
        same_weights(ours[1], theirs[1], rtol=1e-9)
        for group, peer in zip(ours[2].param_groups, theirs[2].param_groups, strict=True):
            for key in group.keys() & peer.keys() - {"params"}:
                assert group[key] == peer[key], key
    assert ours[2].param_groups[1]["lr"] != 0.03


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduled_run_is_resumed_bit_for_bit(name):
    """What a scheduler keeps in the param groups is in the state too."""

    def start() -> tuple[list[Any], Net, HyperOptimizer]:
        model, optimizer = made("Adam(0.05)")
        return SCHEDULERS[name](optimizer), model, optimizer

    whole, first, again = start(), start(), start()
    train_by(*whole, range(9))
    train_by(*first, range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (*first[0], *first[1:])], file)
    file.seek(0)
    for part, state in zip((*again[0], *again[1:]), torch.load(file), strict=True):
        part.load_state_dict(state)
    train_by(*again, range(5, 9))
    same(again[1:], whole[1:])
    ours, theirs = (run[2].param_groups[0] for run in (again, whole))
    assert {**ours, "params": 0} == {**theirs, "params": 0}


def test_the_initial_step_size_is_in_the_state():
    """A scheduler that starts in mid-run asks for it."""
    model, optimizer = made("SGD(0.1)")
    train_by([s.StepLR(optimizer, 2)], model, optimizer, range(5))
    _, other = made("SGD(0.1)")
    other.load_state_dict(optimizer.state_dict())
    scheduler = s.ExponentialLR(other, 0.5, last_epoch=3)
    assert scheduler.base_lrs == [0.1]


def test_a_scheduler_below_levels_that_tune_something_else():
    """As a loop that sets the step size by hand: hypergradients are those at its value then."""
    stack = "SGD(0.1, momentum=0.6)[momentum] / SGD(0.01)"
    model, optimizer = made(stack)
    schedulers = [s.LambdaLR(optimizer, lambda t: 0.8**t)]
    train_by(schedulers, model, optimizer, range(9))
    other, by_hand = made(stack)
    for t in range(9):
        by_hand.param_groups[0]["lr"] = 0.1 * 0.8**t
        train(other, by_hand, range(t, t + 1))
    same_weights(model, other)
    momentum = optimizer.hyperparameters()[0]["momentum"]
    assert momentum == by_hand.hyperparameters()[0]["momentum"] != 0.6


def test_one_cycle_moves_the_betas_that_nobody_tunes():
    model, optimizer = made("Adam(0.01)[eps: log] / SGD(0)")
    plain, peer = made("Adam(0.01)")
    for net, o in ((model, optimizer), (plain, peer)):
        train_by([s.OneCycleLR(o, 0.2, total_steps=12)], net, o, range(9))
        assert o.hyperparameters()[0]["beta1"] == o.param_groups[0]["betas"][0] != 0.9
    same_weights(model, plain, rtol=1e-10)


@pytest.mark.parametrize(
    ("stack", "name", "words"),
    [
        (
            "Adam(0.05) / SGD(0.1)",
            "StepLR",
            r"lr was .* SGD\(0.1\) moves it.* Adam\(0.05\)\[",
        ),
        (
            "Adam(0.05)[lr] / SGD(0.1)",
            "LambdaLR",
            r"lr was .* leave it out .* as in Adam\(0.05\); where",
        ),
        (
            "Adam(0.05)[lr, beta1] / SGD(0.1)",
            "SWALR",
            r"as in Adam\(0.05\)\[beta1\] / \.\.\.; where",
        ),
        ("SGD(0.1, momentum=0.9)[momentum] / SGD(0.1)", "OneCycleLR", "momentum was set"),
        ("Adam(0.05)[beta1] / SGD(0.1)", "OneCycleLR", "beta1 was set from outside"),
        ("SGD(0.1)", "OneCycleLR", "momentum was 0 when the optimizer was made.*give it a value"),
    ],
)
def test_a_scheduler_of_what_is_tuned_is_refused(stack, name, words):
    model, optimizer = made(stack)
    with pytest.raises(ValueError, match=words) as caught:
        train_by(SCHEDULERS[name](optimizer), model, optimizer, range(5))
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_has_not_yet_changed_what_is_tuned():
    """To make one writes the step size as it is, which harms nobody, nor does a factor of 1."""
    model, optimizer = made()
    s.ReduceLROnPlateau(optimizer)
    s.LambdaLR(optimizer, lambda t: 1.0)
    factor = s.MultiplicativeLR(optimizer, lambda t: 1.0)
    train_by([factor], model, optimizer, range(9))
    same((model, optimizer), trained())
    assert factor.get_last_lr() == [optimizer.param_groups[0]["lr"]] != [0.05]


@pytest.mark.slow
@pytest.mark.compiler
def test_what_a_scheduler_sets_compiles_nothing(monkeypatch):
    compilations = []
    compile = hyperopt._engine.compiler._compile

    def count(*args: Any) -> Any:
        compilations.append(args)
        return compile(*args)

    monkeypatch.setattr(hyperopt._engine.compiler, "_compile", count)
    runs: list[Pair] = []
    for compiled in (True, False):
        model = Net()
        optimizer = HyperOptimizer(
            model.parameters(), "Adam(0.01)[eps: log] / SGD(0.1)", compile=compiled
        )
        train_by([s.OneCycleLR(optimizer, 0.2, total_steps=12)], model, optimizer, range(9))
        assert optimizer.compiled == compiled
        runs.append((model, optimizer))
    assert len(compilations) == 3  # one kernel for each part of a step
    same(runs[0], runs[1], rtol=1e-10)


def test_betas_as_torch_has_them():
    def run(make: Callable[[Any], torch.optim.Optimizer]) -> nn.Module:
        model = Net()
        optimizer = make([{"params": model.parameters(), "betas": (0.5, 0.9)}])
        for t in range(9):
            if t == 4:
                optimizer.param_groups[0]["betas"] = (0.7, 0.9)
            train(model, optimizer, range(t, t + 1))
        assert optimizer.param_groups[0]["betas"] == (0.7, 0.9)
        return model

    ours = run(lambda p: HyperOptimizer(p, "Adam(0.05)", compile=False))
    same_weights(ours, run(PEERS["Adam(0.05)"]), rtol=1e-10)


def test_betas_that_are_tuned_or_set_one_by_one():
    model, optimizer = made("Adam(0.05)[beta1] / SGD(0.1)")
    train(model, optimizer, range(5))
    group = optimizer.param_groups[0]
    assert group["betas"][0].item() == optimizer.hyperparameters()[0]["beta1"] != 0.9
    group["beta2"] = 0.9
    train(model, optimizer, range(1))
    assert group["betas"][1] == group["beta2"] == optimizer.hyperparameters()[0]["beta2"] == 0.9
    group["betas"] = (*group["betas"], 0.5)
    with pytest.raises(ValueError, match="betas stands for beta1, beta2, and cannot be"):
        train(model, optimizer, range(1))


def test_a_step_size_that_is_set_as_a_tensor():
    model, optimizer = trained(1, "SGD(0.5)")
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    train(model, optimizer, range(1, 3))
    peer = Net()
    theirs = torch.optim.SGD(peer.parameters(), 0.5)
    train(peer, theirs, range(1))
    theirs.param_groups[0]["lr"] = 0.25
    train(peer, theirs, range(1, 3))
    same_weights(model, peer, rtol=1e-10)
    train_by([s.StepLR(optimizer, 1)], model, optimizer, range(2))
    assert optimizer.hyperparameters()[0]["lr"] == pytest.approx(0.0025)
