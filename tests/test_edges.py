"""Edge cases: parameters without gradients, frozen, tied, empty, oddly laid out, half precision."""

import math

import pytest
import torch
from reference import Reference, mp
from torch import Tensor, nn

import hyperopt._engine.shards
from hyperopt import HyperOptimizer

PLAIN = {
    "SGD(0.1, momentum=0.9, weight_decay=0.01)": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01)
    ),
    "AdaGrad(0.1, weight_decay=0.01)": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.01),
    "RMSProp(0.01)": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adam(0.01)": lambda p: torch.optim.Adam(p, 0.01),
    "AdamW(0.01)": lambda p: torch.optim.AdamW(p, 0.01),
}
TALL = "AdamW(0.01) / Adam(1e-3) / SGD(1e-5)"


@pytest.fixture(params=["gathered", "in place"])
def memory(request, monkeypatch):
    """The engine's two ways to pass parameters to the step."""
    if request.param == "in place":
        monkeypatch.setattr(hyperopt._engine.shards, "LARGE", 1)


def values(seed: int, *shapes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def parameters(*shapes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [p.requires_grad_() for p in values(0, *shapes, dtype=dtype)]


def give(params: list[Tensor], gradients: list[Tensor], active=lambda i: True) -> None:
    for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
        p.grad = g.clone() if active(i) else None


# Parameters without a gradient.


@pytest.mark.parametrize("stack", PLAIN)
def test_parameters_without_gradients_match_torch_optim(memory, stack):
    shapes = [(3, 2), (4,), (), (5,)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    optimizer, peer = HyperOptimizer(ours, stack, compile=False), PLAIN[stack](theirs)
    generator = torch.Generator().manual_seed(1)
    for t in range(60):
        # The last one comes late, and in some steps none has a gradient.
        mask = torch.rand(4, generator=generator) < 0.7
        mask[3] &= t > 10
        mask &= t % 13 != 5
        for params in (ours, theirs):
            give(params, values(t, *shapes), lambda i, mask=mask: mask[i])
        optimizer.step()
        peer.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    saved, their = optimizer.state_dict()["state"], peer.state_dict()["state"]
    rule = optimizer.stack.levels[0]
    if rule.name.startswith("Adam"):
        # The state is that before the last move, which a parameter that rests has forgotten.
        for i, entry in saved.items():
            assert entry["step"] + entry.get("moved", 0) == their[i]["step"]


def test_constants_that_change_while_parameters_have_no_gradient(memory):
    """A parameter's last move before a pause used the constants of that time."""
    ours, theirs = parameters((3,), (4,)), parameters((3,), (4,))
    optimizer = HyperOptimizer(ours, "SGD(0.1, momentum=0.9)[lr] / SGD(0)", compile=False)
    peer = torch.optim.SGD(theirs, 0.1, momentum=0.9)
    for t in range(12):
        for o, params in ((optimizer, ours), (peer, theirs)):
            o.param_groups[0]["momentum"] = 0.5 + 0.04 * t
            give(params, values(t, (3,), (4,)), lambda i, t=t: i == 0 or t % 4 < 2)
            o.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lowest", ["SGD(0.1, momentum=0.6)", "Adam(0.1, 0.6, 0.8, eps=0.1)"])
def test_hypergradients_with_parameters_without_gradients(memory, lowest):
    stack = f"{lowest} / Adam(1e-3, eps=0.1)"
    start = [0.4, -0.7, 1.1, 0.3]
    w = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in start]
    optimizer = HyperOptimizer(w, stack, compile=False)
    reference = Reference(stack, start)

    def loss(w, sin, active):
        terms = [sin(2 * w[i] + i) + w[i] * w[i] / 5 for i in active]
        return sum(terms) + math.prod(w[i] for i in active)

    everyone = [0, 1, 2, 3]
    for t, active in enumerate(
        [everyone, everyone, [0, 2], [0, 2, 3], everyone, [], [], [1, 2], everyone, everyone]
    ):
        optimizer.zero_grad()
        if active:
            loss(w, torch.sin, active).backward()
        optimizer.step()
        reference.step(lambda w, active=active: loss(w, mp.sin, active), active)
        for ours, theirs in zip(
            optimizer.hyperparameters(), reference.hyperparameters(), strict=True
        ):
            assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-14), t
        for i, x in reference.w.items():
            assert w[i].item() == pytest.approx(float(x), rel=1e-10), (t, i)


def test_a_step_without_any_gradient_does_nothing():
    w = parameters((3,))
    optimizer = HyperOptimizer(w, TALL, compile=False)
    before, start = optimizer.snapshot(), w[0].detach().clone()
    optimizer.step()
    assert torch.equal(optimizer.snapshot(), before) and torch.equal(w[0], start)
    for t in range(3):
        give(w, values(t, (3,)))
        optimizer.step()
    before, start = optimizer.snapshot(), w[0].detach().clone()
    w[0].grad = None
    optimizer.step()
    assert torch.equal(optimizer.snapshot(), before) and torch.equal(w[0], start)


def test_frozen_and_later_thawed_parameters(memory):
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    net = nn.Sequential(first, nn.Tanh(), last)
    first.weight.requires_grad_(False)
    frozen = first.weight.clone()
    optimizer = HyperOptimizer(net.parameters(), TALL, compile=False)

    def train(steps: int) -> None:
        for t in range(steps):
            optimizer.zero_grad()
            net(values(t, (8, 3))[0]).square().mean().backward()
            optimizer.step()

    train(5)
    assert torch.equal(first.weight, frozen)
    first.weight.requires_grad_(True)
    train(1)
    # As a new parameter: Adam's first step is lr in every direction, after weight decay.
    lr = optimizer.param_groups[0]["lr"].item()
    torch.testing.assert_close(
        (first.weight - frozen * (1 - 0.01 * lr)).abs(),
        torch.full_like(frozen, lr),
        rtol=1e-3,  # eps
        atol=0,
    )
    last.weight.requires_grad_(False)
    frozen = last.weight.clone()
    train(3)
    assert torch.equal(last.weight, frozen)
    assert optimizer.snapshot().isfinite().all()


def test_tied_weights(memory):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encode, self.decode = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    tied = Tied()
    tied.double()
    single = tied.encode.weight.detach().clone().requires_grad_()
    optimizer = HyperOptimizer(tied.parameters(), "Adam(0.1) / SGD(1e-2)", compile=False)
    other = HyperOptimizer([single], "Adam(0.1) / SGD(1e-2)", compile=False)
    for t in range(5):
        (x,) = values(t, (8, 4))
        for o, out in ((optimizer, tied(x)), (other, torch.tanh(x @ single.T) @ single.T)):
            o.zero_grad()
            (out - x).square().mean().backward()
            o.step()
    assert tied.encode.weight is tied.decode.weight
    torch.testing.assert_close(tied.encode.weight, single)
    assert optimizer.hyperparameters()[0] == pytest.approx(other.hyperparameters()[0])


# Shapes and layouts.


@pytest.mark.parametrize("stack", [*PLAIN, TALL])
def test_odd_shapes_and_layouts(memory, stack):
    """The memory layout of parameters and gradients does not change the result."""
    shapes = [(), (0,), (2, 3, 4, 5), (3, 0, 2), (6, 4), (1,), (3, 5)]
    odd = parameters(*shapes)
    odd[2] = odd[2].detach().to(memory_format=torch.channels_last).requires_grad_()
    odd[4] = odd[4].detach().T.contiguous().T.requires_grad_()
    assert not odd[2].is_contiguous() and not odd[4].is_contiguous()
    flat = torch.cat([p.detach().flatten() for p in odd]).requires_grad_()
    optimizer = HyperOptimizer(odd, stack, compile=False)
    other = HyperOptimizer([flat], stack, compile=False)
    strides = [p.stride() for p in odd]
    for t in range(8):
        gradients = values(t, *shapes)
        if t % 2:
            gradients[4] = gradients[4].T.contiguous().T
            gradients[2] = gradients[2].to(memory_format=torch.channels_last)
            gradients[6] = gradients[6].T.contiguous().T  # though its parameter is contiguous
        give(odd, gradients)
        flat.grad = torch.cat([g.flatten() for g in gradients])
        optimizer.step()
        other.step()
        torch.testing.assert_close(
            torch.cat([p.flatten() for p in odd]), flat, rtol=1e-11, atol=1e-13
        )
    torch.testing.assert_close(optimizer.snapshot(), other.snapshot(), rtol=1e-11, atol=0)
    assert [p.stride() for p in odd] == strides


def test_nothing_but_empty_parameters():
    w = parameters((0,))
    optimizer = HyperOptimizer(w, TALL, compile=False)
    for _ in range(3):
        w[0].grad = torch.zeros_like(w[0])
        optimizer.step()
    assert optimizer.hyperparameters()[0]["lr"] == 0.01


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(memory, dtype):
    w = parameters((50,), dtype=dtype)
    target = values(5, (50,), dtype=dtype)[0]
    optimizer = HyperOptimizer(w, "Adam(0.01) / SGD(1e-3)", compile=False)
    (start,) = ((w[0] - target).square().mean(),)
    for _ in range(60):
        optimizer.zero_grad()
        (w[0] - target).square().mean().backward()
        optimizer.step()
    assert w[0].dtype == dtype
    assert (w[0] - target).square().mean() < start / 2
    lowest = optimizer.hyperparameters()[0]
    assert lowest["beta2"] == pytest.approx(0.999, abs=1e-5) and lowest["beta2"] != 1
    assert lowest["lr"] != pytest.approx(0.01, rel=1e-3), "it must have been tuned"
    assert optimizer.snapshot().dtype == torch.float64
    for entry in optimizer.state_dict()["state"].values():
        assert entry["exp_avg"].dtype == entry["last_grad"].dtype == torch.float32
        assert entry["step"].dtype == torch.float64


def test_half_precision_is_one_rounding_of_single_precision(memory):
    (half,), (single,) = parameters((50,), dtype=torch.bfloat16), parameters((50,))
    single = half.detach().float().requires_grad_()
    ours = HyperOptimizer([half], "SGD(0.1, momentum=0.9) / SGD(1e-3)", compile=False)
    theirs = HyperOptimizer([single], "SGD(0.1, momentum=0.9) / SGD(1e-3)", compile=False)
    for t in range(10):
        (g,) = values(t, (50,), dtype=torch.bfloat16)
        half.grad, single.grad = g, g.float()
        ours.step()
        theirs.step()
        assert torch.equal(half, single.to(torch.bfloat16))
        single.data.copy_(half)
    assert torch.equal(ours.snapshot(), theirs.snapshot())


def test_parameters_of_several_dtypes(memory):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float32]
    w = [
        p.to(d).detach().requires_grad_()
        for p, d in zip(parameters(*[(6,)] * 4), dtypes, strict=True)
    ]
    exact = parameters(*[(6,)] * 4)
    stack = "Adam(0.01, eps=0.1) / SGD(1e-3)"
    optimizer = HyperOptimizer(w, stack, compile=False)
    other = HyperOptimizer(exact, stack, compile=False)
    for t in range(5):
        give(exact, values(t, *[(6,)] * 4))
        for p, q in zip(w, exact, strict=True):
            p.grad = q.grad.to(p.dtype)  # type: ignore[union-attr]
        optimizer.step()
        other.step()
    assert [p.dtype for p in w] == dtypes
    kept = [optimizer.state[p]["exp_avg"].dtype for p in w]
    assert kept == [torch.float64, *[torch.float32] * 3]
    # All share the same hyperparameters.
    assert optimizer.hyperparameters()[0] == pytest.approx(other.hyperparameters()[0], rel=1e-3)
    for p, q, tolerance in zip(w, exact, (1e-4, 1e-4, 2e-2, 1e-4), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance)


# Param groups that come later.


def test_groups_that_are_added_in_mid_run(memory):
    """Against groups that were there from the start, and had no gradient yet."""
    stack = "Adam(0.1, 0.6, 0.8, eps=0.1) / Adam({lr: 1e-3, beta1: 1e-2, beta2: 1e-2}, eps=0.1)"
    start = [0.4, -0.7, 1.1, 0.3]
    w = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in start]
    optimizer = HyperOptimizer([{"params": w[:2], "beta1": 0.7}], stack, compile=False)

    def loss(w, sin, active):
        return sum(sin(2 * w[i] + i) + w[i] * w[i] / 5 for i in active)

    def step(active: list[int]) -> None:
        optimizer.zero_grad()
        loss(w, torch.sin, active).backward()
        optimizer.step()

    for _ in range(3):
        step([0, 1])
    first = optimizer.hyperparameters()[0]
    optimizer.add_param_group({"params": [w[2]]})
    optimizer.add_param_group({"params": [w[3]], "lr": 0.05, "eps": 0.2})
    lowest = optimizer.hyperparameters()[0]
    assert lowest == {
        "lr": first["lr"],  # shared, as learned
        "lr[2]": 0.05,
        "beta1": pytest.approx(0.6),  # the first group's was its own
        "beta1[0]": first["beta1"],
        "beta2": first["beta2"],
        **{"eps[0]": 0.1, "eps[1]": 0.1, "eps[2]": 0.2},
        **{f"weight_decay[{g}]": 0.0 for g in range(3)},
    }
    for _ in range(4):
        step([0, 1, 2, 3])
    after = optimizer.hyperparameters()[0]
    assert len({after[n] for n in ("lr", "lr[2]", "beta1", "beta1[0]", "beta2")}) == 5
    assert all(after[n] != lowest[n] for n in ("lr", "lr[2]", "beta1", "beta1[0]", "beta2"))


@pytest.mark.parametrize("own", [[{}, {"lr": 0.05}], [{"lr": 0.05}, {}]])
def test_an_added_group_continues_like_one_without_gradients(memory, own):
    """What a level above knows of the first group's own values is not of those shared since."""
    stack = "SGD(0.1, momentum=0.6) / SGD(1e-3, momentum=0.5) / SGD(1e-5)"

    def train(late: bool) -> tuple[list[Tensor], dict[str, float]]:
        w = parameters((3,), (4,))
        groups = [{"params": [p], **o} for p, o in zip(w, own, strict=True)]
        optimizer = HyperOptimizer(groups[: 1 if late else 2], stack, compile=False)
        for t in range(10):
            if late and t == 4:
                optimizer.add_param_group(groups[1])
            give(w, values(t, (3,), (4,)), lambda i, t=t: i == 0 or t >= 4)
            optimizer.step()
        return w, optimizer.hyperparameters()[0]

    (ours, learned), (theirs, expected) = train(True), train(False)
    assert learned == expected
    assert all(map(torch.equal, ours, theirs))


def test_nesterov_without_a_momentum_is_refused():
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="nesterov=True needs a momentum"):
        HyperOptimizer([w], "SGD(0.1, nesterov=True)")
    HyperOptimizer([w], "SGD(0.1, nesterov=True)[lr, momentum] / SGD(1e-3)")
