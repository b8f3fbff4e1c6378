"""Plain rules match the optimizers of the same name in `torch.optim`; special cases of some."""

import functools
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor

import hyperopt._engine.shards
from hyperopt import RULES, HyperOptimizer, parse
from hyperopt._engine.blocks import depends_on_weights


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. (2023), which `torch.optim` lacks, line by line."""

    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            eta, lamda, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
            for theta in group["params"]:
                g, m = theta.grad, self.state[theta].get("m", torch.zeros_like(theta))
                c = torch.lerp(g, m, beta1)
                theta.sub_(eta * (c.sign() + lamda * theta))
                self.state[theta]["m"] = torch.lerp(g, m, beta2)


NOT_IN_TORCH: dict[str, Any] = {
    "Lion": Lion,
    "AdamWScheduleFree": functools.partial(AdamWScheduleFree, weight_lr_power=0.0),
}

# A notation, its optimizer and arguments in torch.optim, and what the second param group overrides.
PLAIN: list[tuple[str, str, dict[str, Any], dict[str, float]]] = [
    ("SGD(0.1)", "SGD", {"lr": 0.1}, {"lr": 0.03}),
    (
        "SGD(0.1, momentum=0.9, weight_decay=0.01)",
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"momentum": 0.5, "weight_decay": 0.2},
    ),
    (
        "SGD(0.1, momentum=0.9, weight_decay=0.01, nesterov=True)",
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        {"lr": 0.03, "momentum": 0.5},
    ),
    ("AdaGrad(0.1)", "Adagrad", {"lr": 0.1}, {"lr": 0.03}),
    (
        "AdaGrad(0.1, eps=1e-3, weight_decay=0.01, initial_accumulator_value=0.5)",
        "Adagrad",
        {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.01, "initial_accumulator_value": 0.5},
        {"eps": 0.1, "weight_decay": 0.0},
    ),
    (
        "AdaGrad(0.1, lr_decay=0.1)",
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.1},
        {"lr_decay": 0.0, "weight_decay": 0.1},
    ),
    ("RMSProp(0.01)", "RMSprop", {"lr": 0.01}, {"lr": 0.003}),
    (
        "RMSProp(0.01, gamma=0.7, eps=1e-3, weight_decay=0.01)",
        "RMSprop",
        {"lr": 0.01, "alpha": 0.7, "eps": 1e-3, "weight_decay": 0.01},
        {"gamma": 0.5, "weight_decay": 0.1},
    ),
    (
        "RMSProp(0.01, momentum=0.9)",
        "RMSprop",
        {"lr": 0.01, "momentum": 0.9},
        {"momentum": 0.5, "gamma": 0.9},
    ),
    (
        "RMSProp(0.01, momentum=0.9, weight_decay=0.01, centered=True)",
        "RMSprop",
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "centered": True},
        {"momentum": 0.0, "eps": 1e-3},
    ),
    ("Adadelta", "Adadelta", {}, {"lr": 0.1}),
    (
        "Adadelta(0.5, 0.8, eps=1e-3, weight_decay=0.01)",
        "Adadelta",
        {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.01},
        {"rho": 0.5, "eps": 1e-2, "weight_decay": 0.0},
    ),
    ("Adam(0.01)", "Adam", {"lr": 0.01}, {"lr": 0.003, "beta1": 0.5}),
    (
        "Adam(0.01, 0.8, 0.9, eps=1e-3, weight_decay=0.01)",
        "Adam",
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.01},
        {"beta2": 0.99, "eps": 1e-2, "weight_decay": 0.0},
    ),
    (
        "Adam(0.01, beta2=0.8, amsgrad=True)",
        "Adam",
        {"lr": 0.01, "betas": (0.9, 0.8), "amsgrad": True},
        {"beta2": 0.5, "weight_decay": 0.1},
    ),
    ("Adamax(0.01)", "Adamax", {"lr": 0.01}, {"beta2": 0.5}),
    (
        "Adamax(0.01, 0.8, 0.9, eps=1e-3, weight_decay=0.01)",
        "Adamax",
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.01},
        {"beta1": 0.5, "eps": 1e-2, "weight_decay": 0.0},
    ),
    ("NAdam(0.01)", "NAdam", {"lr": 0.01}, {"beta1": 0.5, "momentum_decay": 0.1}),
    (
        "NAdam(0.01, 0.8, 0.9, eps=1e-3, weight_decay=0.1, momentum_decay=0)",
        "NAdam",
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "momentum_decay": 0.0},
        {"beta2": 0.99, "momentum_decay": 0.01},
    ),
    (
        "NAdam(0.01, weight_decay=0.3, decoupled_weight_decay=True)",
        "NAdam",
        {"lr": 0.01, "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"lr": 0.03, "weight_decay": 0.1},
    ),
    ("AdamW(0.01)", "AdamW", {"lr": 0.01}, {"weight_decay": 0.0}),
    (
        "AdamW(0.01, 0.8, 0.9, eps=1e-3, weight_decay=0.3)",
        "AdamW",
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3},
        {"beta1": 0.5, "beta2": 0.5, "weight_decay": 0.1},
    ),
    (
        "AdamW(0.01, beta2=0.8, amsgrad=True)",
        "AdamW",
        {"lr": 0.01, "betas": (0.9, 0.8), "amsgrad": True},
        {"beta2": 0.5},
    ),
    # Of these betas some never come to the second branch, and some do so at another step.
    ("RAdam(0.01)", "RAdam", {"lr": 0.01}, {"beta2": 0.6}),
    (
        "RAdam(0.01, 0.8, 0.9, eps=1e-3, weight_decay=0.1)",
        "RAdam",
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
        {"beta2": 0.8, "weight_decay": 0.0},
    ),
    (
        "RAdam(0.01, weight_decay=0.3, decoupled_weight_decay=True)",
        "RAdam",
        {"lr": 0.01, "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"beta2": 0.5, "weight_decay": 0.1},
    ),
    (
        "Lion(0.01)",
        "Lion",
        {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.0},
        {"beta1": 0.5, "beta2": 0.7},
    ),
    (
        "Lion(0.01, 0.5, weight_decay=0.3)",
        "Lion",
        {"lr": 0.01, "betas": (0.5, 0.99), "weight_decay": 0.3},
        {"lr": 0.03, "weight_decay": 0.0},
    ),
    (
        "ScheduleFreeAdam(0.01)",
        "AdamWScheduleFree",
        {"lr": 0.01, "betas": (0.9, 0.999)},
        {"lr": 0.03, "beta1": 0.6, "weight_decay": 0.1},
    ),
    (
        "ScheduleFreeAdam(0.01, 0.8, 0.9, eps=0.1, weight_decay=0.1, r=2)",
        "AdamWScheduleFree",
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1, "r": 2.0},
        {"beta2": 0.99},
    ),
    ("Rprop(0.01)", "Rprop", {"lr": 0.01}, {"lr": 0.003}),
    (
        "Rprop(0.01, 0.3, 1.5, step_size_min=1e-3, step_size_max=0.02)",
        "Rprop",
        {"lr": 0.01, "etas": (0.3, 1.5), "step_sizes": (1e-3, 0.02)},
        {"lr": 0.005},
    ),
    ("ASGD(0.01)", "ASGD", {"lr": 0.01}, {"lr": 0.03}),
    (
        "ASGD(0.01, lambd=0.01, alpha=0.5, weight_decay=0.1, t0=20)",
        "ASGD",
        {"lr": 0.01, "lambd": 0.01, "alpha": 0.5, "weight_decay": 0.1, "t0": 20},
        {"lr": 0.03, "weight_decay": 0.0},
    ),
    # What only a param group switches on.
    ("SGD(0.1)", "SGD", {"lr": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}),
]


def torch_names(own: dict[str, float], betas: tuple[float, float]) -> dict:
    """The keys that a torch.optim param group has for ours."""
    names = {"gamma": "alpha"}
    own = {names.get(name, name): value for name, value in own.items()}
    betas = (own.pop("beta1", betas[0]), own.pop("beta2", betas[1]))
    return {**own, "betas": betas}


@pytest.fixture(params=["gathered", "in place"])
def memory(request, monkeypatch):
    """The engine's two ways to pass parameters to the step."""
    if request.param == "in place":
        monkeypatch.setattr(hyperopt._engine.shards, "LARGE", 1)


@pytest.fixture
def float64():
    """The dtype in which `torch.optim.NAdam` keeps its product of momenta is the default one."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("stack", "name", "arguments", "own"), PLAIN, ids=[f"{p[0]} {p[3]}" for p in PLAIN]
)
def test_height_0_is_torch_optim(memory, float64, stack, name, arguments, own):
    def weights() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        shapes = [(4, 3), (5,), (), (2, 2)]
        return [
            torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
            for s in shapes
        ]

    ours, theirs = weights(), weights()
    optimizer = HyperOptimizer(
        [{"params": ours[:2]}, {"params": ours[2:], **own}], stack, compile=False
    )
    theirs_own = torch_names(own, arguments.get("betas", (0.9, 0.999)))
    peer = (NOT_IN_TORCH.get(name) or getattr(torch.optim, name))(
        [{"params": theirs[:2]}, {"params": theirs[2:], **theirs_own}], **arguments
    )
    if hasattr(peer, "train"):
        peer.train()
    for _ in range(200):
        for w, x in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x)
            w.grad = x.grad.clone()
        optimizer.step()
        peer.step()
        for w, x in zip(ours, theirs, strict=True):
            torch.testing.assert_close(w, x, rtol=1e-10, atol=1e-10)


def test_every_rule_is_compared_with_torch_optim():
    elementwise = {name for name, rule in RULES.items() if rule.elementwise}  # see test_matrices
    assert {parse(p[0]).levels[0].name for p in PLAIN} == elementwise


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("SGD(0.1)", False),
        ("SGD(0.1, momentum=0.9)", False),
        ("SGD(0.1, weight_decay=0.1)", True),
        ("AdaGrad(0.1)", False),
        ("AdaGrad(0.1, weight_decay=0.1)", True),
        ("RMSProp(0.1)", False),
        ("RMSProp(0.1, weight_decay=0.1)", True),
        ("Adam(0.1)", False),
        ("Adam(0.1)[weight_decay]", True),
        ("AdamW(0.1)", True),
        ("AdamW(0.1, weight_decay=0)", True),
        ("RAdam(0.1, weight_decay=0.1)", True),
        ("NAdam(0.1, weight_decay=0.1, decoupled_weight_decay=True)", True),
        ("Lion(0.1)", False),
        ("Lion(0.1, weight_decay=0.1)", True),
        ("ScheduleFreeAdam(0.1)", False),
        ("ScheduleFreeAdam(0.1, weight_decay=0.1)", True),
    ],
)
def test_the_weights_of_the_last_step_are_kept_only_where_an_update_needs_them(rule, expected):
    assert depends_on_weights(parse(rule).levels[0]) is expected


@pytest.mark.parametrize("top", ["SGD(0.1)", "Adam(0.1)", "Lion(0.1)"])
def test_the_betas_of_lion_have_no_hypergradient_and_stay(top):
    assert list(parse("Lion").levels[0].tuned) == ["lr"]
    w = torch.randn(5, requires_grad=True)
    stack = f"Lion(0.01, weight_decay=0.1)[lr, beta1, beta2, weight_decay] / {top}"
    optimizer = HyperOptimizer([w], stack, compile=False)
    start = optimizer.hyperparameters()[0]
    for _ in range(10):
        w.grad = torch.randn(5)
        optimizer.step()
        last = optimizer.state_dict()["param_groups"][0]["tower"]["levels"][1]["last"]["g"]
        assert last["beta1"] == last["beta2"] == 0
    after = optimizer.hyperparameters()[0]
    assert {name for name in start if after[name] != start[name]} == {"lr", "weight_decay"}


NEVER = 99


@pytest.mark.parametrize(
    ("beta2", "first"),
    [(1 / 3, NEVER), (0.5, NEVER), (0.6, NEVER), (2 / 3, NEVER), (0.7, 10), (0.9, 6), (0.999, 6)],
)
def test_radam_is_finite_on_both_sides_of_its_branch(beta2, first):
    """Also where the rectification has a root or a pole, which it has at beta2 = 1/3, 1/2, 0.6.

    Args:
        first: the first step that is rectified, and hence moved by beta2.
    """
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    stack = f"RAdam(0.1, beta2={beta2!r}) / SGD(1e-3)"
    optimizer = HyperOptimizer([w], stack, compile=False)
    for t in range(14):
        w.grad = torch.randn(5, dtype=torch.float64)
        optimizer.step()
        last = optimizer.state_dict()["param_groups"][0]["tower"]["levels"][1]["last"]["g"]
        assert all(x.isfinite() for x in last.values())
        assert bool(last["beta2"]) is (t >= first)
