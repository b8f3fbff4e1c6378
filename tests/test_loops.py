"""The optimizer in common training loops, with everything that a loop does beside `step`."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hyperopt._engine.shards
from hyperopt import HyperOptimizer

TALL = "AdamW(0.05, 0.6)[lr: log, beta1] / SGD({lr: 0.1, beta1: 1e-2}, momentum=0.5) / SGD(1e-3)"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PEERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD(0.1, momentum=0.9)": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Adam(0.05)": lambda p: torch.optim.Adam(p, 0.05),
}
# A level above with step size 0 changes nothing, but still stores the last move.
STACKS = [*PEERS, "SGD(0.1, momentum=0.9)[momentum] / SGD(0)", "Adam(0.05)[beta1] / SGD(0)"]


@pytest.fixture(params=["gathered", "in place"])
def memory(request, monkeypatch):
    """The engine's two ways to pass parameters to the step."""
    if request.param == "in place":
        monkeypatch.setattr(hyperopt._engine.shards, "LARGE", 1)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.last(hidden.to(self.last.weight.dtype))


Pair = tuple[nn.Module, HyperOptimizer]


def made(stack: str = TALL, dtype: torch.dtype = torch.float64) -> tuple[Net, HyperOptimizer]:
    model = Net(dtype)
    return model, HyperOptimizer(model.parameters(), stack, compile=False)


def batch(t: int, model: nn.Module | None = None) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    return x if model is None else x.to(next(model.parameters()))


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (model(x) - x[:, :2].sin()).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The plainest loop."""
    for t in steps:
        optimizer.zero_grad()
        loss_of(model, batch(t, model)).backward()
        optimizer.step()


def trained(steps: int = 9, stack: str = TALL) -> tuple[Net, HyperOptimizer]:
    model, optimizer = made(stack)
    train(model, optimizer, range(steps))
    return model, optimizer


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def give(model: nn.Module, t: int, only: Callable[[int], bool] = lambda i: True) -> None:
    """Made-up gradients, for some of the parameters."""
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(model.parameters()):
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = g if only(i) else None


def same_weights(ours: nn.Module, theirs: nn.Module, rtol: float = 0.0) -> None:
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)


def same(ours: Pair, theirs: Pair, rtol: float = 0.0) -> None:
    """Hold weights and hyperparameters equal."""
    same_weights(ours[0], theirs[0], rtol)
    torch.testing.assert_close(ours[1].snapshot(), theirs[1].snapshot(), rtol=rtol, atol=0)


# Between backward and step.


def test_accumulated_gradients():
    model, optimizer = made()
    for t in range(9):
        optimizer.zero_grad()
        for part in batch(t).split(2):
            (loss_of(model, part) / 4).backward()
        optimizer.step()
    same((model, optimizer), trained(), rtol=1e-12)


@pytest.mark.parametrize("foreach", [False, True])
def test_hypergradients_use_clipped_gradients(foreach):
    """The hypergradient of SGD's step size is -<G_t, G_t-1>, of the gradients that moved it."""
    model, optimizer = made("SGD(0.1) / SGD(0.01)")
    last, lr = torch.zeros(37, dtype=torch.float64), 0.1
    for t in range(9):
        optimizer.zero_grad()
        loss_of(model, batch(t)).backward()
        g = torch.cat([g.flatten() for g in gradients(model)])
        assert g.norm() > 0.05
        g = g * 0.05 / g.norm()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=foreach)
        optimizer.step()
        lr += 0.01 * float(g @ last)
        last = g
        # Torch adds 1e-6 to the norm.
        assert optimizer.hyperparameters()[0]["lr"] == pytest.approx(lr, rel=1e-7)
    assert abs(lr - 0.1) > 1e-5


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_scale_is_not_in_the_hypergradients(device, clip):
    """Powers of two cancel exactly, and a step that overflows is as if it had not been."""

    def run(scaled: bool) -> Pair:
        model = Net(torch.float32).to(device)
        optimizer = HyperOptimizer(model.parameters(), TALL, compile=False)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12, growth_interval=3, enabled=scaled)
        scales = set()
        for t in range(12):
            overflows = t in (5, 6)
            if overflows and not scaled:
                continue
            scales.add(scaler.get_scale())
            optimizer.zero_grad()
            loss = loss_of(model, batch(t, model)) * (1e38 if overflows else 1)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert scales == ({2.0**11, 2.0**12, 2.0**13} if scaled else {1.0})
        return model, optimizer

    same(run(True), run(False))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    """A step inside the region of bfloat16 is the same as one outside: nothing of ours is cast."""

    def run(inside: bool) -> Pair:
        model = Net(torch.float32).to(device)
        optimizer = HyperOptimizer(model.parameters(), TALL, compile=False)
        for t in range(9):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                out = model(batch(t, model))
                assert out.dtype == torch.bfloat16
                out.float().square().mean().backward()
                if inside:
                    optimizer.step()
            if not inside:
                optimizer.step()
        return model, optimizer

    model, optimizer = run(True)
    same((model, optimizer), run(False))
    assert next(model.parameters()).dtype == torch.float32
    assert optimizer.hyperparameters()[0]["lr"] != 0.05


# How `step` is called.


def test_a_closure_is_called_once_before_anything_moves():
    model, optimizer = made()
    seen: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        seen.append(model.first.weight.detach().clone())
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    for t in range(9):
        x, before = batch(t), model.first.weight.detach().clone()
        expected = loss_of(model, x).item()
        with torch.no_grad():
            assert optimizer.step(closure).item() == expected
        assert len(seen) == t + 1 and torch.equal(seen[-1], before)
    same((model, optimizer), trained())


def test_a_failing_closure_changes_nothing():
    model, optimizer = made()

    def closure() -> None:
        loss_of(model, batch(100)).backward()
        raise KeyboardInterrupt

    for t in range(9):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        train(model, optimizer, range(t, t + 1))
    same((model, optimizer), trained())


def test_two_backward_passes_for_one_step():
    """Sharpness-aware minimization (Foret et al. 2021) moves the weights away and back again."""

    def run(make: Callable[[Any], torch.optim.Optimizer]) -> nn.Module:
        model = Net()
        optimizer = make(model.parameters())
        for t in range(9):
            optimizer.zero_grad()
            loss_of(model, batch(t)).backward()
            away = [0.1 * g.sign() for g in gradients(model)]
            for p, d in zip(model.parameters(), away, strict=True):
                p.data += d
            optimizer.zero_grad()
            loss_of(model, batch(t)).backward()
            for p, d in zip(model.parameters(), away, strict=True):
                p.data -= d
            optimizer.step()
        return model

    ours = run(lambda p: HyperOptimizer(p, "Adam(0.05)[beta1] / SGD(0)", compile=False))
    same_weights(ours, run(PEERS["Adam(0.05)"]), rtol=1e-10)


def test_steps_inside_the_backward_pass():
    """One optimizer for each parameter, that steps as soon as its gradient is there."""

    def run(inside: bool) -> list[Pair]:
        model = Net()
        own = {p: HyperOptimizer([p], TALL, compile=False) for p in model.parameters()}
        if inside:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda p: own[p].step())
        for t in range(9):
            model.zero_grad()
            loss_of(model, batch(t)).backward()
            for optimizer in () if inside else own.values():
                optimizer.step()
        return [(model, optimizer) for optimizer in own.values()]

    for ours, theirs in zip(run(True), run(False), strict=True):
        same(ours, theirs)


def test_hooks_around_a_step():
    model, optimizer = made()
    calls: list[str] = []

    def halve(*_: Any) -> None:
        calls.append("before")
        torch._foreach_div_(gradients(model), 2)

    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for t in range(9):
        optimizer.zero_grad()
        (loss_of(model, batch(t)) * 2).backward()
        optimizer.step()
    assert calls == ["before", "after"] * 9
    same((model, optimizer), trained())


@pytest.mark.parametrize("stack", STACKS)
def test_gradients_zeroed_but_not_freed(stack):
    """With ``set_to_none=False`` a parameter that is out of use is moved on by its momentum."""

    def run(make: Callable[[Any], torch.optim.Optimizer]) -> nn.Module:
        model = Net()
        optimizer = make(model.parameters())
        for t in range(12):
            optimizer.zero_grad(set_to_none=False)
            used = model if t % 4 < 2 else model.first
            used(batch(t)).square().mean().backward()
            optimizer.step()
        return model

    ours = run(lambda p: HyperOptimizer(p, stack, compile=False))
    same_weights(ours, run(PEERS[stack.partition("[")[0]]), rtol=1e-10)


# Around the model.


def test_compiled_models():
    model, optimizer = made()
    train(torch.compile(model, backend="aot_eager"), optimizer, range(9))  # type: ignore[arg-type]
    same((model, optimizer), trained(), rtol=1e-12)


def test_a_compiled_training_loop():
    model, optimizer = made()

    @torch.compile(backend="eager")
    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()

    for t in range(9):
        step(batch(t))
    same((model, optimizer), trained(), rtol=1e-12)


def test_parametrized_weights():
    """Weight normalization, by torch and by hand."""
    model = Net()
    v, *others = (p.detach().clone().requires_grad_() for p in model.parameters())
    g = v.detach().norm(dim=1, keepdim=True).requires_grad_()

    def normalized(x: Tensor) -> Tensor:
        first_bias, weight, bias = others
        hidden = torch.tanh(x @ (g * v / v.norm(dim=1, keepdim=True)).T + first_bias)
        return hidden @ weight.T + bias

    nn.utils.parametrizations.weight_norm(model.first)
    optimizer = HyperOptimizer(model.parameters(), TALL, compile=False)
    train(model, optimizer, range(9))
    other = HyperOptimizer([others[0], g, v, *others[1:]], TALL, compile=False)
    for t in range(9):
        other.zero_grad()
        loss_of(normalized, batch(t)).backward()
        other.step()
    for p, q in zip(model.parameters(), other.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizer.snapshot(), other.snapshot(), rtol=1e-10, atol=0)


def test_several_optimizers_on_one_model():
    """They match one optimizer whose groups share nothing."""
    above = "SGD(1e-2)"
    model, joint = Net(), Net()
    first = HyperOptimizer(model.first.parameters(), f"SGD(0.1) / {above}", compile=False)
    last = HyperOptimizer(model.last.parameters(), f"SGD(0.2) / {above}", compile=False)
    both = HyperOptimizer(
        [
            {"params": joint.first.parameters(), "lr": 0.1},
            {"params": joint.last.parameters(), "lr": 0.2},
        ],
        f"SGD(0.3) / {above}",
        compile=False,
    )
    train(joint, both, range(9))
    for t in range(9):
        model.zero_grad()
        loss_of(model, batch(t)).backward()
        first.step()
        last.step()
    same_weights(model, joint, rtol=1e-12)
    learned = both.hyperparameters()[0]
    for i, optimizer in enumerate((first, last)):
        lr = optimizer.hyperparameters()[0]["lr"]
        assert lr == pytest.approx(learned[f"lr[{i}]"], rel=1e-12)


@pytest.mark.parametrize("decay", [0.9, None], ids=["exponential", "Polyak"])
def test_an_average_of_the_weights(decay):
    model, optimizer = made()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay) if decay else None)
    expected: list[Tensor] = []
    for t in range(9):
        train(model, optimizer, range(t, t + 1))
        averaged.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        old, kept = expected or now, t / (t + 1) if decay is None else decay
        expected = [kept * e + (1 - kept) * p for e, p in zip(old, now, strict=True)]
    same((model, optimizer), trained())
    for p, q in zip(averaged.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-14)


# Parameters that come, go and change.


def beside_torch(
    stack: str,
    change: Callable[[int, Net, Any], None],
    only: Callable[[int], bool] = lambda i: True,
) -> None:
    """Make the steps of a stack and of its peer, each with the same changes before them."""
    models = Net(), Net()
    ours = HyperOptimizer(models[0].first.parameters(), stack, compile=False)
    theirs = PEERS[stack.partition("[")[0]](models[1].first.parameters())
    for t in range(16):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            change(t, model, optimizer)
            give(model, t, only)
            optimizer.step()
        same_weights(*models, rtol=1e-10)


@pytest.mark.parametrize("stack", STACKS)
def test_layers_thawed_frozen_and_with_another_lr(memory, stack):
    def change(t: int, model: Net, optimizer: torch.optim.Optimizer) -> None:
        if t == 4:
            optimizer.param_groups[0]["lr"] = 0.06
            optimizer.add_param_group({"params": model.last.parameters(), "lr": 0.02})
        if t == 8:
            optimizer.param_groups[0]["lr"] = 0.03
        model.first.requires_grad_(not 6 <= t < 10)

    beside_torch(stack, change, only=lambda i: i != 3)


@pytest.mark.parametrize("stack", STACKS)
def test_parameters_replaced_in_their_group(memory, stack):
    """A new parameter starts fresh, and a removed one is left alone."""

    def change(t: int, model: Net, optimizer: torch.optim.Optimizer) -> None:
        own = optimizer.param_groups[0]["params"]
        if t == 4:
            model.first.weight = nn.Parameter(torch.full_like(model.first.weight, 0.5))
            own[0] = model.first.weight
        if t == 8:
            own.append(model.last.bias)
        if t == 12:
            del own[1]

    beside_torch(stack, change)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(("taken", "put"), [(0, 1), (-1, 0)], ids=["anywhere", "next to it"])
def test_parameters_that_move_to_another_group(memory, stack, taken, put):
    """They keep what the rule knows of them, and go on with the other group's values."""
    own = {"momentum": 0.5} if "momentum" in stack else {"betas": (0.5, 0.6)}

    def change(t: int, model: Net, optimizer: torch.optim.Optimizer) -> None:
        if t == 2:
            optimizer.add_param_group({"params": model.last.parameters(), **own})
        if t == 7:
            first, second = (group["params"] for group in optimizer.param_groups)
            second.insert(put, first.pop(taken))

    beside_torch(stack, change)


@pytest.mark.parametrize("between", ["nothing", "a copy", "a new group"])
def test_a_run_that_is_saved_after_a_move_to_another_group(memory, between):
    def pair() -> Pair:
        model = Net()
        groups = [
            {"params": model.first.parameters()},
            {"params": model.last.parameters(), "lr": 0.3},
        ]
        return model, HyperOptimizer(groups, "Adam(0.05) / SGD(1e-2)", compile=False)

    def move(optimizer: HyperOptimizer) -> None:
        first, second = (group["params"] for group in optimizer.param_groups)
        second.insert(0, first.pop())

    model, optimizer = pair()
    train(model, optimizer, range(4))
    move(optimizer)
    if between == "a copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    fresh, other = pair()
    move(other)
    if between == "a new group":
        for o in (optimizer, other):
            o.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(4, 9))
    train(fresh, other, range(4, 9))
    same((model, optimizer), (fresh, other))
    kept = [entry["shard"] for entry in optimizer.state_dict()["state"].values()]
    assert kept[0] != kept[1], "weight and bias are now moved by hyperparameters of their own"


def test_a_parameter_that_was_taken_out_is_not_saved():
    _, optimizer = trained(3)
    del optimizer.param_groups[0]["params"][1]
    saved = optimizer.state_dict()["state"]
    assert [entry["shape"] for entry in saved.values()] == [[5, 4], [2, 5], [2]]


def test_groups_cannot_be_taken_away():
    model = Net()
    groups = [{"params": layer.parameters()} for layer in (model.first, model.last)]
    optimizer = HyperOptimizer(groups, TALL, compile=False)
    train(model, optimizer, range(2))
    optimizer.param_groups.append({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="group was added to the list; use add_param_group"):
        train(model, optimizer, range(1))
    del optimizer.param_groups[1:]
    with pytest.raises(ValueError, match="group was removed; make a new optimizer"):
        train(model, optimizer, range(1))


def test_parameters_with_their_own_hyperparameters_keep_their_places():
    model, optimizer = trained(3, "SGD(0.1)[lr: per tensor] / SGD(1e-3)")
    before = optimizer.snapshot()
    own = optimizer.param_groups[0]["params"]
    model.first.weight = own[0] = nn.Parameter(torch.full_like(own[0], 0.5))
    train(model, optimizer, range(1))
    assert not torch.equal(model.first.weight, torch.full_like(own[0], 0.5))
    assert torch.equal(optimizer.snapshot()[0], before[0]), "it has not moved anything yet"
    del own[0]
    with pytest.raises(ValueError, match="changed its position"):
        train(model, optimizer, range(1))


def test_a_parameter_that_is_given_twice():
    p = nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="tied ones"):
        HyperOptimizer([p, p], "SGD(0.1)")


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
def test_a_model_that_changes_its_dtype(memory, to):
    """It continues like a run saved in one dtype and loaded in the other."""
    model, optimizer = made(dtype=torch.float32)
    train(model, optimizer, range(4))
    fresh, other = made(dtype=to)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    model.to(to)
    train(model, optimizer, range(4, 9))
    train(fresh, other, range(4, 9))
    same((model, optimizer), (fresh, other))
    kept = {v.dtype for entry in optimizer.state.values() for v in entry.values() if v.ndim}
    assert kept == {torch.promote_types(to, torch.float32)}
    if to == torch.float64:
        same((model, optimizer), trained(), rtol=1e-4)
        assert not torch.equal(model.first.weight, model.first.weight.float().double())


def test_a_part_of_a_model_that_changes_its_dtype():
    model, optimizer = made(dtype=torch.float32)
    train(model, optimizer, range(4))
    model.first.double()
    train(model, optimizer, range(4, 9))
    fresh, other = made(dtype=torch.float32)
    fresh.first.double()
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(9, 12))
    train(fresh, other, range(9, 12))
    same((model, optimizer), (fresh, other))
    for net, o in ((model, optimizer), (fresh, other)):
        for layer in (net.first, net.last):
            kept = o.state[layer.weight].values()
            assert {v.dtype for v in kept if v.ndim} == {layer.weight.dtype}


def test_a_single_parameter_that_changes_its_dtype():
    """Not the first of those that are moved together."""
    model, optimizer = made(dtype=torch.float32)
    train(model, optimizer, range(4))
    model.first.bias.data = model.first.bias.data.double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in model.parameters():
        assert {v.dtype for v in optimizer.state[p].values() if v.ndim} == {p.dtype}
    assert not torch.equal(model.first.bias, model.first.bias.float().double())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [2, 9])
@pytest.mark.parametrize("stack", ["Adam(0.1)", "Adam(0.1) / SGD(1e-3)"])
def test_a_parameter_that_changes_its_shape(stack, size, compile):
    w, around = nn.Parameter(torch.ones(4)), torch.zeros(12)
    optimizer = HyperOptimizer([w], stack, compile=compile)
    w.grad = torch.ones(4)
    optimizer.step()
    w.grad, w.data = None, around[:size]
    w.grad = torch.ones(size)
    with pytest.raises(ValueError, match=rf"of shape \(4,\) has become one of \({size},\)"):
        optimizer.step()
    assert not around.any()


def test_a_state_is_loaded_where_the_precisions_differ():
    """Parameters that were moved together there need not be of one precision here."""
    model, optimizer = trained(4)
    fresh, other = made()
    fresh.first.float()
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for layer in (fresh.first, fresh.last):
        assert other.state[layer.weight]["exp_avg"].dtype == layer.weight.dtype
    train(model, optimizer, range(4, 9))
    train(fresh, other, range(4, 9))
    same_weights(fresh.double(), model, rtol=1e-4)
    torch.testing.assert_close(other.snapshot(), optimizer.snapshot(), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.compiler
def test_a_compiled_step_does_not_outlive_a_change_of_dtype(monkeypatch):
    monkeypatch.setattr(
        hyperopt._engine.shards, "LARGE", 1
    )  # the step works on the weights themselves
    runs: list[Pair] = []
    for compile in (True, False):
        model = nn.Linear(4, 2, bias=False)
        nn.init.constant_(model.weight, 0.5)
        optimizer = HyperOptimizer(model.parameters(), "SGD(0.1) / SGD(0.01)", compile=compile)
        train(model, optimizer, range(4))
        loss = model.weight.square().sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # also where a kernel has written to the weights, unseen by torch
        model.double()
        train(model, optimizer, range(4, 9))
        assert optimizer.compiled == compile
        runs.append((model, optimizer))
    same(runs[0], runs[1], rtol=1e-6)


@pytest.mark.gpu
def test_a_model_that_changes_its_device(memory):
    model, optimizer = made()
    train(model, optimizer, range(3))
    model.cuda()
    train(model, optimizer, range(3, 6))
    assert optimizer.snapshot().device.type == "cuda"
    fresh, other = made()
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    model.cpu()
    train(model, optimizer, range(6, 9))
    train(fresh, other, range(6, 9))
    same((model, optimizer), (fresh, other))
    same((model, optimizer), trained(), rtol=1e-10)


@pytest.mark.gpu
def test_a_model_on_two_devices_is_refused():
    model, optimizer = trained(3)
    model.first.cuda()
    give(model.last, 0)
    model.first.weight.grad = torch.zeros_like(model.first.weight)
    with pytest.raises(ValueError, match="one optimizer for each device"):
        optimizer.step()


def test_another_default_device_and_dtype():
    """Tensors of the rules and the tower are on the parameters' device."""
    stack = "Adam(0.05)[lr] / Adam(1e-3) / SGD(1e-5)"
    model, expected = Net(), trained(stack=stack)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            optimizer = HyperOptimizer(model.parameters(), stack, compile=False)
            for t in range(9):
                with torch.device("cpu"):
                    x = batch(t)
                optimizer.zero_grad()
                loss_of(model, x).backward()
                optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    same((model, optimizer), expected)


# Other uses of an optimizer.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_moves_only_the_copied_model(copied):
    """Also beside a scheduler, which puts a `step` of its own into the optimizer; hooks stay."""
    model, optimizer = made("Adam(0.05)[beta1] / SGD(1e-2)")
    StepLR(optimizer, 100)
    called: list[str] = []
    optimizer.register_step_post_hook(lambda *_: called.append("hook"))
    train(model, optimizer, range(5))
    optimizer.param_groups[0]["lr"] = 0.04
    twin, other = copied((model, optimizer))
    assert list(map(id, twin.parameters())) == list(map(id, other.param_groups[0]["params"]))
    start = [p.detach().clone() for p in model.parameters()]
    called.clear()
    train(twin, other, range(5, 9))
    assert called == [] and all(map(torch.equal, model.parameters(), start))
    train(model, optimizer, range(5, 9))
    assert len(called) == 4
    same((twin, other), (model, optimizer))


def test_hooks_around_saving_and_loading():
    model, optimizer = trained(5)
    fresh, other = made()
    calls: list[str] = []

    def mark(optimizer: Any, state_dict: dict[str, Any]) -> None:
        state_dict["extra"] = 1

    def unwrap(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("before loading")
        return state_dict.pop("wrapped")  # from a copy, as in torch.optim

    def loaded(optimizer: Any) -> None:
        calls.append("after loading")
        assert torch.equal(optimizer.snapshot(), trained(5)[1].snapshot())

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(mark)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {"wrapped": state_dict})
    other.register_load_state_dict_pre_hook(unwrap)
    other.register_load_state_dict_post_hook(loaded)
    saved = optimizer.state_dict()
    assert saved.keys() == {"wrapped"} and saved["wrapped"]["extra"] == 1
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    assert calls == ["before saving", "before loading", "after loading"]
    assert saved.keys() == {"wrapped"}
    train(model, optimizer, range(5, 9))
    train(fresh, other, range(5, 9))
    same((fresh, other), (model, optimizer))


@pytest.mark.parametrize("stack", ["Adam(0.05)", "Adam(0.05) / SGD(0)"])
def test_the_state_of_a_parameter(memory, stack):
    """It is that of torch.optim, or below another level what that was before the last move."""
    model, peer = Net(), Net()
    optimizer = HyperOptimizer(model.parameters(), stack, compile=False)
    theirs = torch.optim.Adam(peer.parameters(), 0.05)
    kept = [value for own in optimizer.state.values() for value in own.values()]
    assert len(kept) == 3 * 4 and not any(map(torch.any, kept))
    for t in range(5):
        before = copy.deepcopy(theirs.state_dict()["state"])
        for net, o in ((model, optimizer), (peer, theirs)):
            give(net, t)
            o.step()
        expected = before if optimizer.stack.height else theirs.state_dict()["state"]
        saved = optimizer.state_dict()["state"]
        for i, p in enumerate(model.parameters()):
            assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
            for name, value in optimizer.state[p].items():
                assert torch.equal(value, saved[i][name])
                if expected:
                    theirs_now = expected[i][name].to(value.dtype)
                    torch.testing.assert_close(value, theirs_now, rtol=1e-10, atol=1e-14)


def test_the_state_of_a_parameter_may_be_written_to(memory):
    def run(make: Callable[[Any], torch.optim.Optimizer]) -> nn.Module:
        model = Net()
        optimizer = make(model.parameters())
        for t in range(9):
            if t == 5:
                for kept in optimizer.state.values():
                    for value in kept.values():
                        value.zero_()
            train(model, optimizer, range(t, t + 1))
        return model

    ours = run(lambda p: HyperOptimizer(p, "Adam(0.05)", compile=False))
    same_weights(ours, run(PEERS["Adam(0.05)"]), rtol=1e-10)
