"""Hypergradients against their definition, and against the closed forms of Baydin et al. (2018)."""

import itertools
from typing import Any

import pytest
import torch
from reference import Reference, mp

from hyperopt import RULES, HyperOptimizer, parse

START = [0.4, -0.7, 1.1, 0.3, -0.2]

# Every rule with every hyperparameter tuned, in all variants; lr stands for the step size, which is
# larger on the weights than above.
VARIANTS = [
    "SGD({lr}, momentum=0.6, weight_decay=0.05)[lr, momentum, weight_decay]",
    "SGD({lr}, momentum=0.6, weight_decay=0.05, nesterov=True)[lr, momentum, weight_decay]",
    "SGD({lr}, momentum=0)[lr: log, momentum]",
    "AdaGrad({lr}, eps=0.1, weight_decay=0.05)[lr, eps: real, weight_decay: real]",
    "AdaGrad({lr}, eps=0.1, weight_decay=0.05, lr_decay=0.1)[lr, eps, weight_decay, lr_decay]",
    "AdaGrad({lr}, eps=0.1, initial_accumulator_value=0.1, eps_inside=True)[lr: square, eps: log]",
    "RMSProp({lr}, gamma=0.7, eps=0.1, weight_decay=0.05)[lr, gamma, eps, weight_decay]",
    "RMSProp({lr}, gamma=0.7, eps=0.1, eps_inside=True)[lr: real, gamma, eps]",
    "RMSProp({lr}, gamma=0.7, eps=0.1, momentum=0.6)[lr, gamma, eps, momentum]",
    "RMSProp({lr}, gamma=0.7, eps=0.1, momentum=0.6, centered=True)[lr, gamma, eps, momentum]",
    "Adadelta({lr}, rho=0.7, eps=0.1, weight_decay=0.05)[lr, rho, eps, weight_decay]",
    "Adam({lr}, 0.6, 0.8, eps=0.1, weight_decay=0.05)[lr, beta1, beta2, eps, weight_decay]",
    "Adam({lr}, 0.6, 0.8, eps=0.1, v0=0.01)[lr, beta1: real, beta2, eps]",
    "Adam({lr}, 0.6, 0.5, eps=0.1, amsgrad=True)[lr, beta1, beta2, eps]",
    "Adamax({lr}, 0.6, 0.8, eps=1e-6, weight_decay=0.05)[lr, beta1, beta2, eps, weight_decay]",
    "NAdam({lr}, 0.6, 0.8, eps=0.1, weight_decay=0.05, momentum_decay=0.5)"
    "[lr, beta1, beta2, eps, weight_decay, momentum_decay]",
    "NAdam({lr}, 0.6, 0.8, eps=0.1, weight_decay=0.05, decoupled_weight_decay=True)"
    "[lr, beta1, weight_decay]",
    "AdamW({lr}, 0.6, 0.8, eps=0.1, weight_decay=0.05)[lr, beta1, beta2, eps, weight_decay]",
    "AdamW({lr}, 0.6, 0.5, eps=0.1, weight_decay=0.05, amsgrad=True)[lr, beta1, beta2]",
    "RAdam({lr}, 0.6, 0.9, eps=0.1, weight_decay=0.05)[lr, beta1, beta2, eps, weight_decay]",
    "RAdam({lr}, 0.6, 0.9, eps=0.1, weight_decay=0.05, decoupled_weight_decay=True)"
    "[lr, beta1, weight_decay]",
    "Lion({lr}, 0.6, 0.8, weight_decay=0.05)[lr, beta1, beta2, weight_decay]",
    "Rprop({lr}, 0.6, 1.3, step_size_min=0)[lr, eta_minus, eta_plus]",
    "ASGD({lr}, lambd=0.1, alpha=0.5, weight_decay=0.05)[lr, lambd, alpha, weight_decay]",
    "ScheduleFreeAdam({lr}, 0.6, 0.8, eps=0.1, weight_decay=0.05)"
    "[lr, beta1, beta2, eps, weight_decay]",
    "ScheduleFreeAdam({lr}, 0.6, 0.8, eps=0.1, r=2)[lr, beta1, beta2, eps]",
]


def loss(w, sin):
    """A small non-convex function of a sequence of numbers."""
    waves = [sin(2 * x + i) + x * x / 5 for i, x in enumerate(w)]
    return sum(waves) + sum(x * sin(y) for x, y in itertools.pairwise(w))


def hypergradients(optimizer: HyperOptimizer) -> list[dict[str, Any]]:
    """Of each level below the topmost, as the level above has read them at the last step."""
    return [
        level["last"]["g"]
        for level in optimizer.state_dict()["param_groups"][0]["tower"]["levels"][1:]
    ]


def close(ours, theirs, where: str) -> None:
    assert ours.keys() == theirs.keys(), where
    for name, value in theirs.items():
        assert float(ours[name]) == pytest.approx(float(value), rel=1e-10, abs=1e-14), (where, name)


def test_the_variants_below_have_every_hyperparameter_of_every_rule():
    rules = [parse(variant.format(lr=0.1)).levels[0] for variant in VARIANTS]
    elementwise = {name: rule for name, rule in RULES.items() if rule.elementwise}
    assert {rule.name for rule in rules} == elementwise.keys()
    for name, rule in elementwise.items():
        tuned = set().union(*(r.tuned for r in rules if r.name == name))
        assert tuned == rule.hypers.keys()


@pytest.mark.parametrize("height", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.partition("[")[0])
def test_whole_runs_follow_the_definition(variant, height):
    levels = [variant.format(lr=lr) for lr in (0.1, 1e-3, 1e-5, 1e-8)[:height]] + [
        f"SGD(1e-{4 + height})"
    ]
    stack, rule = " / ".join(levels), variant.partition("(")[0]
    w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = HyperOptimizer([w], stack, compile=False)
    reference = Reference(stack, START)
    tested: list[set[str]] = [set() for _ in range(height)]
    for t in range(7):
        optimizer.zero_grad()
        loss(list(w), torch.sin).backward()
        optimizer.step()
        reference.step(lambda w: loss(list(w.values()), mp.sin))
        for k, (ours, theirs) in enumerate(
            zip(hypergradients(optimizer), reference.hypergradients, strict=True)
        ):
            close(ours, theirs, f"hypergradients of level {k} at step {t}")
            tested[k] |= {name for name, value in theirs.items() if value}
        for k, (values, expected) in enumerate(
            zip(optimizer.hyperparameters(), reference.hyperparameters(), strict=True)
        ):
            close(values, expected, f"hyperparameters of level {k} after step {t}")
        close(dict(enumerate(w.tolist())), reference.w, f"weights after step {t}")
    flat = {"Lion": {"beta1", "beta2"}, "Rprop": {"eta_minus"}}.get(rule, set())
    for theirs, names in zip(reference.hypergradients, tested, strict=True):
        assert theirs.keys() - names == flat, "the problem leaves out a hypergradient"


def test_sgd_has_the_closed_form():
    w = torch.randn(50, dtype=torch.float64, requires_grad=True)
    optimizer = HyperOptimizer([w], "SGD(0.1) / SGD(0.01)", compile=False)
    lr, last = 0.1, torch.zeros(50, dtype=torch.float64)
    for _ in range(20):
        w.grad = torch.randn(50, dtype=torch.float64)
        optimizer.step()
        hypergradient = -float(w.grad @ last)
        assert float(hypergradients(optimizer)[0]["lr"]) == pytest.approx(hypergradient, rel=1e-12)
        lr, last = lr - 0.01 * hypergradient, w.grad
        assert optimizer.hyperparameters()[0]["lr"] == pytest.approx(lr, rel=1e-12)


def test_the_step_size_of_adam_has_the_closed_form():
    w = torch.randn(50, dtype=torch.float64, requires_grad=True)
    optimizer = HyperOptimizer([w], "Adam(0.1)[lr] / SGD(0.01)", compile=False)
    m, v, direction = (torch.zeros(50, dtype=torch.float64) for _ in range(3))
    for t in range(1, 20):
        w.grad = torch.randn(50, dtype=torch.float64)
        optimizer.step()
        hypergradient = -float(w.grad @ direction)
        assert float(hypergradients(optimizer)[0]["lr"]) == pytest.approx(hypergradient, rel=1e-12)
        m, v = 0.9 * m + 0.1 * w.grad, 0.999 * v + 0.001 * w.grad**2
        direction = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def test_separate_step_sizes_for_each_hyperparameter_and_group():
    stack = (
        "Adam(0.1, 0.6, 0.8, eps=0.1) / SGD({lr: 0.003, beta1: 0.02, beta2: 0.05}, momentum=0.5)"
        " / SGD({lr: 1e-4, momentum: 1e-3})"
    )
    overrides = [{}, {"lr": 0.05, "beta1": 0.5}, {"eps": 0.2}]
    groups = [0, 0, 1, 1, 2]
    w = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in START]
    optimizer = HyperOptimizer(
        [
            {"params": [x for x, g in zip(w, groups, strict=True) if g == group], **own}
            for group, own in enumerate(overrides)
        ],
        stack,
        compile=False,
    )
    own = [{"lr": 0.05, "beta1": 0.5} if g == 1 else {} for g in range(3)]
    eps = [{"eps": 0.1}, {"eps": 0.1}, {"eps": 0.2}]
    reference = Reference(stack, START, groups, [a | b for a, b in zip(own, eps, strict=True)])
    for t in range(8):
        optimizer.zero_grad()
        loss(w, torch.sin).backward()
        optimizer.step()
        reference.step(lambda w: loss(list(w.values()), mp.sin))
        for k, (ours, theirs) in enumerate(
            zip(hypergradients(optimizer), reference.hypergradients, strict=True)
        ):
            close(ours, theirs, f"hypergradients of level {k} at step {t}")
        close(dict(enumerate(x.item() for x in w)), reference.w, f"weights after step {t}")
    assert hypergradients(optimizer)[0].keys() == {"lr", "lr[1]", "beta1", "beta1[1]", "beta2"}


@pytest.mark.parametrize(
    "middle",
    [
        "NAdam({lr: 0.003, momentum: 0.002}, {lr: 0.6, momentum: 0.7}, 0.8, eps=0.1)",
        "RAdam(0.003, 0.6, {lr: 0.8, momentum: 0.6}, eps=0.1)",
        "AdaGrad(0.003, lr_decay={lr: 0.1, momentum: 0.2})[lr, lr_decay]",
    ],
)
def test_separate_betas_for_each_hyperparameter(middle):
    stack = f"SGD(0.1, momentum=0.6) / {middle} / SGD(1e-3)"
    w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = HyperOptimizer([w], stack, compile=False)
    reference = Reference(stack, START)
    for t in range(9):
        optimizer.zero_grad()
        loss(list(w), torch.sin).backward()
        optimizer.step()
        reference.step(lambda w: loss(list(w.values()), mp.sin))
        for k, (ours, theirs) in enumerate(
            zip(hypergradients(optimizer), reference.hypergradients, strict=True)
        ):
            close(ours, theirs, f"hypergradients of level {k} at step {t}")
        close(dict(enumerate(w.tolist())), reference.w, f"weights after step {t}")
