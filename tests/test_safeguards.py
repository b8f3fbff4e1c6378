"""Safeguards of hyperparameters: domains, clipping, freezing, and skipped moves."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperopt import HyperOptimizer, parse

STACK = "Adam(0.01) / SGD(1e-3{}) / Adam(1e-4)"


def run(stack: str, gradients, compile: bool = False) -> tuple[list, list, HyperOptimizer]:
    """The weights and the hyperparameters after each step."""
    w = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    optimizer = HyperOptimizer([w], stack, compile=compile)
    weights, numbers = [], []
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
        weights.append(w.detach().clone())
        numbers.append(optimizer.hyperparameters())
    return weights, numbers, optimizer


def gradients(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(n)]


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted(bad, compile):
    stack = STACK.format("")
    good = gradients(8)
    poisoned = [g.clone() for g in good]
    poisoned[4][2] = bad
    weights, numbers, optimizer = run(stack, poisoned, compile)
    assert optimizer.skipped == [1, 1, 1]
    assert torch.equal(weights[4], weights[3])
    assert numbers[4] == numbers[3]
    # After it, all goes on as from a step after which nobody asks what the last one had done.
    assert all(w.isfinite().all() for w in weights)
    assert not torch.equal(weights[5], weights[4])
    assert numbers[6] != numbers[5]
    clean, _, other = run(stack, good[:4], compile)
    assert other.skipped == [0, 0, 0]
    assert torch.equal(weights[3], clean[3])


def test_the_state_after_a_skipped_step_is_the_one_before_it():
    good = gradients(6)
    with_gap = [*good[:3], torch.full((5,), math.nan, dtype=torch.float64), *good[3:]]
    # Nothing is tuned but by a step size of 0: the skipped step must not be seen at all.
    stack = "Adam(0.01) / SGD(0)"
    assert torch.equal(run(stack, good)[0][-1], run(stack, with_gap)[0][-1])


@pytest.mark.parametrize("how", ["", ", clip_value=1", ", clip_norm=1"])
def test_a_hypergradient_that_overflows_leaves_the_weights_moving(how):
    huge = [torch.full((5,), 1e154, dtype=torch.float64) for _ in range(4)]
    weights, numbers, optimizer = run(f"SGD(1e-160) / SGD(1e-5{how})", huge)
    assert optimizer.skipped[0] == 0
    assert optimizer.skipped[1] > 0
    assert numbers[0] == numbers[-1]
    assert not torch.equal(weights[-1], weights[-2])


def test_a_tensor_s_first_gradient_may_be_non_finite():
    """The tensor has no last move, so the hypergradient is finite."""
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    optimizer = HyperOptimizer(params, STACK.format(""), compile=False)
    for t in range(4):
        params[0].grad = torch.ones(3)
        params[1].grad = torch.full((3,), math.nan) if t == 3 else None
        before = optimizer.snapshot()
        optimizer.step()
    assert optimizer.skipped == [1, 1, 1]
    assert torch.equal(optimizer.snapshot(), before)
    assert torch.equal(params[1], torch.ones(3))


def test_an_overflowing_update_is_skipped():
    some = [torch.full((5,), 1e5, dtype=torch.float64) for _ in range(3)]
    _, numbers, optimizer = run("SGD(0.01) / SGD(1e300)", some)
    assert [level[0]["lr"] for level in numbers] == [0.01] * 3
    assert optimizer.skipped == [0, 2]


def test_an_overflowing_state_is_discarded():
    # The hypergradient is finite, and its square, which Adam keeps, is not.
    some = [torch.full((5,), 1e90, dtype=torch.float64) for _ in range(4)]
    _, _, optimizer = run("SGD(1e-100) / Adam(1e-105)", some)
    state = optimizer.state_dict()["param_groups"][0]["tower"]["levels"][1]["last"]["exp_avg_sq"][
        "lr"
    ]
    assert math.isfinite(float(state))
    assert optimizer.skipped[1] > 0


def test_a_plain_stack_propagates_non_finite_gradients_like_torch():
    weights, _, optimizer = run("SGD(0.1)", [torch.full((5,), math.nan, dtype=torch.float64)])
    assert weights[0].isnan().all()
    assert optimizer.skipped == [0]


@given(
    domain=st.sampled_from(["real", "unit", "square", "log"]),
    size=st.sampled_from([1e-12, 1.0, 1e12, 1e150]),
    values=st.lists(
        st.sampled_from([0.0, 1.0, -1e-30, 1e30, -1e150, 1e300, math.inf, -math.inf, math.nan]),
        min_size=3,
        max_size=6,
    ),
)
@settings(max_examples=60)
def test_no_gradient_takes_a_hyperparameter_out_of_its_domain(domain, size, values):
    stack = parse(f"SGD(0.5)[lr: {domain}] / SGD({size!r})")
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = HyperOptimizer([w], stack, compile=False)
    for value in values:
        w.grad = torch.tensor([value, 1.0, -value], dtype=torch.float64)
        optimizer.step()
        lr = optimizer.hyperparameters()[0]["lr"]
        assert math.isfinite(lr)
        assert lr in stack.levels[0].tuned["lr"]


def test_clipping_by_value_is_clamping_the_hypergradient():
    g = gradients(3)
    free = run("SGD(0.01) / SGD(1.0)", g)[1]
    clipped = run("SGD(0.01) / SGD(1.0, clip_value=1e-3)", g)[1]
    moves = [b[0]["lr"] - a[0]["lr"] for a, b in itertools.pairwise(free)]
    assert all(abs(move) > 1e-3 for move in moves), "there must be something to clip"
    assert clipped[1][0]["lr"] - clipped[0][0]["lr"] == pytest.approx(
        math.copysign(1e-3, moves[0]), rel=1e-9
    )


def test_clipping_by_norm_keeps_the_direction():
    g = gradients(3)
    start, free = (run("SGD(0.1, momentum=0.5) / SGD(1.0)", g)[1][t][0] for t in (1, 2))
    stack = "SGD(0.1, momentum=0.5) / SGD(1.0, clip_norm=1e-4)"
    first, second = (run(stack, g[:3])[1][t][0] for t in (1, 2))
    move = [second[name] - first[name] for name in ("lr", "momentum")]
    assert math.hypot(*move) == pytest.approx(1e-4, rel=1e-6)
    assert free != start


def test_upper_levels_see_clipped_hypergradients():
    g = gradients(5)
    stack = "SGD(0.01) / SGD(0.1, clip_value=1e-3) / SGD(1.0)"
    numbers = run(stack, g)[1]
    # The level's own hypergradient is the product of two clipped ones: 1e-6 at most.
    moves = [b[1]["lr"] - a[1]["lr"] for a, b in itertools.pairwise(numbers[1:])]
    assert all(abs(move) == pytest.approx(1e-6, rel=1e-6) for move in moves)


def test_every_and_until_control_when_a_level_moves():
    numbers = run("SGD(0.01) / SGD(1e-3, every=3, until=8)", gradients(12))[1]
    lrs = [0.01, *(level[0]["lr"] for level in numbers)]
    moved = [t for t, (a, b) in enumerate(itertools.pairwise(lrs)) if a != b]
    assert moved == [3, 6]  # at step 0 there is no hypergradient yet


def test_turns_and_counts_continue_in_a_resumed_run():
    stack = "SGD(0.01) / SGD(1e-3, every=3, until=8)"
    steps = gradients(12)
    steps[1][0] = math.nan
    _, numbers, whole = run(stack, steps)
    weights, _, first = run(stack, steps[:5])
    w = weights[-1].clone().requires_grad_()
    optimizer = HyperOptimizer([w], stack, compile=False)
    optimizer.load_state_dict(first.state_dict())
    assert optimizer.skipped == [1, 0]
    for t in range(5, 12):
        w.grad = steps[t].clone()
        optimizer.step()
        assert optimizer.hyperparameters() == numbers[t]
    assert numbers[5] != numbers[6] == numbers[11]
    assert optimizer.skipped == whole.skipped


def test_a_level_that_made_no_move_has_no_hypergradient():
    """If a level made no move, its own step size has no hypergradient."""
    numbers = run("SGD(0.01) / SGD(1e-3, every=2) / SGD(1.0)", gradients(6))[1]
    sizes = [1e-3, *(level[1]["lr"] for level in numbers)]
    moved = [t for t, (a, b) in enumerate(itertools.pairwise(sizes)) if a != b]
    assert moved == [3, 5], "the level moves at even steps, and is judged one step later"


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ("SGD(0.1, every=2) / SGD(0.1)", "every is for a level that moves hyperparameters"),
        ("SGD(0.1) / SGD(0.1, every=0)", "every must be 1 or more, but is 0"),
        ("SGD(0.1) / SGD(0.1, every=1.5)", "every must be an int"),
        ("SGD(0.1) / SGD(0.1, clip_norm=-1)", "clip_norm must be 0 or more"),
        ("Rprop(0.1)[lr: log] / SGD(0.1, trust=0.1)", "Rprop is not linear in lr"),
        ("Adafactor(0.1)[lr: log] / SGD(0.1, trust=0.1)", "Adafactor is not linear in lr"),
    ],
)
def test_errors(stack, message):
    with pytest.raises(ValueError, match=message):
        parse(stack)
