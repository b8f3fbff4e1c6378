"""A run saved and loaded into new objects continues bit for bit."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import hyperopt._engine.shards
from hyperopt import HyperOptimizer

STACKS = [
    "SGD(0.05, momentum=0.9, weight_decay=0.01)",
    "SGD(0.05, momentum=0.9, weight_decay=0.01, nesterov=True) / SGD(1e-3)",
    "Adam(0.01) / SGD({lr: 1e-4, beta1: 1e-3, beta2: 1e-2}, momentum=0.5) / SGD(1e-6)",
    "AdamW(0.01)[lr: log, weight_decay] / RMSProp(1e-3) / AdaGrad(1e-3) / Adam(1e-3)",
    "ScheduleFreeAdam(1.0)[lr: log, beta1] / AdaGrad(1.0, horizon=inf, normalize=True, trust=0.1)",
    "Adam(0.05)[lr: log] / SGD(0.1, trust=0.02)[lr, trust] / SGD(0.1)",
]
STEPS = 9
GROUPS: dict[str, Callable[[nn.Module], list]] = {
    "one group": lambda net: list(net.parameters()),
    "groups": lambda net: [
        {"params": net[0].parameters(), "lr": 0.02},  # type: ignore[index]
        {"params": net[2].parameters()},  # type: ignore[index]
        {"params": net[4].parameters(), "lr": 0.03, "weight_decay": 0.1},  # type: ignore[index]
    ],
}


def make(stack: str, groups: str, compile: bool) -> tuple[nn.Sequential, HyperOptimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    return net, HyperOptimizer(GROUPS[groups](net), stack, compile=compile)


def train(
    net: nn.Sequential, optimizer: HyperOptimizer, steps: range, parked: bool
) -> list[Tensor]:
    """Train on made-up data; return all weights and hyperparameters after each step."""
    seen = []
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(2, 8, 4, generator=generator)
        optimizer.zero_grad()
        ((net(x) - y[:, :2]) ** 2).mean().backward()
        if parked:
            if t in (3, 4, 5, 6):
                net[2].bias.grad = None
            if t in (1, 4, 5):
                net[4].weight.grad = None
        optimizer.step()
        weights = [p.detach().clone().flatten() for p in net.parameters()]
        seen.append(torch.cat([*weights, optimizer.snapshot()]))
    return seen


def resume(stack, groups, compile, parked, stops, path=None) -> None:
    whole = train(*make(stack, groups, compile), range(STEPS), parked)
    for stop in stops:
        net, optimizer = make(stack, groups, compile)
        train(net, optimizer, range(stop), parked)
        file = path or io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        if path is None:
            file.seek(0)
        saved = torch.load(file, weights_only=True)

        fresh, other = make(stack, groups, compile)
        train(fresh, other, range(100, 102), parked)  # its earlier state must leave no trace
        fresh.load_state_dict(saved["net"])
        other.load_state_dict(saved["optimizer"])
        assert torch.equal(other.snapshot(), optimizer.snapshot())
        rest = train(fresh, other, range(stop, STEPS), parked)
        for t, (ours, expected) in enumerate(zip(rest, whole[stop:], strict=True), start=stop):
            assert torch.equal(ours, expected), f"saved before step {stop}: step {t} differs"


@pytest.mark.parametrize(
    ("groups", "parked", "in_place"),
    [("one group", False, False), ("groups", True, False), ("groups", True, True)],
    ids=["one group", "groups, some without gradient", "the same, in place"],
)
@pytest.mark.parametrize(
    "stack", STACKS, ids=[*(f"height {i}" for i in range(4)), "as Auto", "bound tuned"]
)
def test_a_resumed_run_is_the_same_bit_for_bit(stack, groups, parked, in_place, monkeypatch):
    if in_place:
        monkeypatch.setattr(hyperopt._engine.shards, "LARGE", 1)
    resume(stack, groups, False, parked, (0, 1, 2, 4, 5, 7))


def test_a_resumed_run_is_the_same_from_a_file(tmp_path):
    resume(STACKS[2], "groups", False, True, (4,), tmp_path / "checkpoint.pt")


@pytest.mark.slow
def test_a_resumed_run_is_the_same_when_compiled():
    resume(STACKS[1], "one group", True, False, (0, 1, 2, 4))


def test_newly_set_constants_are_in_the_state():
    stack = "SGD(0.05, momentum=0.9)[momentum] / SGD(1e-2)"
    net, optimizer = make(stack, "one group", False)
    train(net, optimizer, range(3), False)
    optimizer.param_groups[0]["lr"] = 0.01
    fresh, other = make(stack, "one group", False)
    fresh.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.01
    rest = train(fresh, other, range(3, 6), False)
    for ours, expected in zip(rest, train(net, optimizer, range(3, 6), False), strict=True):
        assert torch.equal(ours, expected)


def test_a_state_holds_numbers_strings_and_tensors_alone():
    net, optimizer = make(STACKS[3], "groups", False)
    train(net, optimizer, range(5), True)

    def check(value) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                assert isinstance(key, (str, int))
                check(one)
        elif isinstance(value, list):
            for one in value:
                check(one)
        else:
            assert isinstance(value, (int, float, str, Tensor)), value

    check(optimizer.state_dict())


def test_saving_changes_nothing():
    net, optimizer = make(STACKS[3], "groups", False)
    seen = []
    for t in range(10):
        seen += train(net, optimizer, range(t, t + 1), True)
        optimizer.state_dict()
    for ours, expected in zip(
        seen, train(*make(STACKS[3], "groups", False), range(10), True), strict=True
    ):
        assert torch.equal(ours, expected)


def test_a_group_added_in_mid_run_is_in_the_state():
    def grown() -> tuple[nn.Sequential, HyperOptimizer]:
        net, _ = make(STACKS[2], "one group", False)
        optimizer = HyperOptimizer(net[0].parameters(), STACKS[2], compile=False)
        train(net, optimizer, range(3), False)
        optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.05})
        optimizer.add_param_group({"params": net[4].parameters()})
        return net, optimizer

    net, optimizer = grown()
    whole = train(net, optimizer, range(3, 8), False)
    net, optimizer = grown()
    train(net, optimizer, range(3, 5), False)
    fresh, _ = make(STACKS[2], "one group", False)
    other = HyperOptimizer(
        [
            {
                "params": fresh[0].parameters(),
                "beta1": 0.5,
            },  # what is whose own is in the state too
            {"params": fresh[2].parameters()},
            {"params": fresh[4].parameters()},
        ],
        STACKS[2],
        compile=False,
    )
    fresh.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert other.names == optimizer.names
    for ours, expected in zip(train(fresh, other, range(5, 8), False), whole[2:], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize(
    "stack", ["SGD(0.1, momentum=0.9)", "AdamW(0.01)[lr: log, beta1] / SGD(1e-4) / RMSProp(1e-5)"]
)
def test_a_copy_continues_like_the_original(copied, stack):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = HyperOptimizer(model.parameters(), stack, compile=False)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            model(torch.full((4, 5), 0.1 * step)).sin().sum().backward()
            optimizer.step()

    train(model, optimizer, 0, 5)
    twin, other = copied((model, optimizer))
    train(model, optimizer, 5, 10)
    assert other.hyperparameters() != optimizer.hyperparameters() or not optimizer.stack.height
    train(twin, other, 5, 10)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert other.hyperparameters() == optimizer.hyperparameters()
    assert float(other.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("stack", STACKS, ids=[f"height {s.count('/')}" for s in STACKS])
def test_a_resumed_run_is_the_same_through_a_distributed_checkpoint(stack, tmp_path):
    """It knows parameters by name, and loads into the tensors of the resumed run."""

    def make() -> tuple[nn.Sequential, HyperOptimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 2))
        net.scale = nn.Parameter(torch.tensor(0.5))
        net.register_forward_hook(lambda *call: net.scale * call[-1])
        groups = [{"params": net[0].parameters(), "lr": 0.02}, {"params": [net.scale]}]
        return net, HyperOptimizer(groups, stack, compile=False)

    def states(net: nn.Module, optimizer: HyperOptimizer) -> dict[str, Any]:
        return dict(zip(("net", "optimizer"), get_state_dict(net, optimizer), strict=True))

    net, optimizer = make()
    train(net, optimizer, range(4), False)
    checkpoint.save(states(net, optimizer), checkpoint_id=tmp_path, no_dist=True)
    fresh, other = make()
    saved = states(fresh, other)
    checkpoint.load(saved, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(fresh, other, model_state_dict=saved["net"], optim_state_dict=saved["optimizer"])
    assert torch.equal(other.snapshot(), optimizer.snapshot())
    rest = train(fresh, other, range(4, STEPS), False)
    for ours, expected in zip(rest, train(net, optimizer, range(4, STEPS), False), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("make", [lambda p: HyperOptimizer(p, STACKS[2]), torch.optim.Adam])
def test_a_distributed_checkpoint_includes_foreign_entries(make, tmp_path):
    """For each parameter and each group; torch accepts no other keys of a state."""

    def start(number: float, word: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(4, 2)
        optimizer = make([{"params": net.parameters(), "lr_scale": number, "kind": word}])
        for _ in range(2):
            net.zero_grad()
            net(torch.ones(3, 4)).sum().backward()
            optimizer.step()
        for p in net.parameters():
            optimizer.state[p]["slow"] = torch.full_like(p, number)
            optimizer.state[p]["count"] = torch.tensor(number)
        return net, optimizer

    net, optimizer = start(0.75, "wanted")
    checkpoint.save(
        dict(zip(("net", "optimizer"), get_state_dict(net, optimizer), strict=True)),
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    fresh, other = start(0.25, "lost")
    saved: dict[str, Any] = dict(
        zip(("net", "optimizer"), get_state_dict(fresh, other), strict=True)
    )
    checkpoint.load(saved, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(fresh, other, model_state_dict=saved["net"], optim_state_dict=saved["optimizer"])
    assert other.param_groups[0]["lr_scale"] == 0.75
    assert other.param_groups[0]["kind"] == "wanted"
    for p in fresh.parameters():
        assert torch.equal(other.state[p]["slow"], torch.full_like(p, 0.75))
        assert float(other.state[p]["count"]) == 0.75


def test_reading_the_state_before_the_first_step_changes_nothing():
    net, optimizer = make(STACKS[2], "groups", False)
    net[2].bias.requires_grad_(False)
    kept = optimizer.state
    assert kept.keys() == {p for p in net.parameters() if p.requires_grad}
    assert not any(value.any() for own in kept.values() for value in own.values())
    net[2].bias.requires_grad_(True)
    seen = train(net, optimizer, range(STEPS), True)
    for ours, expected in zip(
        seen, train(*make(STACKS[2], "groups", False), range(STEPS), True), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
