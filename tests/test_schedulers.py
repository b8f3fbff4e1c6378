"""Learning-rate schedulers, and hyperparameters set by hand, tuned or not."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_loops import PEERS, Net, Pair, batch, loss_of, made, same, same_weights, train, trained
from torch import nn
from torch.optim import lr_scheduler as s
from torch.optim.swa_utils import SWALR

import hyperopt._engine.compiler
from hyperopt import RULES, HyperOptimizer, Replay, Schedule

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
    "CyclicLR of lr": lambda o: [
        s.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="triangular2", cycle_momentum=False)
    ],
    "MultiStepLR": lambda o: [s.MultiStepLR(o, [2, 5])],
    "ConstantLR": lambda o: [s.ConstantLR(o, 0.1, 3)],
    "LinearLR": lambda o: [s.LinearLR(o, 0.1, 1.0, 4)],
    "ExponentialLR": lambda o: [s.ExponentialLR(o, 0.9)],
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
            one.step(*[1.0] * isinstance(one, s.ReduceLROnPlateau))  # the metric never improves


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
    seen = set()
    for t in range(11):
        for run in (ours, theirs):
            train_by(*run, range(t, t + 1))
        same_weights(ours[1], theirs[1], rtol=1e-9)
        for group, peer in zip(ours[2].param_groups, theirs[2].param_groups, strict=True):
            for key in group.keys() & peer.keys() - {"params"}:
                assert group[key] == peer[key], key
        seen.add(ours[2].param_groups[1]["lr"])
    assert len(seen) > 1


AUTO = "ScheduleFreeAdam(0.05)[lr: log] / AdaGrad(1.0, horizon=inf, normalize=True, trust=0.1)"
# Those that do not cycle what the towers below tune.
OF_LR = [name for name in SCHEDULERS if name not in ("OneCycleLR", "CyclicLR")]


@pytest.mark.parametrize(
    ("stack", "name"),
    [
        *(("Adam(0.05)", name) for name in SCHEDULERS),
        *(("Adam(0.05)[lr: log, beta1] / Adam(0.01) / SGD(1e-4)", name) for name in OF_LR),
        *((AUTO, name) for name in OF_LR),
    ],
)
def test_a_scheduled_run_is_resumed_bit_for_bit(stack, name):
    """What a scheduler keeps in the param groups is in the state too."""

    def start() -> tuple[list[Any], Net, HyperOptimizer]:
        model, optimizer = made(stack)
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
            "SGD(0.1, momentum=0.9) / SGD(0.1)",
            "CyclicLR",
            r"momentum was .* SGD\(0.1\) moves it.* as in SGD\(.*\)\[lr\] / .*cycle_momentum=False",
        ),
        ("SGD(0.1, momentum=0.9)[momentum] / SGD(0.1)", "OneCycleLR", "momentum was set"),
        ("Adam(0.05)[beta1] / SGD(0.1)", "OneCycleLR", r"beta1 was set .* as in Adam\(0.05\)"),
        ("SGD(0.1)", "OneCycleLR", "momentum was 0 when the optimizer was made.*other than 0"),
    ],
)
def test_a_scheduler_that_cycles_a_tuned_value_is_refused_in_the_first_step(stack, name, words):
    model, optimizer = made(stack)
    schedulers = SCHEDULERS[name](optimizer)
    with pytest.raises(ValueError, match=words) as caught:
        train_by(schedulers, model, optimizer, range(1))
    assert "\n" not in str(caught.value)


# On an lr that is tuned.


@pytest.mark.parametrize(
    "name", [n for n in OF_LR if n not in ("OneCycleLR of lr", "CyclicLR of lr")]
)
@pytest.mark.parametrize("shared", [True, False], ids=["one lr", "an lr for each group"])
def test_schedulers_below_a_level_that_does_not_move(name, shared):
    """The numbers of a scheduler, and the steps made with them, are those of a plain optimizer.

    (The two that are left out start elsewhere than at the optimizer's lr.)
    """

    def start(make: Callable[[Any], Any]) -> tuple[list[Any], Net, Any]:
        model = Net()
        groups = [{"params": model.first.parameters()}, {"params": model.last.parameters()}]
        if not shared:
            groups[1]["lr"] = 0.03  # type: ignore[assignment]
        optimizer = make(groups)
        return SCHEDULERS[name](optimizer), model, optimizer

    ours = start(lambda p: HyperOptimizer(p, "Adam(0.05)[lr: log] / SGD(0)", compile=False))
    theirs, seen = start(PEERS["Adam(0.05)"]), set()
    for t in range(11):
        for run in (ours, theirs):
            train_by(*run, range(t, t + 1))
        same_weights(ours[1], theirs[1], rtol=1e-9)
        for group, peer in zip(ours[2].param_groups, theirs[2].param_groups, strict=True):
            assert float(group["lr"]) == pytest.approx(peer["lr"], rel=1e-12)
            seen.add(round(peer["lr"], 9))
    learned = ours[2].hyperparameters()[0]
    assert learned["lr"] == pytest.approx(0.05)
    assert [learned[f"effective_lr[{i}]"] for i in range(2)] == pytest.approx(
        [group["lr"] for group in theirs[2].param_groups], rel=1e-12
    )
    assert len(seen) > 1


@pytest.mark.parametrize("name", OF_LR)
@pytest.mark.parametrize("stack", ["SGD(0.05) / SGD(0.01)", "SGD(0.05)[lr: log] / SGD(0.1)", AUTO])
def test_the_factor_is_the_written_lr_divided_by_the_initial_lr(stack, name):
    model, optimizer = made(stack)
    peer = torch.optim.SGD(Net().parameters(), optimizer.param_groups[0]["lr"].item())
    schedulers, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](peer)
    start = peer.param_groups[0].get("initial_lr", peer.defaults["lr"])
    for t in range(11):
        peer.step()
        train_by(schedulers, model, optimizer, range(t, t + 1))
        for one in theirs:
            one.step(*[1.0] * isinstance(one, s.ReduceLROnPlateau))
        if name != "ReduceLROnPlateau":  # which reads the effective lr, and goes on from there
            assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(
                peer.param_groups[0]["lr"]
            )
        learned = optimizer.hyperparameters()[0]
        factor = learned.get("effective_lr", learned["lr"]) / learned["lr"]
        assert factor == pytest.approx(peer.param_groups[0]["lr"] / start, rel=1e-12)
    assert learned["lr"] != pytest.approx(peer.defaults["lr"], rel=1e-6)


def test_hypergradients_follow_by_the_chain_rule():
    """lr += k <f' g', g>, where f' is the factor of the step that g' was used in."""
    model, optimizer = made("SGD(0.1) / SGD(0.01)")
    scheduler = s.LambdaLR(optimizer, lambda t: (0.5, 0.0, 2.0, 0.1, 1.5)[t % 5])
    lr, last, factor = 0.1, torch.zeros(37, dtype=torch.float64), 0.0
    for t in range(12):
        optimizer.zero_grad()
        loss_of(model, batch(t)).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        lr += 0.01 * factor * float(g @ last)
        last, factor = g.clone(), (0.5, 0.0, 2.0, 0.1, 1.5)[t % 5]
        assert optimizer.hyperparameters()[0]["lr"] == pytest.approx(lr, rel=1e-12)
        torch.testing.assert_close(after, before - lr * factor * g, rtol=1e-12, atol=1e-15)
        scheduler.step()


@pytest.mark.parametrize(
    "stack",
    [
        "Adam(0.05)[lr: log, beta1] / SGD(0)",
        "Adam(0.05)[lr: log] / SGD(0, horizon=10)",
        "AdamW(0.05, weight_decay=0.1)[lr] / SGD(0)",
        "RMSProp(0.05)[lr: square] / SGD(0)",
        "SGD(0.05, momentum=0.9)[lr: log] / SGD(0, horizon=10)",
    ],
)
def test_hypergradients_are_finite_differences(stack):
    """Of two groups with a factor each, of the loss by the raw value that both share."""
    factors = [lambda t: (0.3, 0.7)[t], lambda t: (2.0, 0.1)[t]]

    def run(lr: float) -> tuple[Net, HyperOptimizer]:
        model = Net()
        groups = [{"params": model.first.parameters()}, {"params": model.last.parameters()}]
        stack_of_lr = stack.replace("0.05", repr(lr))
        optimizer = HyperOptimizer(groups, stack_of_lr, compile=False)
        train_by([s.LambdaLR(optimizer, factors)], model, optimizer, range(1))
        return model, optimizer

    lowest = HyperOptimizer(Net().parameters(), stack).stack.levels[0]
    domain, h = lowest.tuned["lr"].domain, 1e-5
    raw = domain.raw(0.05)

    def loss(r: float) -> tuple[float, HyperOptimizer]:
        model, optimizer = run(float(domain.value(torch.tensor(r, dtype=torch.float64))))
        optimizer.zero_grad()
        value = loss_of(model, batch(1))
        value.backward()
        optimizer.step()
        return value.item(), optimizer

    expected = (loss(raw + h)[0] - loss(raw - h)[0]) / (2 * h)
    assert float(loss(raw)[1].hypergradients()[0]) == pytest.approx(expected, rel=1e-6)
    assert abs(expected) > 1e-4


@pytest.mark.parametrize(
    "rule",
    [r for r in RULES.values() if r.__module__.startswith("hyperopt") and r.ndim is None],
)
@pytest.mark.parametrize(
    "above", ["SGD(0.1)", "AdaGrad(1.0, horizon=inf, normalize=True, trust=0.1)"]
)
def test_a_factor_of_0_moves_nothing(rule, above):
    if "trust" in above and not rule.linear_in_lr:
        pytest.skip("a trust region over this rule is refused")
    stack = f"{rule.__name__}(0.05)[lr: log] / {above}"
    model, optimizer = made(stack)
    scheduler = s.LambdaLR(optimizer, lambda t: float(t >= 3))
    for t in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        train_by([scheduler], model, optimizer, range(t, t + 1))
        assert optimizer.snapshot().isfinite().all()
        assert all(map(torch.equal, before, model.parameters())) == (t < 3), t
        if t < 3:
            assert optimizer.hyperparameters()[0]["lr"] == pytest.approx(0.05, rel=1e-12)
    assert optimizer.skipped == [0, 0]


def test_a_factor_of_1_changes_nothing():
    model, optimizer = made()
    schedulers = [
        s.LambdaLR(optimizer, lambda t: 1.0),
        s.MultiplicativeLR(optimizer, lambda t: 1.0),
    ]
    train_by(schedulers, model, optimizer, range(9))
    other, plain = trained()
    same_weights(model, other)
    assert torch.equal(optimizer.snapshot()[:-1], plain.snapshot())
    assert optimizer.names == (*plain.names, "0.effective_lr")
    learned = optimizer.hyperparameters()[0]
    assert learned["lr"] == learned["effective_lr"] == plain.param_groups[0]["lr"] != 0.05
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05), "the scheduler's own number"


@pytest.mark.parametrize("scope", ["", " per group", " per tensor"])
def test_scopes_are_scaled(scope):
    """What each group or tensor has learned is multiplied by its group's factor."""

    def run(*factors: float) -> tuple[Net, HyperOptimizer]:
        model = Net()
        optimizer = HyperOptimizer(
            [{"params": model.first.parameters()}, {"params": model.last.parameters()}],
            f"SGD(0.1)[lr: log{scope}] / SGD(0.1)",
            compile=False,
        )
        multipliers: list[Any] = [lambda t, f=factor: f for factor in factors]
        train_by([s.LambdaLR(optimizer, multipliers)], model, optimizer, range(1))
        return model, optimizer

    once, twice, start = run(1.0, 1.0)[0], run(0.5, 3.0)[0], Net()
    for name, factor in (("first", 0.5), ("last", 3.0)):
        moved = [[getattr(net, name).weight for net in (net, start)] for net in (once, twice)]
        (a, w), (b, _) = moved
        torch.testing.assert_close(b - w, factor * (a - w), rtol=1e-10, atol=1e-15)


def test_an_lr_that_is_set_by_hand_is_the_effective_one():
    for change in (
        lambda group: group.update(lr=float(group["lr"]) * 0.1),
        lambda group: group["lr"].mul_(0.1),
        lambda group: group["lr"].fill_(float(group["lr"]) / 10),
        lambda group: group.update(lr=group["lr"] * 0.1),
    ):
        model, optimizer = trained(5, "SGD(0.1)[lr: log] / SGD(0.1)")
        learned = optimizer.hyperparameters()[0]["lr"]
        change(optimizer.param_groups[0])
        assert optimizer.hyperparameters()[0] == pytest.approx(
            {"lr": learned, "effective_lr": learned / 10, "momentum": 0, "weight_decay": 0}
        )
        train(model, optimizer, range(5, 7))
        now = optimizer.hyperparameters()[0]
        assert now["lr"] != learned
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(now["lr"] / 10)
        # A scheduler goes on from there.
        schedulers = [s.ExponentialLR(optimizer, 0.5)]
        train_by(schedulers, model, optimizer, range(7, 8))
        now = optimizer.hyperparameters()[0]
        assert now["effective_lr"] == pytest.approx(now["lr"] / 20)
        _, other = made("SGD(0.1)[lr: log] / SGD(0.1)")
        other.load_state_dict(optimizer.state_dict())
        assert other.hyperparameters() == optimizer.hyperparameters()
        train_by(schedulers, model, optimizer, range(8, 9))
        now = optimizer.hyperparameters()[0]
        assert now["effective_lr"] == pytest.approx(now["lr"] / 40)


def test_values_that_cannot_be_scaled():
    model, optimizer = made("SGD(0) / SGD(0.1)")
    scheduler = s.StepLR(optimizer, 30)
    with pytest.raises(ValueError, match=r"initial_lr is 0 .* start from a number above 0"):
        train_by([scheduler], model, optimizer, range(1))
    model, optimizer = made("SGD(0) / SGD(0.1)")
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"lr was set .* to 0, which no factor can scale"):
        optimizer.step()


def test_a_trust_region_bounds_the_effective_update():
    model, optimizer = made("Adam(1.0)[lr: log] / SGD(0, trust=0.1)")
    scheduler = s.LambdaLR(optimizer, lambda t: (0.0, 1e6, 1e-3, 1e9, 1.0)[t])
    for t in range(4):
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        train_by([scheduler], model, optimizer, range(t, t + 1))
        moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        share = float(moved.norm() / before.norm())
        if t in (1, 3):
            assert share == pytest.approx(0.1, rel=1e-3)
        else:
            assert share < 0.001


def test_a_learned_schedule_is_that_of_the_effective_lr():
    model, optimizer = made("SGD(0.1)[lr: log] / SGD(0.1)")
    scheduler, schedule = s.LinearLR(optimizer, 1.0, 0.0, 8), Schedule()
    for t in range(8):
        train(model, optimizer, range(t, t + 1))
        schedule.append(optimizer)
        scheduler.step()
    other, plain = made("SGD(0.1)")
    replay = Replay(plain, schedule)
    for t in range(8):
        train(other, plain, range(t, t + 1))
        replay.step()
    same_weights(other, model, rtol=1e-10)


# Schedulers of other packages.

TRANSFORMERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant"]
TRANSFORMERS += ["constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"]
TRANSFORMERS += ["cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_schedulers_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    own: dict[str, Any] = {}
    if "min_lr" in name:
        own = {"min_lr_rate": 0.1}
    if name == "warmup_stable_decay":
        own = {"num_decay_steps": 3}

    def start(optimizer: Any) -> list[Any]:
        return [transformers.get_scheduler(name, optimizer, 2, 10, scheduler_specific_kwargs=own)]

    beside_torch(start)


def test_a_scheduler_of_timm():
    timm = pytest.importorskip("timm.scheduler")

    class Stepped:
        def __init__(self, optimizer: Any) -> None:
            self.inner = timm.CosineLRScheduler(
                optimizer, t_initial=8, warmup_t=3, warmup_lr_init=1e-4, lr_min=1e-3
            )
            self.t = 0

        def step(self) -> None:
            self.t += 1
            self.inner.step(self.t)

    beside_torch(lambda optimizer: [Stepped(optimizer)])


def beside_torch(start: Callable[[Any], list[Any]]) -> None:
    """A scheduler on Adam of ours, below a level that does not move and one that does."""
    peer = Net()
    theirs = PEERS["Adam(0.05)"](peer.parameters())
    still, optimizer = made("Adam(0.05)[lr: log] / SGD(0)")
    moving, tuned = made(AUTO)
    runs: list[Any] = [(peer, theirs), (still, optimizer), (moving, tuned)]
    schedulers = [start(o) for _, o in runs]
    for t in range(9):
        for (model, o), own in zip(runs, schedulers, strict=True):
            train_by(own, model, o, range(t, t + 1))
        same_weights(still, peer, rtol=1e-9)
        learned = tuned.hyperparameters()[0]
        assert learned.get("effective_lr", learned["lr"]) / learned["lr"] == pytest.approx(
            theirs.param_groups[0]["lr"] / 0.05, rel=1e-9
        )


@pytest.mark.slow
@pytest.mark.compiler
def test_scheduled_values_compile_nothing(monkeypatch):
    compilations = []
    compile = hyperopt._engine.compiler.compile_sized

    def count(*args: Any) -> Any:
        compilations.append(args)
        return compile(*args)

    monkeypatch.setattr(hyperopt._engine.compiler, "compile_sized", count)
    runs: list[Pair] = []
    for compiled in (True, False):
        model = Net()
        optimizer = HyperOptimizer(
            model.parameters(), "Adam(0.01)[lr, eps: log] / SGD(0.1)", compile=compiled
        )
        train(model, optimizer, range(2))
        train_by([s.OneCycleLR(optimizer, 0.2, total_steps=12)], model, optimizer, range(2, 9))
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


def test_a_state_of_version_0_1_with_a_scheduler_resumes():
    """There, a scheduler that did nothing was the only one that a tuned lr allowed."""
    model, optimizer = made("Adam(0.05) / SGD(0.01)")
    train(model, optimizer, range(4))
    state = optimizer.state_dict()
    (group,) = state["param_groups"]
    for name in ("lr_base", "lr_factor"):
        group.pop(name, None)
    for name in ("format", "steps_made"):
        group["tower"].pop(name)
    for part in ("fixed", "last_fixed"):
        group["tower"]["levels"][0][part].pop("lr_factor")
    group["initial_lr"] = 0.05
    twin, other = made("Adam(0.05) / SGD(0.01)")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    values = other.hyperparameters()[0]
    assert values["lr"] == optimizer.hyperparameters()[0]["lr"] != 0.05
    assert values.get("effective_lr", values["lr"]) == pytest.approx(values["lr"], rel=1e-12)
    for one in ((model, optimizer), (twin, other)):
        train(*one, range(4, 8))
    same_weights(model, twin, rtol=1e-9)
