"""The engine computes what `hyperopt.algorithm` defines."""

import doctest

import pytest
import torch

import hyperopt.algorithm
from hyperopt import RULES, SGD, Hyper, HyperOptimizer, Rule, Stack, parse
from hyperopt._engine.engine import Engine
from hyperopt.algorithm import skip, start, step

# Every rule, with hyperparameters that matter from the first steps on.
RULE = {
    "SGD": "SGD({lr}, momentum=0.6, weight_decay=0.05)[lr, momentum, weight_decay]",
    "AdaGrad": "AdaGrad({lr}, eps=0.1, lr_decay=0.1)[lr, eps, lr_decay]",
    "RMSProp": "RMSProp({lr}, gamma=0.7, eps=0.1, momentum=0.6, centered=True)",
    "Adadelta": "Adadelta({lr}, rho=0.7, eps=0.1, weight_decay=0.05)[lr, rho, weight_decay]",
    "Adam": "Adam({lr}, 0.6, 0.8, eps=0.1, amsgrad=True)",
    "AdamW": "AdamW({lr}, 0.6, 0.8, eps=0.1, weight_decay=0.05)[lr, beta1, beta2, weight_decay]",
    "Adamax": "Adamax({lr}, 0.6, 0.8)",
    "NAdam": "NAdam({lr}, 0.6, 0.8, eps=0.1, momentum_decay=0.5)[lr, beta1, momentum_decay]",
    "RAdam": "RAdam({lr}, 0.6, 0.9, eps=0.1)",
    "Lion": "Lion({lr}, 0.6, 0.8, weight_decay=0.05)[lr, weight_decay]",
    "Rprop": "Rprop({lr}, 0.6, 1.3, step_size_min=0)[lr, eta_plus]",
    "ASGD": "ASGD({lr}, lambd=0.1, alpha=0.5, weight_decay=0.05, t0=3)[lr, lambd, alpha]",
    "ScheduleFreeAdam": "ScheduleFreeAdam({lr}, 0.6, 0.8, eps=0.1, r=2)",
}
HEIGHTS = {
    0: "{lowest}",
    1: "{lowest} / SGD(1e-3)",
    2: "{lowest} / {middle} / SGD(1e-7)",
    3: "{lowest} / {middle} / Adam(1e-5) / SGD(1e-8)",
}
ESTIMATORS = [
    "RMSProp(0.05, gamma=0.7)[lr: log, gamma] / SGD(0.01, normalize=True)",
    "Adam(0.05)[lr: log, beta1] / SGD(0.01, horizon=3)",
    "SGD(0.05, momentum=0.5) / Adam(0.01, horizon=inf) / SGD(1e-3)",
    "ScheduleFreeAdam(0.1)[lr: log] / AdaGrad(0.5, horizon=inf, normalize=True) / SGD(1e-3)",
    "SGD(0.05)[lr: log per tensor, momentum] / SGD(0.01, normalize=True)",
    "SGD(0.05, momentum=0.5) / Adam({lr: 0.01, momentum: 0.1})[lr] / SGD(1e-3, normalize=True)",
    "SGD(0.05, momentum=0.5) / SGD(0.01, surrogate=True) / SGD(1e-3, surrogate=True)",
    "Adam(0.05)[lr: log]" + " / SGD(1e-3, surrogate=True)" * 3,
    "SGD(0.05)[lr: log per tensor, momentum] / SGD(0.01, surrogate=True, horizon=3)",
    "RMSProp(0.05)[lr: log per tensor] / SGD(0.01, surrogate=True, clip_norm=0.3) / SGD(0.1)",
    "SGD(0.05, momentum=0.5) / SGD(0.1, momentum=0.5, clip_norm=0.05) / SGD(1e-3, clip_value=0.01)",
    "SGD(0.05, momentum=0.5)[lr: log from 0.02 to 0.06, momentum] / SGD(0.5) / SGD(1e-3)",
    "SGD(0.05)[lr: log per tensor, momentum] / SGD({lr: 0.1, momentum: 0.01}, momentum=0.5)",
    "Adam(0.05)[lr: square per tensor] / RMSProp(1e-3)[lr, gamma] / SGD(1e-4)",
]
SIZES = (3, 1, 4)


def drawn(generator: torch.Generator, w: torch.Tensor) -> torch.Tensor:
    """The gradient of a quadratic, with noise."""
    noise = torch.randn(len(w), generator=generator, dtype=torch.float64)
    return torch.linspace(0.5, 2, len(w), dtype=torch.float64) * w + noise / 3


def check(stack: str | Stack, compile: bool = False, steps: int = 25) -> None:
    """Both make the same steps; the 8th has no gradient, the 14th a non-finite one."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(sum(SIZES), generator=generator, dtype=torch.float64)
    params = [torch.nn.Parameter(part.clone()) for part in w.split(SIZES)]
    optimizer = HyperOptimizer(params, stack, compile=compile)
    owners = [i for i, size in enumerate(SIZES) for _ in range(size)]
    levels = start(parse(stack), w, owners)
    for t in range(steps):
        gradient = drawn(generator, w)
        missing, infinite = t == 8, t == 14 and optimizer.stack.height > 0
        for p, part in zip(params, gradient.split(SIZES), strict=True):
            p.grad = None if missing else part / 0 if infinite else part.clone()
        optimizer.step()
        if infinite:
            levels = skip(levels)
        elif missing:  # no step at all, but level 0 forgets its last update
            levels = [*skip(levels[:2])[:1], *levels[1:]]
        else:
            w, levels = step(levels, w, gradient)
        ours, engine = torch.cat([p.detach() for p in params]), optimizer._engine
        assert isinstance(engine, Engine)
        torch.testing.assert_close(ours, w, rtol=1e-12, atol=1e-12)
        raw = [row for each in engine._numbers.raw for row in each]
        for k, (mine, level) in enumerate(zip(raw, levels, strict=True)):
            torch.testing.assert_close(mine, level.raw, rtol=1e-12, atol=1e-12, msg=f"level {k}")


def test_every_rule_is_here():
    ours = {n: rule for n, rule in RULES.items() if rule.__module__ == "hyperopt.rules"}
    assert RULE.keys() == {n for n, rule in ours.items() if rule.elementwise}  # see test_matrices


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("rule", RULE)
def test_every_rule_at_every_height(rule, height):
    lowest, middle = RULE[rule].format(lr=0.05), RULE[rule].format(lr=1e-4)
    check(HEIGHTS[height].format(lowest=lowest, middle=middle))


@pytest.mark.parametrize("stack", ESTIMATORS)
def test_estimators_limits_and_scopes(stack):
    check(stack)


@pytest.mark.compiler
@pytest.mark.parametrize("stack", [*ESTIMATORS[2:7], "Adam(0.05) / SGD(1e-3) / SGD(1e-5)"])
def test_the_compiled_step_too(stack):
    check(stack, compile=True)


class Signed(Rule, known=False):
    """Its update depends on the weights through a sign, which is flat."""

    lr = Hyper(0.1)

    def update(self, w, g, s, h):
        return w - h.lr * torch.sign(g + 0.5 * w), {}


class Late(Rule, known=False):
    """Its update depends on the weights from the third step on."""

    lr = Hyper(0.1)

    def init(self, w):
        return {"step": torch.zeros((), dtype=torch.float64)}

    def update(self, w, g, s, h):
        decay = torch.where(s["step"] >= 2, 0.5, 0.0)
        return w - h.lr * (g + decay * w), {"step": s["step"] + 1}


@pytest.mark.parametrize("rule", [Signed, Late])
def test_rules_with_hidden_dependence_on_the_weights(rule):
    check(rule(0.05) / SGD(1e-3))


def test_what_the_page_leaves_out_is_refused():
    for stack in ("SGD(0.1) / SGD(1, every=2)", "SGD(0.1)[lr: log] / SGD(1, trust=0.1)"):
        with pytest.raises(ValueError, match="not part of the definition"):
            start(parse(stack), torch.ones(2))


def test_many_runs_at_once_under_vmap():
    lrs = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)
    first = start(parse("SGD(0.1, momentum=0.5) / Adam(0.01) / SGD(1e-3)"), torch.ones(4).double())

    def run(lr: torch.Tensor) -> torch.Tensor:
        raw = torch.stack([lr, first[0].raw[1]])
        levels, w = [first[0]._replace(raw=raw), *first[1:]], torch.ones(4, dtype=torch.float64)
        for _ in range(3):
            w, levels = step(levels, w, torch.sin(3 * w))
        return w

    for alone, together in zip(map(run, lrs), torch.vmap(run)(lrs), strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-12, atol=0)


def test_the_example_of_the_page():
    assert doctest.testmod(hyperopt.algorithm).attempted
    assert not doctest.testmod(hyperopt.algorithm).failed
