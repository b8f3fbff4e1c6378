"""Hyperparameters per param group and per tensor, and bounds of their values."""

import copy

import pytest
import torch
from torch import nn

from hyperopt import HyperOptimizer, parse

SHAPES = [(3, 2), (4,), (), (2, 2)]
BY_TENSOR = "SGD(0.1, momentum=0.5)[lr: per tensor, momentum] / Adam(0.01)"


def params() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in SHAPES
    ]


def give_gradients(w: list[torch.Tensor], t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    for p in w:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)


def train(optimizer: HyperOptimizer, w: list[torch.Tensor], steps: range) -> None:
    for t in steps:
        give_gradients(w, t)
        optimizer.step()


def test_a_value_per_tensor_matches_separate_optimizers():
    """With SGD on top, nothing is shared, so each tensor's lr is that of a tower of its own."""
    ours, theirs = params(), params()
    joint = HyperOptimizer(ours, "SGD(0.1)[lr: log per tensor] / SGD(0.01)", compile=False)
    apart = [HyperOptimizer([p], "SGD(0.1)[lr: log] / SGD(0.01)", compile=False) for p in theirs]
    for t in range(10):
        train(joint, ours, range(t, t + 1))
        give_gradients(theirs, t)
        for optimizer in apart:
            optimizer.step()
    lrs = [optimizer.hyperparameters()[0]["lr"] for optimizer in apart]
    assert len(set(lrs)) == len(SHAPES)
    values = joint.hyperparameters()[0]
    assert [values[f"lr[p{i}]"] for i in range(len(SHAPES))] == pytest.approx(lrs, rel=1e-12)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_value_per_group_matches_separate_optimizers():
    ours, theirs = params(), params()
    stack = "SGD(0.1, momentum=0.5)[lr: {}, momentum: {}] / SGD(0.01)"
    groups = [{"params": ours[:1]}, {"params": ours[1:]}]
    joint = HyperOptimizer(groups, stack.format("per group", "per group"), compile=False)
    plain = "SGD(0.1, momentum=0.5)[lr, momentum] / SGD(0.01)"
    apart = [HyperOptimizer(part, plain, compile=False) for part in (theirs[:1], theirs[1:])]
    for t in range(10):
        train(joint, ours, range(t, t + 1))
        give_gradients(theirs, t)
        for optimizer in apart:
            optimizer.step()
    assert joint.hyperparameters()[0]["lr[0]"] != joint.hyperparameters()[0]["lr[1]"]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_compiled_is_eager(monkeypatch):
    runs = []
    for compile in (True, False):
        w = [torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (5, 300, 5, 5, 300, 7)]
        optimizer = HyperOptimizer(w, BY_TENSOR, compile=compile)
        train(optimizer, w, range(6))
        assert optimizer.compiled is compile
        runs.append((w, optimizer.snapshot()))
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-10, atol=0)
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert len(set(runs[0][1][:6].tolist())) == 6, "each tensor has learned an lr of its own"


def test_names_are_those_of_the_tensors():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    optimizer = HyperOptimizer(net.named_parameters(), BY_TENSOR, compile=False)
    assert optimizer.names[:5] == (
        *(f"0.lr[{name}]" for name, _ in net.named_parameters()),
        "0.momentum",
    )
    assert HyperOptimizer(params(), BY_TENSOR).names[0] == "0.lr[p0]"
    assert optimizer.param_groups[0]["lr"].tolist() == 0.1, "the mean, for schedulers"


def test_a_run_with_values_per_tensor_is_resumed_bit_for_bit():
    w = params()
    optimizer = HyperOptimizer(w, BY_TENSOR, compile=False)
    train(optimizer, w, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in w]
    train(optimizer, w, range(4, 8))
    again = [p.clone().requires_grad_() for p in weights]
    resumed = HyperOptimizer(again, BY_TENSOR, compile=False)
    resumed.load_state_dict(saved)
    train(resumed, again, range(4, 8))
    assert torch.equal(resumed.snapshot(), optimizer.snapshot())
    assert all(torch.equal(p, q) for p, q in zip(again, w, strict=True))
    with pytest.raises(ValueError, match="this is the state of the stack"):
        shared = "SGD(0.1, momentum=0.5)[lr, momentum] / Adam(0.01)"
        HyperOptimizer(params(), shared, compile=False).load_state_dict(saved)


def test_idle_and_later_tensors_keep_their_own_values():
    w = params()
    optimizer = HyperOptimizer(w[:3], BY_TENSOR, compile=False)
    train(optimizer, w[:3], range(3))
    before = optimizer.hyperparameters()[0]
    give_gradients(w[:3], 3)
    w[1].grad = None
    optimizer.step()
    optimizer.add_param_group({"params": w[3:], "lr": 0.3})
    values = optimizer.hyperparameters()[0]
    assert values["lr[p3]"] == pytest.approx(0.3)
    assert values["lr[p0]"] != before["lr[p0]"]
    train(optimizer, w, range(4, 7))
    values = optimizer.hyperparameters()[0]
    assert len({values[f"lr[p{i}]"] for i in range(4)}) == 4
    assert optimizer.skipped == [0, 0]


def test_one_step_size_for_all_values_of_a_name():
    stack = "SGD(0.1, momentum=0.5)[lr: per tensor, momentum] / SGD({lr: 1e-3, momentum: 0})"
    w = params()
    optimizer = HyperOptimizer(w, stack, compile=False)
    train(optimizer, w, range(3))
    values = optimizer.hyperparameters()[0]
    assert values["momentum"] == 0.5
    assert all(values[f"lr[p{i}]"] != 0.1 for i in range(4))


@pytest.mark.parametrize(
    "how", ["from 0.05 to 0.2", "log from 0.05 to 0.2", "square from 0.05 to 0.2", "unit to 0.2"]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_bounds_hold(how, sign):
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    stack = parse(f"SGD(0.1)[lr: {how}] / SGD(100)")
    optimizer = HyperOptimizer([p], stack, compile=False)
    for t in range(4):
        p.grad = torch.ones(3, dtype=torch.float64) * (sign**t)
        optimizer.step()
        lr = optimizer.hyperparameters()[0]["lr"]
        assert 0.05 * (1 - 1e-12) <= lr <= 0.2 * (1 + 1e-12) or (how == "unit to 0.2" and lr <= 0.2)
    edge = 0.2 if sign > 0 else 0.05
    if how != "unit to 0.2":
        assert lr == pytest.approx(edge), "and are reached"


def test_names_that_are_given_twice_do_not_name_a_tensor():
    nets = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    groups = [{"params": [*net.named_parameters()]} for net in nets]
    groups.append({"params": [("other", nn.Parameter(torch.zeros(1)))]})
    optimizer = HyperOptimizer(groups, "SGD(0.1)[lr: per tensor] / SGD(0.01)", compile=False)
    assert optimizer.names[:3] == ("0.lr[p0]", "0.lr[p1]", "0.lr[other]")


@pytest.mark.parametrize("high", [0.2, 0.101])
@pytest.mark.parametrize("tail", ["", " / SGD(1e-3)"], ids=["alone", "in a block"])
def test_a_value_at_its_bound_has_no_hypergradient(high, tail):
    """By central differences of the loss after the first move of lr, which the bound may end."""

    def run(size: float, steps: int) -> tuple[float, HyperOptimizer]:
        w = torch.linspace(1, 2, 4, dtype=torch.float64).requires_grad_()
        stack = f"SGD(0.1)[lr: from 0.05 to {high}] / SGD({size!r}) / SGD(1e-3){tail}"
        optimizer = HyperOptimizer([w], stack, compile=False)
        for _ in range(steps):
            optimizer.zero_grad()
            w.square().sum().backward()
            optimizer.step()
        return float(w.detach().square().sum()), optimizer

    d = 1e-7
    expected = (run(1e-3 + d, 2)[0] - run(1e-3 - d, 2)[0]) / (2 * d)
    optimizer = run(1e-3, 3)[1]
    found = dict(zip(optimizer.names, optimizer.hypergradients().tolist(), strict=False))
    assert found["1.lr"] == pytest.approx(expected, rel=1e-6)
    assert (found["1.lr"] == 0) is (high == 0.101)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SGD(0.1)[lr: per layer] / SGD(1)", "there is no scope 'layer'"),
        ("SGD(0.1)[lr: from 1 to 0.5] / SGD(1)", "from 1 to 0.5 leaves no values between"),
        ("SGD(0.1)[lr: from 1] / SGD(1)", "lr = 0.1 is not within its bounds, from 1 to inf"),
        ("SGD(0.1)[lr: log from -1] / SGD(1)", "-1 is not in the log domain"),
        ("SGD(0.1)[lr: log from] / SGD(1)", "does not say how to tune"),
        ("SGD(0.1)[lr: log to x] / SGD(1)", "does not say how to tune"),
        ("SGD(0.1)[lr: log per run per run] / SGD(1)", "does not say how to tune"),
        ("SGD(0.1) / SGD(0.1)[lr: per tensor] / SGD(1)", "per tensor is for the lowest level"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("how", ["", ": log", ": log from 1e-6 to 1.0 per tensor", ": per group"])
def test_notation(how):
    stack = f"SGD(0.1)[lr{how}] / SGD(1.0)"
    assert str(parse(stack)) == stack
