"""Properties of every rule in `RULES`, so that a new rule is tested automatically."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_compile import made, step
from test_hypergradients import START, hypergradients, loss
from test_optimizer import give_gradients, weights
from test_resume import resume
from torch import Tensor

from hyperopt import DOMAINS, RULES, SGD, HyperOptimizer, Rule, Stack, parse
from hyperopt._engine.blocks import depends_on_weights

# Those that need shapes are in test_matrices.py.
every_rule = pytest.mark.parametrize("name", [n for n, r in RULES.items() if r.elementwise])
REAL, UNIT = DOMAINS["real"], DOMAINS["unit"]


def whole(name: str, **options) -> Rule:
    """A rule in which every hyperparameter takes part and is tuned, well inside its domain."""
    hypers, betas = RULES[name].hypers, itertools.cycle([0.6, 0.9])
    values = {n: next(betas) if hyper.domain is UNIT else 0.1 for n, hyper in hypers.items()}
    return RULES[name](**values, **options)[tuple(hypers)]


def other(name: str) -> dict[str, Any]:
    """For each option of a rule, a setting other than the default."""
    options = RULES[name].options.items()
    own = {n: option.default for n, option in options if n not in vars(Rule)}
    return {n: not x if isinstance(x, bool) else x / 2 or 0.1 for n, x in own.items()}


def variants(name: str) -> list[Rule]:
    """The rule as it is by default, with every hyperparameter, and with every option besides."""
    plain = RULES[name]()
    default = plain[tuple(n for n in plain.hypers if plain.is_active(n))]
    options = other(name)
    return [default, whole(name), *([whole(name, **options)] if options else [])]


def namespace(values: dict[str, Any]) -> SimpleNamespace:
    """The hyperparameters for an update, from numbers or vectors by name."""
    return SimpleNamespace(
        **{n: torch.as_tensor(x, dtype=torch.float64) for n, x in values.items()}
    )


# Hypergradients.


def difference(rule: Rule, move: tuple, g: Tensor, name: str) -> float:
    """How g times the new weights changes with a raw value, by differences of fourth order."""
    last_w, last_g, state, values = move
    domain = rule.tuned[name].domain

    def after(d: float) -> float:
        raw = torch.tensor(domain.raw(values[name]) + d, dtype=torch.float64)
        h = namespace({**values, name: domain.value(raw)})
        return float(g @ rule.update(last_w, last_g, state, h)[0])

    d = 1e-3
    return (8 * (after(d) - after(-d)) - (after(2 * d) - after(-2 * d))) / (12 * d)


@every_rule
def test_hypergradients_are_differences(name):
    """Of the rule's own update, in float64; test_hypergradients.py holds them to the definition."""
    for rule in variants(name):
        w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
        optimizer = HyperOptimizer([w], Stack(rule, SGD(1e-3)), compile=False)
        state = rule.init(w.detach())
        moves: list[tuple] = []
        for t in range(9):
            optimizer.zero_grad()
            loss(list(w), torch.sin).backward()
            assert w.grad is not None
            before, g = w.detach().clone(), w.grad.clone()
            optimizer.step()
            ours = hypergradients(optimizer)[0]
            for n in rule.tuned:
                expected = difference(rule, moves[-1], g, n) if moves else 0
                assert float(ours[n]) == pytest.approx(expected, rel=1e-8, abs=1e-10), (rule, n, t)
            moves.append((before, g, state, optimizer.hyperparameters()[0]))
            _, state = rule.update(before, g, state, namespace(moves[-1][-1]))
        assert any(ours.values()), f"{rule}: no hypergradient was tested"


@every_rule
def test_weights_without_gradients_stay_and_do_no_harm(name):
    hypers = RULES[name].hypers
    still = {name: 0.0 for name in ("weight_decay", "lambd") if name in hypers}
    values = {n: h.default or 0.1 for n, h in hypers.items() if n not in still} | {"lr": 0.01}
    for options in ({}, *({option: x} for option, x in other(name).items())):
        lowest = RULES[name](**values, **still, **options)[tuple(values)]
        for top in ("SGD(1e-4)", "Adam(1e-3)", "AdaGrad(1e-3)", "RMSProp(1e-3)"):
            w = torch.randn(6, requires_grad=True)
            start = w.detach().clone()
            optimizer = HyperOptimizer([w], f"{lowest} / {top} / {top}", compile=False)
            for t in range(10):
                # At first none has a gradient, so that hypergradients are 0 too; later half have.
                w.grad = torch.randn(6) * torch.tensor([0, 0, 0, 1, 1, 1]) * (t > 2)
                optimizer.step()
                assert torch.equal(w[:3], start[:3]), optimizer.stack
                assert optimizer.snapshot().isfinite().all(), optimizer.stack
                assert w.isfinite().all(), optimizer.stack
            assert not (w[3:] == start[3:]).any(), optimizer.stack
            lr = optimizer.hyperparameters()[0]["lr"]
            assert lr != pytest.approx(0.01, rel=1e-6), "the level above must have moved lr"


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e20])
def test_a_non_finite_gradient_leaves_the_state_unchanged(name, bad):
    """A gradient that is not finite, or whose square overflows in float32."""
    for rule, size in itertools.product(variants(name), (0, 1e-3)):
        runs = []
        for gap in (False, True):
            w = [torch.ones(n, requires_grad=True) for n in (3, 2)]
            optimizer = HyperOptimizer(w, Stack(rule["lr"], SGD(size)), compile=False)
            for t in range(9):
                if gap and t == 5:
                    w[0].grad, w[1].grad = torch.tensor([1.0, bad, 1.0]), torch.ones(2)
                    before = optimizer.snapshot()
                    optimizer.step()
                    assert torch.equal(optimizer.snapshot(), before)
                give_gradients(w, t)
                optimizer.step()
            assert optimizer.skipped == [gap, gap]
            runs.append(w)
        for p, q in zip(*runs, strict=True):
            assert p.isfinite().all() and (size or torch.equal(p, q)), rule


# Hyperparameters.


@every_rule
def test_no_hyperparameter_leaves_its_domain(name):
    """One step moves it as far as can be; in the next it is legal and all is finite still."""
    for rule in variants(name):
        for n, how in rule.tuned.items():
            if how.domain is REAL:
                continue
            for size, sign in ((1e300, 1), (1e300, -1)):
                w = torch.ones(4, dtype=torch.float64, requires_grad=True)
                optimizer = HyperOptimizer([w], Stack(rule[n], SGD(size)), compile=False)
                legal = rule.hypers[n]
                for g in (1, sign, sign):
                    w.grad = g * torch.tensor([0, 1e-3, 1, 1]).double()
                    optimizer.step()
                    value = optimizer.hyperparameters()[0][n]
                    where = f"{optimizer.stack}: {n} is {value}"
                    assert legal.low <= value < legal.high and value in how, where
                    assert w.isfinite().all(), where
                assert optimizer.snapshot().isfinite().all(), where


@every_rule
def test_the_notation_round_trips(name):
    for rule in variants(name):
        stack = Stack(rule, rule, SGD(0.1))
        assert parse(str(stack)) == stack


def run(stack: str) -> tuple[Tensor, list[dict[str, float]]]:
    """The weights and hyperparameters after ten steps of random gradients, always the same."""
    w = weights((5, 4), (3,), ())
    optimizer = HyperOptimizer(w, stack, compile=False)
    for t in range(10):
        give_gradients(w, t)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in w]), optimizer.hyperparameters()


@every_rule
def test_a_level_that_moves_nothing_changes_nothing(name):
    above = ("", " / Adam(1e-4)")
    for rule, others in itertools.product(variants(name), above):
        stack = f"{rule}{others}"
        plain, values = run(stack)
        moved, under_zero = run(f"{stack} / SGD(0)")
        assert torch.equal(plain, moved), f"{stack}: the weights must be the same bit for bit"
        for level, same in zip(values, under_zero, strict=False):
            # A value that goes through its domain and back is rounded.
            assert level == pytest.approx(same, rel=1e-12), stack


# The update alone.


def checked_move(rule: Rule, w: Tensor, s: dict, values: dict[str, Any]) -> tuple[Tensor, dict]:
    """An update of random gradients that keeps to what `hyperopt.rules` asks of it."""
    g, h = torch.randn_like(w), namespace(values)
    inputs = [w, g, *s.values(), *vars(h).values()]
    before = [x.clone() for x in inputs]
    moved, after = rule.update(w, g, s, h)
    assert all(map(torch.equal, inputs, before)), "it writes to its arguments"
    assert (moved.dtype, moved.shape) == (w.dtype, w.shape)
    kinds = [[(n, x.dtype, x.shape) for n, x in state.items()] for state in (s, after)]
    assert kinds[0] == kinds[1], "the state is not as `init` made it"
    return moved, after


def moved(rule: Rule, values: dict[str, Any]) -> Tensor:
    """Two weights after seven such updates, always the same."""
    torch.manual_seed(0)
    w = torch.randn(2, dtype=torch.float64)
    state = rule.init(w)
    for _ in range(7):
        w, state = checked_move(rule, w, state, values)
    return w


@every_rule
def test_an_update_is_pure_and_keeps_its_state_types(name):
    for rule, dtype in itertools.product(variants(name), (torch.float32, torch.float64)):
        w = torch.randn(4, dtype=dtype)
        state = rule.init(w)
        for _ in range(3):
            w, state = checked_move(rule, w, state, rule.values)


@every_rule
def test_each_hyperparameter_below_may_have_its_own_values(name):
    """Then an update reads vectors, and moves each entry as it would alone."""
    for rule in variants(name):
        for n in rule.hypers:
            several = {"a": rule.values[n], "b": getattr(rule, n) * 0.9}
            both = rule.with_values({n: several})
            together = moved(both, {**rule.values, n: [*several.values()]})
            for i, value in enumerate(several.values()):
                alone = moved(rule, {**rule.values, n: value})
                torch.testing.assert_close(together[i], alone[i], rtol=1e-12, atol=1e-12)


@every_rule
def test_the_weights_of_the_last_step_are_kept_where_an_update_needs_them(name):
    for rule in variants(name):
        w, g = torch.randn(2, 4, dtype=torch.float64)
        h, state = namespace(rule.values), rule.init(w)
        _, state = rule.update(w, g, state, h)
        (first, after), (second, same) = (rule.update(x, g, state, h) for x in (w, w + 1))
        shifted = torch.allclose(first + 1, second, rtol=1e-12, atol=1e-12)
        free = shifted and all(torch.equal(after[n], same[n]) for n in after)
        assert depends_on_weights(rule) is not free, rule


# Runs.


@every_rule
def test_a_resumed_run_is_the_same_bit_for_bit(name):
    for rule in variants(name):
        resume(f"{rule} / Adam(1e-3)", "one group", False, True, (1, 4))


@pytest.mark.slow
@pytest.mark.compiler
@every_rule
def test_compiled_is_eager_to_rounding(name):
    stack = f"{whole(name, **other(name))} / SGD(1e-4)"
    (ours, groups), (theirs, their_groups) = (made(torch.float64, {}) for _ in range(2))
    fast = HyperOptimizer(groups, stack, compile=True)
    slow = HyperOptimizer(their_groups, stack, compile=False)
    for t in range(12):
        step(ours, fast, t)
        step(theirs, slow, t)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fast.snapshot(), slow.snapshot(), rtol=1e-9, atol=0)
    assert fast.compiled


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_whether_its_update_is_linear_in_lr(name):
    """After some steps, so that bounds that depend on their number count.

    SOAP's weight decay comes after its update: together they have a term of second order in lr.
    """
    rule = RULES[name](**{"weight_decay": 0.0} if name == "SOAP" else {})
    torch.manual_seed(0)
    w = torch.randn(12 if rule.elementwise else (3, 4), dtype=torch.float64)
    state = rule.init(w)
    for _ in range(5):
        w, state = rule.update(w, torch.randn_like(w), state, namespace({**rule.values, "lr": 0.5}))
    g = torch.randn_like(w)
    one, two, three = (
        rule.update(w, g, state, namespace({**rule.values, "lr": lr}))[0] for lr in (0.1, 1, 100)
    )
    linear = torch.allclose(99 * (two - one), 0.9 * (three - two), rtol=1e-9, atol=1e-9)
    assert linear == rule.linear_in_lr
