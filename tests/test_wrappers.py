"""Wrappers that use `state` and `param_groups`, with our optimizer and with torch's."""

import collections
import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_loops import Net, batch, loss_of, made, same_weights, train
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from hyperopt import Auto, HyperOptimizer

Make = Callable[[Any], torch.optim.Optimizer]
TOWER = "Adam(0.05)[lr: log, beta1] / SGD(1e-3)"


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 0.05)


def ours(stack: str) -> Make:
    return lambda params: HyperOptimizer(params, stack, compile=False)


# The first computes what torch's does; with the others, training and what is kept must go on.
MAKERS: dict[str, Make] = {
    "plain": ours("Adam(0.05)"),
    "still": ours("Adam(0.05)[lr: log] / SGD(0)"),
    "tower": ours(TOWER),
    "Auto": lambda params: Auto(params, 1e-3, compile=False),
}


# Wrappers in the shapes in which they exist in public.


class SlowWeights:
    """Lookahead: every third step, the weights go halfway from slow ones in ``state[p]``."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.state, self.t = optimizer, optimizer.state, 0

    def step(self, closure: Any) -> None:
        closure()
        self.optimizer.step()
        self.t += 1
        for group in self.optimizer.param_groups:
            group.setdefault("lookahead", {"steps": 0})["steps"] += 1
            for p in group["params"]:
                own = self.optimizer.state[p]
                if "slow" not in own:
                    own["slow"] = p.detach().clone()
                if self.t % 3 == 0:
                    own["slow"].add_(p.detach() - own["slow"], alpha=0.5)
                    p.data.copy_(own["slow"])

    def kept(self) -> Any:
        own = [self.optimizer.state[p]["slow"] for p in all_params(self.optimizer)]
        return [*own, self.optimizer.param_groups[0]["lookahead"]["steps"]]


class SharpnessAware:
    """Two gradients for each step, of which the first moves the weights away; rho is in groups."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["rho"], group["adaptive"] = 0.05, False

    def step(self, closure: Any) -> None:
        closure()
        groups = self.optimizer.param_groups
        norm = torch.stack([p.grad.norm() for g in groups for p in g["params"]]).norm()
        for group in groups:
            for p in group["params"]:
                self.optimizer.state[p]["old_p"] = p.detach().clone()
                p.data.add_(p.grad, alpha=group["rho"] / float(norm))
        closure()
        for p in all_params(self.optimizer):
            p.data.copy_(self.optimizer.state[p]["old_p"])
        self.optimizer.step()

    def kept(self) -> Any:
        own = [self.optimizer.state[p]["old_p"] for p in all_params(self.optimizer)]
        return [*own, self.optimizer.param_groups[0]["rho"]]


class Tracked:
    """A dict under a string key, as TRAC's: it scales what the optimizer has moved so far."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        start = {p: p.detach().clone() for p in all_params(optimizer)}
        optimizer.state["trac"] = {"start": start, "variance": 0.0, "scale": torch.ones(())}

    def step(self, closure: Any) -> None:
        closure()
        kept = self.optimizer.state["trac"]
        before = [p.detach().clone() for p in kept["start"]]
        self.optimizer.step()
        for p, old in zip(kept["start"], before, strict=True):
            kept["variance"] += float((p.detach() - old).square().sum())
            p.data.copy_(kept["start"][p] + kept["scale"] * (p.detach() - kept["start"][p]))
        kept["scale"] = 1 - 1 / (2 + 100 * torch.tensor(kept["variance"]))

    def kept(self) -> Any:
        kept = self.optimizer.state["trac"]
        return [kept["variance"], kept["scale"], *kept["start"].values()]


class ScheduleFree:
    """Weights swap between a mean and the optimizer's own, which are both in ``state[p]``."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.t = optimizer, 0

    def step(self, closure: Any) -> None:
        for p in all_params(self.optimizer):
            own = self.optimizer.state[p]
            if "z" not in own:
                own["z"], own["x"] = p.detach().clone(), p.detach().clone()
            p.data.copy_(torch.lerp(own["z"], own["x"], 0.9))
        closure()
        for p in all_params(self.optimizer):
            p.data.copy_(self.optimizer.state[p]["z"])
        self.optimizer.step()
        self.t += 1
        for p in all_params(self.optimizer):
            own = self.optimizer.state[p]
            own["z"] = p.detach().clone()
            own["x"] = torch.lerp(own["x"], own["z"], 1 / (self.t + 1))
            p.data.copy_(own["x"])

    def kept(self) -> Any:
        states = [self.optimizer.state[p] for p in all_params(self.optimizer)]
        return [own[name] for own in states for name in ("x", "z")]


class Averaged:
    """An exponential average in ``state[p]``, and a list of numbers in a param group."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        optimizer.register_step_post_hook(self.after)

    def after(self, optimizer: Any, *_: Any) -> None:
        for p in all_params(optimizer):
            own = optimizer.state[p]
            own.setdefault("ema", torch.zeros_like(p)).lerp_(p.detach(), 0.1)
        optimizer.param_groups[0].setdefault("decays", []).append(0.1)

    def step(self, closure: Any) -> None:
        closure()
        self.optimizer.step()

    def kept(self) -> Any:
        states = [self.optimizer.state[p] for p in all_params(self.optimizer)]
        return [*(own["ema"] for own in states), *self.optimizer.param_groups[0]["decays"]]


class Offloaded:
    """Between steps, moves all tensors of the state away: by ``.data``, or as other tensors."""

    def __init__(self, optimizer: Any, by_data: bool = True) -> None:
        self.optimizer, self.by_data = optimizer, by_data
        self.parked: dict[Any, Tensor] = {}

    def step(self, closure: Any) -> None:
        closure()
        for (p, name), value in self.parked.items():
            if self.by_data:
                self.optimizer.state[p][name].data = value
            else:
                self.optimizer.state[p][name] = value
        self.optimizer.step()
        for p, own in self.optimizer.state.items():
            for name, value in own.items():
                self.parked[p, name] = value.detach().clone()
                if self.by_data:
                    value.data = torch.full_like(value, float("nan"))  # it is freed
                else:
                    own[name] = None

    def kept(self) -> Any:
        return [*self.parked.values()]


class Surgery:
    """Gradients that are projected in a hook before the step."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        optimizer.register_step_pre_hook(self.before)

    def before(self, optimizer: Any, *_: Any) -> None:
        for p in all_params(optimizer):
            last = optimizer.state[p].get("last_direction")
            if last is not None and (dot := (p.grad * last).sum()) < 0:
                p.grad = p.grad - dot / last.square().sum() * last
            optimizer.state[p]["last_direction"] = p.grad.clone()

    def step(self, closure: Any) -> None:
        closure()
        self.optimizer.step()

    def kept(self) -> Any:
        return [self.optimizer.state[p]["last_direction"] for p in all_params(self.optimizer)]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "slow weights": SlowWeights,
    "sharpness-aware": SharpnessAware,
    "a dict under a string": Tracked,
    "schedule-free": ScheduleFree,
    "average": Averaged,
    "offloaded by .data": Offloaded,
    "offloaded": lambda optimizer: Offloaded(optimizer, by_data=False),
    "surgery": Surgery,
}


def all_params(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(wrapper: str, make: Make, steps: int = 12) -> tuple[Net, Any, list[float]]:
    model = Net()
    groups = [{"params": model.first.parameters()}, {"params": model.last.parameters()}]
    optimizer: Any = make(groups)
    losses: list[float] = []
    train(model, optimizer, range(1))  # torch's Adam makes its state where it finds none at all
    wrapped = WRAPPERS[wrapper](optimizer)

    def closure() -> None:
        model.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        losses.append(loss.item())

    for t in range(steps):
        x = batch(t % 2)
        wrapped.step(closure)
    return model, wrapped, losses


def values(kept: Any) -> list[Tensor]:
    return [torch.as_tensor(value, dtype=torch.float64) for value in kept]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper, name):
    """The wrappers train, and read back what they have stored."""
    steps = 60 if name in ("tower", "Auto") else 12
    model, wrapped, losses = run(wrapper, MAKERS[name], steps)
    peer, theirs, their_losses = run(wrapper, torchs, steps)
    if name in ("plain", "still"):
        same_weights(model, peer, rtol=1e-7)
        if "offloaded" not in wrapper or name == "plain":  # a tower shows what was before
            for a, b in zip(values(wrapped.kept()), values(theirs.kept()), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    else:
        assert losses[-1] < 0.8 * losses[0] and their_losses[-1] < 0.8 * their_losses[0]
    assert all(value.isfinite().all() for value in values(wrapped.kept()))


# Foreign entries.

FOREIGN = {
    "number": 3,
    "flag": True,
    "nothing": None,
    "dict": {"a": 1.5, "b": [1, 2]},
    "list": [torch.ones(2, dtype=torch.float64), 4],
    "tensor": torch.arange(3.0, dtype=torch.float64),
}


def put(optimizer: Any, p: Tensor) -> None:
    foreign = copy.deepcopy(FOREIGN)
    optimizer.state[p].update(foreign)
    optimizer.state["wrapper"] = {**foreign}
    optimizer.state["count"] = 7
    optimizer.param_groups[0].update(foreign)


def found(optimizer: Any, p: Tensor) -> list[Any]:
    own, group = optimizer.state[p], optimizer.param_groups[0]
    parts = [{k: where[k] for k in FOREIGN} for where in (own, optimizer.state["wrapper"], group)]
    return [*parts, optimizer.state["count"]]


THROUGH: dict[str, Callable[[Net, Any], tuple[Net, Any]]] = {
    "steps": lambda model, optimizer: (model, optimizer),
    "deepcopy": lambda model, optimizer: copy.deepcopy((model, optimizer)),
    "pickle": lambda model, optimizer: pickle.loads(pickle.dumps((model, optimizer))),
}


def loaded(model: Net, optimizer: Any) -> tuple[Net, Any]:
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    fresh = Net()
    other = type(optimizer)(fresh.parameters(), getattr(optimizer, "stack", 0.05))
    for part, state in zip((fresh, other), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    return fresh, other


@pytest.mark.parametrize("through", [*THROUGH, "a file"])
@pytest.mark.parametrize("make", [torchs, ours("Adam(0.05)"), ours("SGD(0.1)"), ours(TOWER)])
def test_foreign_entries_stay(make, through):
    model = Net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    put(optimizer, model.first.weight)
    train(model, optimizer, range(2, 4))
    model.first.bias.grad = None
    optimizer.step()
    twin, other = {**THROUGH, "a file": loaded}[through](model, optimizer)
    for net, o in ((model, optimizer), (twin, other)):
        train(net, o, range(4, 6))
        assert str(found(o, net.first.weight)) == str([FOREIGN, FOREIGN, FOREIGN, 7])
    if other is not optimizer:
        same_weights(twin, model)


def test_the_same_dicts_and_tensors_stay():
    """A wrapper may hold them; torch's optimizers never make others."""
    model, optimizer = made(TOWER)
    state, own = optimizer.state, optimizer.state[model.first.weight]
    average = own["exp_avg"]
    for t in range(6):
        train(model, optimizer, range(t, t + 1))
        model.last.bias.requires_grad_(t != 2)
        assert optimizer.state is state and state[model.first.weight] is own
        assert own["exp_avg"] is average
    before = model.first.weight.detach().clone()
    for value in own.values():
        value.zero_()
    assert all(not x.any() for x in optimizer.state[model.first.weight].values())
    train(model, optimizer, range(6, 7))
    assert not torch.equal(model.first.weight, before)


def test_loading_follows_the_parameter_as_in_torch():
    results = []
    for make in (torchs, ours("Adam(0.05)")):
        model = Net()
        optimizer: Any = make(model.parameters())
        train(model, optimizer, range(2))
        optimizer.state[model.first.weight]["mine"] = [torch.ones(2), {"a": torch.arange(2)}]
        optimizer.state[model.first.bias]["n"] = 3
        fresh = Net(torch.float32)
        other = make(fresh.parameters())
        other.load_state_dict(optimizer.state_dict())
        (one, inner) = other.state[fresh.first.weight]["mine"]
        results.append((one.dtype, inner["a"].dtype, other.state[fresh.first.bias]["n"]))
    assert results[0] == results[1] == (torch.float32, torch.float32, 3)


def test_a_reserved_name_is_refused():
    model, optimizer = made()
    train(model, optimizer, range(1))
    optimizer.state[model.first.weight]["shard"] = 1  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^the state of a parameter has an entry shard, but"):
        optimizer.state_dict()


# Param groups.


def decayed(model: Net, lr: float) -> list[dict[str, Any]]:
    """Layer-wise decay and no weight decay for biases, as timm builds it."""
    return [
        {"params": [p], "lr": lr * 0.75**i, "lr_scale": 0.75**i, "weight_decay": 0.1 * (p.ndim > 1)}
        for i, p in enumerate(model.parameters())
    ]


@pytest.mark.parametrize("stack", ["AdamW(0.05)", "AdamW(0.05)[lr: log] / SGD(0)"])
def test_groups_of_layer_wise_decay(stack):
    models = Net(), Net()
    optimizers = [
        HyperOptimizer(decayed(models[0], 0.05), stack, compile=False),
        torch.optim.AdamW(decayed(models[1], 0.05), 0.05),
    ]
    for t in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            for group in optimizer.param_groups:  # as timm's schedulers write it
                group["lr"] = 0.05 / (t + 1) * group["lr_scale"]
            train(model, optimizer, range(t, t + 1))
        same_weights(*models, rtol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "again", [*MAKERS, *("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam")]
)
def test_our_own_groups_are_accepted(name, again):
    model = Net()
    first = MAKERS[name](model.parameters())
    train(model, first, range(2))
    first.param_groups[0]["lr_scale"] = 0.5
    lr = float(first.param_groups[0]["lr"])
    make = MAKERS.get(again) or getattr(torch.optim, again)
    second = make(first.param_groups)
    assert second.param_groups[0]["lr_scale"] == 0.5
    assert float(second.param_groups[0]["lr"]) == pytest.approx(lr)
    before = model.first.weight.detach().clone()
    train(model, second, range(2, 4))
    assert not torch.equal(model.first.weight, before)
    train(model, first, range(4, 6))


def test_a_dict_of_two_optimizers_is_changed_in_neither():
    model = Net()
    groups = [{"params": model.parameters(), "lr": 0.1, "mine": {"a": 1}}]
    first = HyperOptimizer(groups, "SGD(0.2)", compile=False)
    kept = {**groups[0]}
    second = HyperOptimizer(groups, "Adam(0.3) / SGD(0.1)", compile=False)
    assert groups[0] == kept and kept.keys() == {"params", "lr", "mine"}
    for optimizer in (first, second):
        assert len(optimizer.param_groups[0]["params"]) == 4
        train(model, optimizer, range(2))
    assert groups[0] == kept
    assert first.param_groups[0]["lr"] == 0.1 != second.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("key", "near"),
    [("weigth_decay", "weight_decay"), ("Lr", "lr"), ("beta_1", "beta1"), ("param", "params")],
)
def test_a_typo_is_named(key, near):
    with pytest.raises(ValueError, match=f"takes no '{key}'; did you mean '{near}'?"):
        HyperOptimizer([{"params": Net().parameters(), key: 0.1}], "AdamW(0.1)")


def test_foreign_keys_are_not_typos():
    keys = "lr_scale lr_mult decay_mult layer_decay max_momentum min_lr max_lr swa_lr warmup_steps "
    keys += "k d r rho adaptive foreach fused capturable decoupled_weight_decay use_muon initial_lr"
    group = {"params": Net().parameters(), **dict.fromkeys(keys.split(), 0.1)}
    optimizer = HyperOptimizer([group], "AdamW(0.1)")
    assert all(optimizer.param_groups[0][key] == 0.1 for key in keys.split())


# Frozen parameters.


def frozen() -> list[Tensor]:
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    kinds = [torch.zeros(2, device="meta"), torch.ones(2).to(torch.cfloat), quantized]
    kinds += [torch.eye(3).to_sparse(), torch.ones(3, dtype=torch.int8)]
    return [*kinds, torch.ones(2).to(torch.float8_e4m3fn)]


@pytest.mark.parametrize("stack", ["Adam(0.05)", TOWER, "SGD(0.1)[lr: per tensor] / SGD(0.1)"])
@pytest.mark.parametrize("where", ["before", "behind", "later"])
def test_frozen_parameters_of_any_kind(stack, where):
    model, other = Net(), Net()
    live: list[Tensor] = [*model.parameters()]
    params = frozen() + live if where == "before" else live + frozen() * (where == "behind")
    optimizer = HyperOptimizer(params, stack, compile=False)
    if where == "later":
        optimizer.add_param_group({"params": frozen()})
    peer = HyperOptimizer(other.parameters(), stack, compile=False)
    for t in range(4):
        train(model, optimizer, range(t, t + 1))
        train(other, peer, range(t, t + 1))
        assert len(optimizer.state) == 4
        optimizer.load_state_dict(optimizer.state_dict())
        copy.deepcopy(optimizer)
    same_weights(model, other)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (torch.ones(2, dtype=torch.cfloat), TypeError, "complex"),
        (torch.ones(2, device="meta"), ValueError, "on cpu and on meta"),
        (torch.ones(2).to(torch.float8_e4m3fn), TypeError, "too coarse"),
    ],
)
def test_a_frozen_parameter_is_checked_when_it_first_has_a_gradient(kind, error, words):
    model = Net()
    optimizer = HyperOptimizer([*model.parameters(), kind], "SGD(0.1)", compile=False)
    train(model, optimizer, range(2))
    kind.grad = torch.zeros_like(kind)
    with pytest.raises(error, match=words):
        train(model, optimizer, range(2, 3))
        kind.grad = torch.zeros_like(kind)
        optimizer.step()
    with pytest.raises(error, match=words):
        HyperOptimizer([*model.parameters(), kind.requires_grad_()], "SGD(0.1)")


# The caller's modes.

MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
}
WHEN = ["made", "state read", "state saved", "group added", "stepped", "loaded", "copied"]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stack", ["Adam(0.05)", TOWER])
def test_the_state_does_not_depend_on_the_caller_s_modes(stack, mode, when):
    """An action inside one of the caller's modes gives the same run as outside."""

    def here(now: str) -> Any:
        return MODES[mode]() if now == when and not ends else contextlib.nullcontext()

    ends: list[Net] = []
    for _ in range(2):
        model = Net()
        with here("made"):
            optimizer = HyperOptimizer(model.first.parameters(), stack, compile=False)
        with here("state read"):
            assert len(optimizer.state) == 2
        with here("group added"):
            optimizer.add_param_group({"params": model.last.parameters()})
        loss_of(model, batch(0)).backward()
        with here("stepped"):
            optimizer.step()
        with here("state saved"):
            state = optimizer.state_dict()
        with here("loaded"):
            optimizer.load_state_dict(state)
        if mode not in ("device", "fake", "inference"):  # where torch copies no parameters
            with here("copied"):
                model, optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, range(1, 5))
        ends.append(model)
    same_weights(ends[0], ends[1])


@pytest.mark.parametrize("stack", ["Adam(0.05)", TOWER, "SGD(0.1, momentum=0.9)"])
def test_a_model_of_fake_tensors(stack):
    """For example to ask how much memory a run would take."""
    with FakeTensorMode():
        model, more = nn.Linear(4, 2), nn.Parameter(torch.ones(3))
        optimizer = HyperOptimizer(model.parameters(), stack)
        for _ in range(3):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        assert all(value.device.type == "cpu" for value in optimizer.state[model.weight].values())
        optimizer.add_param_group({"params": [more]})
        more.grad = torch.ones(3)
        optimizer.step()
        assert len(optimizer.state) == 3 and not optimizer.compiled


def test_a_state_of_another_dict_class():
    model, optimizer = made("Adam(0.05)")
    train(model, optimizer, range(2))
    optimizer.state = collections.OrderedDict(optimizer.state)  # type: ignore[assignment]
    other, peer = made("Adam(0.05)")
    train(other, peer, range(4))
    train(model, optimizer, range(2, 4))
    same_weights(model, other)
