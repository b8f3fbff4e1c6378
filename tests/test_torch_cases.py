"""Torch's own cases for its optimizers, and random programs, beside torch.optim at height 0."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loops import Net, give, same_weights
from torch import Tensor
from torch.optim import lr_scheduler

import hyperopt
from hyperopt import HyperOptimizer

common = pytest.importorskip("torch.testing._internal.common_optimizers")  # not all builds have it
INFOS = {info.optim_cls.__name__: info for info in common.optim_db}

# Torch's optimizers that we have a rule for, by the rule's name.
RULES = {
    "SGD": "SGD",
    "Adam": "Adam",
    "AdamW": "AdamW",
    "Adamax": "Adamax",
    "NAdam": "NAdam",
    "RAdam": "RAdam",
    "RMSprop": "RMSProp",
    "Adagrad": "AdaGrad",
    "Adadelta": "Adadelta",
    "Adafactor": "Adafactor",
    "ASGD": "ASGD",
    "Rprop": "Rprop",
}
RENAMED = {("RMSprop", "alpha"): "gamma"}
# One argument in torch, two in ours.
SPLIT = {
    "Rprop": {"etas": ("eta_minus", "eta_plus"), "step_sizes": ("step_size_min", "step_size_max")},
    "Adafactor": {"eps": ("eps1", "eps2")},
}
# How torch computes a step, which changes no result.
HOW = {"foreach", "fused", "capturable"}
# Features of torch's optimizers that our rules lack, and why.
NOT_OURS = {
    "maximize": "negate the loss",
    "dampening": "nobody has asked for it",
    "differentiable": "steps are not differentiated; see `create_graph` in the design",
}
# Torch's optimizers that we have no rule for: their cases are left out.
NO_RULE = {
    "LBFGS": "it calls the closure many times for one step",
    "Muon": "its cases have vectors too; test_matrices.py has it",
    "SparseAdam": "its gradients are sparse",
}


def test_all_of_torchs_optimizers_are_in_one_of_the_lists():
    assert INFOS.keys() == RULES.keys() | NO_RULE.keys() & INFOS.keys()


def rule_of(name: str, kwargs: dict[str, Any]) -> hyperopt.Rule:
    start = INFOS[name].optim_cls(Net().parameters()).defaults["lr"]
    own = {RENAMED.get((name, k), k): v for k, v in kwargs.items() if k not in HOW}
    for joint, names in SPLIT.get(name, {}).items():
        if joint in own:
            own |= {n: v for n, v in zip(names, own.pop(joint), strict=True) if v is not None}
    return getattr(hyperopt, RULES[name])(**{"lr": start, **own})


def made(name: str, kwargs: dict[str, Any], params: Any) -> HyperOptimizer:
    return HyperOptimizer(params, rule_of(name, kwargs), compile=False)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        pytest.param(name, case.kwargs, id=f"{name}: {case.desc}")
        for name in RULES
        for case in INFOS[name].optim_inputs_func("cpu")
    ],
)
def test_inputs_of_torchs_own_tests(name, kwargs):
    model, peer = Net(), Net()
    if any(kwargs.get(key) for key in NOT_OURS):
        with pytest.raises(TypeError, match="has no argument"):
            made(name, kwargs, model.parameters())
        return
    ours = made(name, kwargs, model.parameters())
    theirs = INFOS[name].optim_cls(
        peer.parameters(), **{k: v for k, v in kwargs.items() if k not in HOW}
    )
    for t in range(5):
        for net, optimizer in ((model, ours), (peer, theirs)):
            give(net, t)
            optimizer.step()
        # Torch keeps ASGD's step size in the default dtype.
        same_weights(model, peer, rtol=1e-6 if name == "ASGD" else 1e-9)


# Torch's errors that are none here, by how their descriptions begin: there is one way to make a
# step, and numbers may be tensors.
ACCEPTED = ("lr as Tensor doesn't work with foreach", "betas must be either both", "betas\\[0\\]")


@pytest.mark.parametrize("name", RULES)
def test_errors_of_torchs_own_tests(name):
    for case in INFOS[name].optim_error_inputs_func("cpu", torch.float32):
        given = case.optimizer_error_input
        if given.desc.startswith(ACCEPTED):
            made(name, given.kwargs, Net().parameters())
            continue
        with pytest.raises((ValueError, TypeError)):
            made(name, given.kwargs, given.params)


# Random programs.

OPERATIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 15)),  # which of the parameters have a gradient
    st.tuples(st.just("foreign"), st.integers(0, 3)),
    st.tuples(
        st.just("edit"), st.sampled_from(["in place", "item", "data", "away and back", "pop"])
    ),
    st.tuples(st.just("set lr"), st.floats(0.001, 0.2)),
    st.tuples(st.just("schedule"), st.sampled_from(["StepLR", "LinearLR", "ExponentialLR"])),
    st.tuples(st.just("save and load"), st.booleans()),
    st.tuples(st.just("copy"), st.none()),
    st.tuples(st.just("add group"), st.floats(0.001, 0.2)),
    st.tuples(st.just("freeze"), st.integers(0, 3)),
)
SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
}


class Program:
    """The results of the operations on one side, ours or torch's."""

    def __init__(self, make: Any) -> None:
        self.make, self.model, self.t = make, Net(), 0
        self.optimizer = make(self.model.first.parameters())
        self.scheduler: Any = None

    def run(self, kind: str, value: Any) -> None:
        getattr(self, kind.replace(" ", "_"))(value)

    def step(self, which: int) -> None:
        self.t += 1
        params = [*self.model.parameters()]
        give(self.model, self.t, lambda i: bool(which >> i & 1) and params[i].requires_grad)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def moved(self) -> list[Tensor]:
        """Those that have a state of the rule, in the order of the model's."""
        state = self.optimizer.state
        return [p for p in self.model.parameters() if p in state and "exp_avg" in state[p]]

    def foreign(self, i: int) -> None:
        moved = self.moved()
        if self.t:  # torch's Adam makes a state only where there is none
            for p in moved[i : i + 1]:
                own = self.optimizer.state[p]
                own["mine"] = [*own.get("mine", []), self.t]
        self.optimizer.state[f"key {i}"] = {"t": torch.tensor(self.t)}
        self.optimizer.param_groups[0][f"foreign {i}"] = (i, self.t, None)

    def edit(self, how: str) -> None:
        for p in self.moved()[:2]:
            own = self.optimizer.state[p]
            value = own["exp_avg"]
            if how == "in place":
                value.mul_(0.5)
            elif how == "item":
                own["exp_avg"] = value * 0.5
            elif how == "data":
                value.data = value.detach() * 0.5
            elif how == "away and back":
                value.data, kept = torch.zeros_like(value), value.detach().clone()
                value.data = kept
            else:
                self.optimizer.state.pop(p)
        if how == "pop":
            self.step(15)  # until then, ours may show the initial state

    def set_lr(self, lr: float) -> None:
        self.optimizer.param_groups[-1]["lr"] = lr

    def schedule(self, name: str) -> None:
        if self.scheduler is None:
            self.scheduler = SCHEDULERS[name](self.optimizer)

    def save_and_load(self, through_file: bool) -> None:
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        state = self.optimizer.state_dict()
        if through_file:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        self.optimizer = self.make(groups)
        self.optimizer.load_state_dict(state)
        if self.scheduler is not None:
            self.scheduler.optimizer = self.optimizer

    def copy(self, _: None) -> None:
        if self.scheduler is None:
            self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))

    def add_group(self, lr: float) -> None:
        if len(self.optimizer.param_groups) == 1 and self.scheduler is None:
            self.optimizer.add_param_group({"params": self.model.last.parameters(), "lr": lr})

    def freeze(self, i: int) -> None:
        p = [*self.model.parameters()][i]
        p.requires_grad_(not p.requires_grad)

    def kept(self) -> list[Any]:
        """Foreign entries of the state."""
        state = self.optimizer.state
        own = [state[p].get("mine") if p in state else None for p in self.model.parameters()]
        keys = [f"key {i}" for i in range(4) if f"key {i}" in state]
        groups = [
            {k: v for k, v in group.items() if k == "lr" or k.startswith("foreign")}
            for group in self.optimizer.param_groups
        ]
        return [own, [(key, int(state[key]["t"])) for key in keys], groups]


@settings(max_examples=100)
@given(st.lists(OPERATIONS, min_size=1, max_size=25))
def test_random_programs(operations):
    programs = [
        Program(lambda params: HyperOptimizer(params, "Adam(0.05)", compile=False)),
        Program(lambda params: torch.optim.Adam(params, 0.05)),
    ]
    for operation in [("step", 15), *operations, ("step", 15)]:
        ours, theirs = programs
        for program in programs:
            program.run(*operation)
        same_weights(ours.model, theirs.model, rtol=1e-9)
        assert str(ours.kept()) == str(theirs.kept())
