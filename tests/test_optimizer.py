"""`HyperOptimizer` as an optimizer: its interface, and its errors."""

import collections
import copy
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperopt import (
    DOMAINS,
    SGD,
    Domain,
    Hyper,
    HyperOptimizer,
    HyperoptWarning,
    Option,
    Rule,
    parse,
)


def weights(*shapes, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def give_gradients(params: list[Tensor], t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


# As an optimizer of torch.


def test_it_trains_a_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    y = x.prod(dim=1, keepdim=True)
    optimizer = HyperOptimizer(net.parameters(), "Adam(1e-4) / Adam(1e-3)", compile=False)
    assert isinstance(optimizer, torch.optim.Optimizer)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.param_groups[0]["lr"] > 1e-2, "far too small a step size must have grown"


def test_zero_grad():
    w = weights((3,))
    optimizer = HyperOptimizer(w, "SGD(0.1)", compile=False)
    give_gradients(w, 0)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(w[0].grad, torch.zeros(3))  # type: ignore[arg-type]
    optimizer.zero_grad()
    assert w[0].grad is None


def test_step_evaluates_a_closure_with_gradients():
    ours, theirs = weights((3,)), weights((3,))
    optimizer = HyperOptimizer(ours, "SGD(0.1) / SGD(0)", compile=False)
    peer = torch.optim.SGD(theirs, 0.1)

    def closure(w: Tensor, o: torch.optim.Optimizer) -> Tensor:
        o.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        with torch.no_grad():
            loss = optimizer.step(lambda: closure(ours[0], optimizer))
        assert loss == peer.step(lambda: closure(theirs[0], peer))
    assert torch.equal(ours[0], theirs[0])
    assert optimizer.step() is None


def test_hooks_and_repr():
    w = weights((3,))
    optimizer = HyperOptimizer(w, "SGD(0.1) / SGD(0.01)", compile=False)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    give_gradients(w, 0)
    optimizer.step()
    assert calls == [1]
    assert repr(optimizer).startswith("HyperOptimizer (\nParameter Group 0\n")
    assert "lr: 0.1" in repr(optimizer)


def test_a_step_leaves_gradients_and_the_graph_alone():
    w = weights((100, 1000), (3,))  # one that is worked on in place and one that is gathered
    optimizer = HyperOptimizer(w, "AdamW(0.1) / SGD(0.1)", compile=False)
    for t in range(3):
        give_gradients(w, t)
        grads = [p.grad for p in w]
        copies = [g.clone() for g in grads if g is not None]
        optimizer.step()
        for p, g, before in zip(w, grads, copies, strict=True):
            assert p.grad is g and g is not None and torch.equal(g, before)
            assert p.is_leaf and p.requires_grad and p.grad_fn is None
    # A backward through weights that have changed since is refused, as with any optimizer.
    for p in w:
        loss = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Reading the hyperparameters.


CONSTANTS = ("beta2", "eps", "weight_decay")


def test_all_ways_to_read_the_hyperparameters_agree():
    w = weights((5,), (4,))
    optimizer = HyperOptimizer(
        [{"params": w[:1]}, {"params": w[1:], "lr": 0.02, "eps": 0.1}],
        "Adam(0.01)[lr: log, beta1] / RMSProp({lr: 1e-3, beta1: 1e-2}) / SGD(1e-4)",
        compile=False,
    )
    for t in range(5):
        values = optimizer.hyperparameters()
        assert [list(level) for level in values] == [
            f"lr lr[1] beta1 {' '.join(f'{n}[0] {n}[1]' for n in CONSTANTS)}".split(),
            ["lr[lr]", "lr[beta1]", "gamma", "eps", "weight_decay", "momentum"],
            ["lr", "momentum", "weight_decay"],
        ]
        snapshot = optimizer.snapshot()
        assert snapshot.dtype == torch.float64 and snapshot.shape == (len(optimizer.names),)
        assert dict(zip(optimizer.names, snapshot.tolist(), strict=True)) == {
            f"{k}.{name}": value for k, level in enumerate(values) for name, value in level.items()
        }
        raw = optimizer.state_dict()["param_groups"][0]["tower"]["levels"][0]["tuned"]
        assert values[0]["lr"] == raw["lr"].exp().item()
        assert values[0]["lr[1]"] == raw["lr[1]"].exp().item()
        assert values[0]["beta1"] == ((raw["beta1"].tanh() + 1) / 2).item()
        first, second = optimizer.param_groups
        assert first["lr"].item() == values[0]["lr"] and first["lr"].shape == ()
        assert second["lr"].item() == values[0]["lr[1]"]
        assert first["beta1"].item() == second["beta1"].item() == values[0]["beta1"]
        assert (first["eps"], second["eps"], first["beta2"]) == (1e-8, 0.1, 0.999)
        before = snapshot.clone()
        give_gradients(w, t)
        optimizer.step()
        assert torch.equal(snapshot, before), "a snapshot must not follow the optimizer"
    assert values[0]["lr"] != 0.01 and values[0]["lr"] != values[0]["lr[1]"]
    give_gradients(w, 9)
    optimizer.step()
    assert optimizer.param_groups[1]["lr"].item() == optimizer.hyperparameters()[0]["lr[1]"]
    assert optimizer.param_groups[1]["lr"].dtype == torch.float64


def test_values_that_no_level_moves_may_be_set_between_steps():
    ours, theirs = weights((4,), (3,)), weights((4,), (3,))
    optimizer = HyperOptimizer(
        [{"params": ours[:1]}, {"params": ours[1:]}], "SGD(0.1, momentum=0.9)", compile=False
    )
    peer = torch.optim.SGD([{"params": theirs[:1]}, {"params": theirs[1:]}], 0.1, momentum=0.9)
    for t in range(10):
        for o, w in ((optimizer, ours), (peer, theirs)):
            o.param_groups[0]["lr"] *= 0.9
            o.param_groups[1]["momentum"] = 0.5 + t / 100
            o.param_groups[1]["weight_decay"] = 0.0  # as it was
            give_gradients(w, t)
            o.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)
    assert optimizer.hyperparameters()[0]["lr[0]"] == pytest.approx(0.1 * 0.9**10)
    assert optimizer.hyperparameters()[0]["momentum[1]"] == 0.59


def test_values_set_in_a_group_are_used_from_the_next_step():
    """The hypergradient of the last step is that of the values it was made with."""
    w = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = HyperOptimizer([w], "SGD(0.1, momentum=0.5)[momentum] / SGD(0.01)", compile=False)
    gradients = torch.randn(4, 2, dtype=torch.float64)
    buffer, momentum = torch.zeros(2, dtype=torch.float64), 0.5
    slope, expected = torch.zeros(2, dtype=torch.float64), w.detach().clone()
    for g, lr in zip(gradients, (0.2, 0.3, 0.05, 0.4), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = g.clone()
        optimizer.step()
        momentum -= 0.01 * float(g @ slope)
        slope = -lr * buffer
        buffer = momentum * buffer + g
        expected -= lr * buffer
        assert optimizer.hyperparameters()[0]["momentum"] == pytest.approx(momentum, rel=1e-12)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=0)


def test_a_step_size_of_0_may_be_raised_later():
    ours, theirs = weights((4,)), weights((4,))
    optimizer, peer = HyperOptimizer(ours, "SGD(0)", compile=False), torch.optim.SGD(theirs, 0.0)
    for t in range(5):
        for o, w in ((optimizer, ours), (peer, theirs)):
            o.param_groups[0]["lr"] = 0.1 * t
            give_gradients(w, t)
            o.step()
    torch.testing.assert_close(ours[0], theirs[0])


# Errors.


def refused(kind: type[Exception], *words: str):
    """Expect an error of one line that has all these words."""
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(kind, match=rf"^{pattern}[^\n]*\Z")


def test_parameters_that_cannot_be_moved():
    w = weights((3,))
    complex, sparse = torch.zeros(3, dtype=torch.cfloat), torch.zeros(3).to_sparse()
    for bad, words in ((complex, ("complex", "complex64")), (sparse, ("sparse", "sparse_coo"))):
        with refused(TypeError, *words):
            HyperOptimizer([bad.requires_grad_()], "SGD(0.1)")
    with refused(ValueError, "cpu", "meta", "one optimizer for each device"):
        HyperOptimizer([*w, torch.zeros(3, device="meta", requires_grad=True)], "SGD(0.1)")
    with refused(ValueError, "no values yet", "meta device", "after model.to_empty"):
        HyperOptimizer(nn.Linear(3, 2, device="meta").parameters(), "SGD(0.1)")
    with refused(ValueError, "empty parameter list"):
        HyperOptimizer([], "SGD(0.1)")


def test_sparse_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = HyperOptimizer(table.parameters(), "SGD(0.1) / SGD(0.1)", compile=False)
    table(torch.tensor([1, 2])).sum().backward()
    for _ in range(2):
        with refused(TypeError, "gradient is sparse", "sparse=False"):
            optimizer.step()
        assert len(optimizer.state) == 1  # which is there when it is asked for


def test_invalid_stacks():
    w = weights((3,))
    with refused(ValueError, "there is no rule 'Adma'; did you mean 'Adam'?", "column 1"):
        HyperOptimizer(w, "Adma(0.1)")
    with refused(ValueError, "SGD(0.1) has nothing to move", "Adam(0.1)[]"):
        HyperOptimizer(w, "Adam(0.1)[] / SGD(0.1)")


def test_groups_without_parameters():
    """A split of the parameters by kind may leave a kind empty."""
    stack = "SGD(0.1, momentum=0.5)[lr: {}, momentum] / SGD(0.01)"
    for how in ("per run", "per group", "per tensor"):
        empty = {"params": list[Tensor](), "momentum": 0.6}
        w, x, late = (weights((4,), (3,)) for _ in range(3))
        with_empty = [{"params": w[:1]}, {**empty}, {"params": w[1:], "lr": 0.2}, {**empty}]
        optimizer = HyperOptimizer(with_empty, stack.format(how), compile=False)
        groups = [{"params": x[:1]}, {"params": x[1:], "lr": 0.2}]
        peer = HyperOptimizer(groups, stack.format(how), compile=False)
        filled = HyperOptimizer([{**empty}], stack.format(how), compile=False)
        filled.add_param_group({"params": late[:1], "momentum": 0.5})
        filled.add_param_group({"params": late[1:], "momentum": 0.5, "lr": 0.2})
        for t in range(5):
            for o, params in ((optimizer, w), (peer, x), (filled, late)):
                give_gradients(params, t)
                o.load_state_dict(o.state_dict())
                o.step()
        assert all(map(torch.equal, w, x)), how
        if how == "per tensor":
            first, none, second, _ = (float(group["lr"]) for group in optimizer.param_groups)
            assert none == pytest.approx((first + second) / 2), "the mean of all"
    filled = HyperOptimizer([{"params": []}], "SGD(0.1)[lr: per tensor] / SGD(0.01)")
    filled.add_param_group({"params": weights((4,))})
    assert filled.names[0] == "0.lr[p0]"


def test_invalid_groups():
    w = weights((3,))
    with refused(TypeError, "a param group is a dict with params, not 3"):
        HyperOptimizer([{"params": w}, 3], "SGD(0.1)")
    for own, words in {
        "lrr": ("takes no 'lrr'", "did you mean 'lr'?"),
        "weigth_decay": ("takes no 'weigth_decay'", "did you mean 'weight_decay'?"),
        "maximize": ("maximize is 0.1 in a param group, which Adam cannot do",),
    }.items():
        with refused(ValueError, *words):
            HyperOptimizer([{"params": w, own: 0.1}], "Adam(0.1) / SGD(0.1)")
    with refused(ValueError, "Adam: beta1 must lie in [0, 1), but is 1.5"):
        HyperOptimizer([{"params": w, "beta1": 1.5}], "Adam(0.1) / SGD(0.1)")
    for name in ("beta1", "weight_decay"):
        with refused(
            ValueError,
            f"{name} is 0 in a",
            "SGD(0.2) moves it",
            "domain",
            f"without {name} an optimizer",
        ):
            HyperOptimizer([{"params": w, name: 0}], f"AdamW(0.1)[{name}] / SGD(0.2)")
    HyperOptimizer([{"params": w, "weight_decay": 0}], "AdamW(0.1)[weight_decay]")
    HyperOptimizer([{"params": w, "weight_decay": 0}], "AdamW[weight_decay: real] / SGD(0.2)")
    for value in ("fast", torch.ones(2)):
        with refused(ValueError, f"lr must be a number, not {value!r}"):
            HyperOptimizer([{"params": w, "lr": value}], "SGD(0.1)")


def test_a_refused_group_changes_nothing():
    w, more = weights((3,)), weights((4,))
    optimizer = HyperOptimizer(w, "SGD(0.1) / SGD(0.01)", compile=False)
    give_gradients(w, 0)
    optimizer.step()
    for bad in (
        {"params": more, "lrr": 1},
        {"params": more, "momentum": 0.9},  # SGD(0.1) has none
        {"params": [torch.zeros(3, dtype=torch.cfloat, requires_grad=True)]},
        {"params": [torch.zeros(3, device="meta", requires_grad=True)]},
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            optimizer.add_param_group(bad)
        assert "\n" not in str(caught.value)
        assert len(optimizer.param_groups) == 1
        give_gradients(w, 1)
        optimizer.step()
    optimizer.add_param_group({"params": more})
    give_gradients(w + more, 1)
    optimizer.step()
    assert len(optimizer.state_dict()["param_groups"]) == 2


def test_a_tuned_value_that_is_set_from_outside():
    for set_it in (
        lambda group: group.update(beta1=0.5),
        lambda group: group.update(betas=(0.5, 0.999)),
        lambda group: group["beta1"].fill_(0.5),
        lambda group: group["beta1"].mul_(0.5),
    ):
        w = weights((3,))
        optimizer = HyperOptimizer(w, "Adam(0.1)[beta1] / SGD(0.01)", compile=False)
        for t in range(2):
            give_gradients(w, t)
            optimizer.step()
        set_it(optimizer.param_groups[0])
        with refused(ValueError, "was set from outside", "SGD(0.01) moves it", "do not tune it"):
            optimizer.step()


def test_what_cannot_be_set_between_steps():
    w = weights((3,))
    optimizer = HyperOptimizer(w, "SGD(0.1)", compile=False)
    give_gradients(w, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = None
    with refused(ValueError, "lr was set to None in a param group; it must be a number"):
        optimizer.step()
    optimizer.param_groups[0].update(lr=0.1, momentum=0.9)
    with refused(ValueError, "momentum was 0 when the optimizer was made", "other than 0"):
        optimizer.step()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Adam(0.1) / SGD(0.1)", "Adam(0.1)"),
        ("Adam(0.1)", "Adam(0.1) / SGD(0.1)"),
        ("Adam(0.1)[lr] / SGD(0.1)", "Adam(0.1) / SGD(0.1)"),
        ("Adam(0.1)[lr: log] / SGD(0.1)", "Adam(0.1)[lr] / SGD(0.1)"),
        ("Adam(0.1)", "AdamW(0.1)"),
        ("SGD(0.1, momentum=0.9)", "SGD(0.1)"),
        ("SGD(0.1)", "SGD(0.1, momentum=0.9)"),
        ("SGD(0.1, weight_decay=0.1)", "SGD(0.1)"),
        ("Adam(0.1)", "Adam(0.1, weight_decay=0.1)"),
        ("SGD(0.1, momentum=0.9, nesterov=True)", "SGD(0.1, momentum=0.9)"),
        ("Adam(0.1, v0=1e-8)", "Adam(0.1)"),
        ("SGD(0.1) / Adam(0.1, weight_decay=0.1)", "SGD(0.1) / Adam(0.1)"),
        ("SGD(0.1) / SGD({lr: 0.1})", "SGD(0.1) / SGD(0.1)"),
    ],
)
def test_the_state_of_another_stack(theirs, ours):
    w, x = weights((3,)), weights((3,))
    optimizer = HyperOptimizer(w, theirs, compile=False)
    for t in range(2):
        give_gradients(w, t)
        optimizer.step()
    other = HyperOptimizer(x, ours, compile=False)
    before = other.snapshot()
    with refused(
        ValueError, "this is the state of the stack", str(parse(theirs)), str(parse(ours))
    ):
        other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.snapshot(), before)


def test_the_state_of_groups_with_other_hyperparameters():
    def made(**own) -> HyperOptimizer:
        return HyperOptimizer([{"params": weights((3,)), **own}], "SGD(0.1)", compile=False)

    with refused(ValueError, "SGD(0.1) with lr, momentum in its", "not of SGD(0.1) with lr"):
        made().load_state_dict(made(momentum=0.9).state_dict())
    with refused(ValueError, "SGD(0.1) with lr in its", "not of SGD(0.1) with lr, momentum"):
        made(momentum=0.9).load_state_dict(made().state_dict())


def test_the_state_of_the_same_stack_with_other_numbers_is_taken():
    w, x = weights((3,)), weights((3,))
    optimizer = HyperOptimizer(w, "Adam(0.1) / SGD(0.01)", compile=False)
    give_gradients(w, 0)
    optimizer.step()
    other = HyperOptimizer(x, "Adam(0.3) / SGD(0.2)", compile=False)
    other.load_state_dict(optimizer.state_dict())
    assert other.hyperparameters() == optimizer.hyperparameters()


def test_values_set_in_a_state_are_used():
    """As in torch.optim, where one goes on with another lr."""
    w = weights((3,))
    give_gradients(w, 0)
    for stack in ("Adam(0.1)", "Adam(0.1)[beta1] / SGD(0.01)"):
        optimizer = HyperOptimizer(w, stack, compile=False)
        optimizer.step()
        state = optimizer.state_dict()
        state["param_groups"][0]["lr"] = 0.001
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.001
        before = w[0].detach().clone()
        optimizer.step()
        assert (w[0] - before).abs().max() < 0.002
    state["param_groups"][0]["beta1"] = 0.5
    with refused(ValueError, "beta1 was set to 0.5 in this state, but SGD(0.01) moves it; make"):
        optimizer.load_state_dict(state)
    assert float(optimizer.param_groups[0]["beta1"]) != 0.5


@pytest.mark.parametrize("way", ["replaced", "cleared"])
def test_a_state_that_is_cleared_starts_anew(way):
    w, fresh = weights((3,), (2,)), weights((3,), (2,))
    stack = "Adam(0.1)[beta1] / SGD(0)"
    optimizer = HyperOptimizer(w, stack, compile=False)
    for t in range(3):
        give_gradients(w, t)
        optimizer.step()
    if way == "replaced":
        optimizer.state = collections.defaultdict(dict)
        assert float(optimizer.state[w[0]]["step"]) == 0
    else:
        optimizer.state.clear()
    with torch.no_grad():
        for p, q in zip(w, fresh, strict=True):
            q.copy_(p)
    other = HyperOptimizer(fresh, stack, compile=False)
    for t in range(3, 6):
        for params in (w, fresh):
            give_gradients(params, t)
            if t == 4:
                params[0].grad = None
        optimizer.step()
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(w, fresh, strict=True))


def test_a_state_of_names_that_are_taken_is_refused():
    class Taken(Rule, known=False):
        lr = Hyper(0.1)

        def init(self, w):
            return {"last_grad": torch.zeros_like(w)}

        def update(self, w, g, s, h):
            return w - h.lr * g, {"last_grad": g}

    with refused(ValueError, "Taken: its state cannot have the name 'last_grad'; taken are"):
        HyperOptimizer(weights((3,)), Taken() / SGD(0.1))


def test_rules_that_the_notation_does_not_know_are_resumed():
    class Own(Rule, known=False):
        """It starts from where the weights are, and has an option that no notation can write."""

        lr = Hyper(0.1)
        mode = Option("abs")

        def init(self, w):
            return {"start": w}

        def update(self, w, g, s, h):
            return w - h.lr * (g + w - s["start"]), s

    w, start = weights((3,), (2,)), weights((3,), (2,))
    optimizer = HyperOptimizer(w, Own(0.1, mode="sq") / SGD(0.01), compile=False)
    give_gradients(w, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for p, q in zip(w, start, strict=True):
        assert torch.equal(optimizer.state[p]["start"], q)
        assert p.grad is not None
        torch.testing.assert_close(p, q - 0.1 * p.grad)


def test_states_that_do_not_fit():
    def trained(stack: str, params: list, some: list[Tensor]) -> dict:
        optimizer = HyperOptimizer(params, stack, compile=False)
        for t in range(2):
            give_gradients(some, t)
            optimizer.step()
        some[-1].grad = None  # its last gradient is not in the state, what the rule keeps is
        optimizer.step()
        return optimizer.state_dict()

    stack = "Adam(0.1) / SGD(0.01)"
    other = HyperOptimizer(weights((3,), (4,)), stack, compile=False)
    for shapes, words in {
        ((3,),): ("[1]", "[2]"),
        ((3,), (4,), (5,)): ("[3]", "[2]"),
        ((3,), (5,)): ("shapes", "number 1", "(4,)", "(5,)"),
        ((2,), (4,)): ("shapes", "number 0", "(3,)", "(2,)"),
        ((3,), (2, 2)): ("shapes", "number 1", "(4,)", "(2, 2)"),
    }.items():
        w = weights(*shapes)
        with refused(ValueError, *words):
            other.load_state_dict(trained(stack, w, w))
    w = weights((3,), (4,))
    with refused(ValueError, "[1, 1]", "[2]"):
        other.load_state_dict(trained(stack, [{"params": p} for p in w], w))
    with refused(ValueError, "another optimizer", "HyperOptimizer"):
        other.load_state_dict(torch.optim.Adam(weights((3,), (4,))).state_dict())
    wrong: Any
    for wrong, found in ((None, "NoneType"), ({"param_groups": []}, "['param_groups']")):
        with refused(ValueError, "expected a dict with state and param_groups, found", found):
            other.load_state_dict(wrong)
    before, state = other.state_dict(), trained(stack, w, w)
    state["param_groups"][0]["eps"] = 0.7
    del state["state"][1]["exp_avg"]
    with refused(ValueError, "incomplete", "a parameter has no 'exp_avg'"):
        other.load_state_dict(state)
    state = trained(stack, w, w)
    state["state"][1]["exp_avg"] = torch.zeros(3, dtype=torch.float64)
    with refused(ValueError, "incomplete: number 1 has tensors of [4] and others"):
        other.load_state_dict(state)
    for name, where in (
        ("lr", lambda group: group),
        ("params", lambda group: group),
        ("on", lambda group: group["tower"]),
        ("steps", lambda group: group["tower"]["levels"][0]),
    ):
        state = trained(stack, w, w)
        del where(state["param_groups"][0])[name]
        with refused(ValueError, f"incomplete: it has no {name!r}"):
            other.load_state_dict(state)
    for name, value, sentence in (
        ("eps", "small", "eps is 'small' in this state; it must be a number"),
        (
            "weight_decay",
            0.1,
            "weight_decay is 0.1 in this state, but this optimizer was made with",
        ),
    ):
        state = trained(stack, w, w)
        state["param_groups"][0][name] = value
        with refused(ValueError, sentence):
            other.load_state_dict(state)
    state = trained(stack, w, w)
    del state["param_groups"][0]["tower"]["levels"][1]
    with refused(ValueError, "incomplete: it does not have all levels of Adam(0.1) / SGD(0.01)"):
        other.load_state_dict(state)
    assert str(other.state_dict()) == str(before)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compiler)])
def test_hypergradients_can_be_read(compile):
    """Baydin et al. 2018: that of SGD's lr is -<G_t, G_t-1>, on each level."""
    w = torch.randn(5).requires_grad_()
    optimizer = HyperOptimizer([w], "SGD(0.1) / SGD(0.01) / SGD(0.001)", compile=compile)
    last, lowest_last = torch.zeros(5), 0.0
    for t in range(4):
        give_gradients([w], t)
        g = w.grad.clone() if w.grad is not None else torch.zeros(5)
        optimizer.step()
        lowest, middle = optimizer.hypergradients().tolist()
        assert lowest == pytest.approx(-float(g @ last), rel=1e-5)
        assert middle == pytest.approx(-lowest * lowest_last, rel=1e-5)
        last, lowest_last = g, lowest
    assert optimizer.names[:2] == ("0.lr", "1.lr") and lowest_last != 0
    assert len(HyperOptimizer([w], "Adam(0.1)").hypergradients()) == 0


def replaced(optimizer: Any, w: Tensor) -> Tensor:
    """As where a tensor grows: another one goes on with the state of the first."""
    new = w.detach().clone().requires_grad_()
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(w)
    optimizer.state_dict()  # saved before there is a gradient
    return new


def rewrapped(optimizer: Any, w: Tensor) -> None:
    """As a framework does that moves states to a device, where they are already; then an edit."""
    optimizer.state[w] = dict(optimizer.state[w])
    optimizer.state_dict()
    optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)


@pytest.mark.parametrize(
    ("edit", "by_towers"),
    [
        (lambda optimizer, w: optimizer.state.pop(w), True),
        (lambda optimizer, w: optimizer.state.clear(), True),
        (lambda optimizer, w: optimizer.state.__setitem__(w, {}), True),
        (lambda optimizer, w: optimizer.state.__setitem__(w, dict(optimizer.state[w])), True),
        (lambda optimizer, w: optimizer.state[w]["momentum_buffer"].mul_(0.5), False),
        (
            lambda optimizer, w: optimizer.state[w].update(momentum_buffer=torch.ones(w.shape)),
            False,
        ),
        (lambda optimizer, w: optimizer.state.update({w: {"momentum_buffer": w * 2}}), False),
        (replaced, False),
        (rewrapped, False),
    ],
)
def test_edits_of_the_state_hold_as_in_torch(edit, by_towers):
    """A tower shows what the rule read at the last step, and not what it went on with."""
    stacks = ["SGD(0.1, momentum=0.9)", "SGD(0.1, momentum=0.9) / SGD(0.0)"][: 1 + by_towers]

    def ours(stack: str) -> Any:
        return lambda params: HyperOptimizer(params, stack, compile=False)

    ends = []
    for make in (lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), *map(ours, stacks)):
        w = weights((3,), (2, 2))
        optimizer = make(w)
        for t in range(6):
            if t == 3:
                new = edit(optimizer, w[0])
                w = [new, w[1]] if isinstance(new, Tensor) and new.requires_grad else w
            give_gradients(w, t)
            optimizer.step()
            if t == 4 and not isinstance(optimizer, torch.optim.SGD):  # saved and loaded
                again = make(w)
                again.load_state_dict(optimizer.state_dict())
                optimizer = again
        ends.append(w)
    for end in ends[1:]:
        for a, b in zip(end, ends[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_state_that_the_rule_cannot_use_is_refused():
    w = weights((3,))
    for wrong, words in (
        ({"step": torch.tensor(1.0), "exp_avg": torch.zeros(4)}, "'exp_avg' of [4] was put into"),
        ({"step": torch.tensor(1.0)}, "'exp_avg' is missing in the state"),
    ):
        optimizer = HyperOptimizer(w, "Adam(0.1)", compile=False)
        give_gradients(w, 0)
        optimizer.step()
        optimizer.state[w[0]] = wrong
        with refused(ValueError, words, "Adam needs step of [], exp_avg of [3], exp_avg_sq of"):
            optimizer.step()


def test_a_replaced_param_group_dict_is_used():
    moved = []
    for make in (lambda p: torch.optim.SGD(p, 0.1), lambda p: HyperOptimizer(p, "SGD(0.1)")):
        (w,) = weights((3,))
        optimizer = make([w])
        for change in (
            lambda groups: groups,
            lambda groups: [{**group, "lr": 10.0} for group in groups],
            lambda groups: [*groups],
        ):
            optimizer.param_groups = change(optimizer.param_groups)
            w.grad = torch.ones(3)
            optimizer.step()
            optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 1.0}
            optimizer.step()
        moved.append(w.detach())
    assert torch.allclose(moved[0], moved[1])
    tuned = HyperOptimizer([w], "SGD(0.1, momentum=0.5) / SGD(0.1)", compile=False)
    tuned.param_groups = [{**group, "momentum": 0.6} for group in tuned.param_groups]
    with refused(ValueError, "momentum was set from outside"):
        tuned.step()


def rule(**members: Any) -> type[Rule]:
    """A rule that is SGD but for what is given."""
    own = {"lr": Hyper(0.1), "update": lambda self, w, g, s, h: (w - h.lr * g, s)}
    return type("Own", (Rule,), {**own, **members}, known=False)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"init": lambda self, w: {"n": torch.tensor(0)}}, "'n' must be a floating-point tensor"),
        ({"init": lambda self, w: {"m": torch.zeros(7)}}, "0-dim, not torch.float32 of [7] for 3"),
        ({"init": lambda self, w: {"last_grad": w}}, "cannot have the name 'last_grad'"),
        (
            {"update": lambda self, w, g, s, h: w - g},
            "of no entries, as a tuple of two",
        ),
        ({"update": lambda self, w, g, s, h: (w - g, {"m": w})}, "[3] and a state of 'm'"),
        ({"update": lambda self, w, g, s, h: ((w - g).sum(), s)}, "not weights of [] for those"),
    ],
)
def test_a_rule_is_tried_out(members, words):
    with refused(ValueError, "Own: ", words):
        HyperOptimizer(weights((3,)), rule(**members)(0.1))


def test_a_rule_has_only_declared_attributes():
    for name in ("every", "trust", "name", "update"):
        with refused(TypeError, f"Own: a hyperparameter or option cannot be called {name!r}"):
            rule(**{name: Hyper(0.1)})
    single = rule()(0.1)
    single.warmup = 10  # type: ignore[attr-defined]
    with refused(TypeError, "Own: warmup is an attribute of this one object", "warmup = Option("):
        HyperOptimizer(weights((3,)), single)
    with refused(TypeError, "there is a rule Adam already", "known=False"):
        type("Adam", (Rule,), {"lr": Hyper(0.1)})


def test_a_domain_of_ones_own_is_known_by_its_name():
    try:
        soft = Domain("soft", torch.nn.functional.softplus, lambda h: math.log(math.expm1(h)), 0.0)
        stack = SGD(0.5)["lr: soft"] / SGD(0.1)
        assert stack.levels[0].tuned["lr"].domain is soft
        assert copy.deepcopy(stack) == stack == parse(str(stack))
        (w,) = weights((3,))
        optimizer = HyperOptimizer([w], stack, compile=False)
        assert optimizer.hyperparameters()[0]["lr"] == pytest.approx(0.5)
    finally:
        DOMAINS.pop("soft", None)
    with refused(ValueError, "no domain 'soft'", "import the module that makes it"):
        copy.deepcopy(soft)
    with refused(ValueError, "there is a domain 'log' already"):
        Domain("log", torch.exp, math.log)


# The time of an error.


def not_elementwise() -> Any:
    return rule(update=lambda self, w, g, s, h: (w - h.lr * g.norm(), s, 1))(0.1)


@pytest.mark.parametrize(
    ("stack", "group"),
    [
        ("Adma(0.1)", {}),
        ("SGD(0.1, nesterov=True)", {}),
        ("SGD(0.1) / SGD(0.1)[lr: per tensor] / SGD(0.1)", {}),
        (not_elementwise, {}),
        ("AdamW(0.1)", {"weigth_decay": 0.1}),
        ("AdamW(0.1)", {"maximize": True}),
        ("Adam(0.1, amsgrad=True)", {"amsgrad": False}),
        ("AdamW(0.1)", {"betas": (0.9,)}),
        ("Adam(0.1)[lr: log] / SGD(0.1)", {"lr": 0}),
        ("Adam(0.1)[lr: log] / SGD(0.1)", {"initial_lr": 0}),
        ("SGD(0.1)", {"params": [torch.ones(2, dtype=torch.float16).to_sparse().requires_grad_()]}),
        ("SGD(0.1)", {"params": [torch.ones(2).to(torch.float8_e5m2).requires_grad_()]}),
    ],
)
def test_known_mistakes_are_errors_at_construction(stack, group):
    stack = stack() if callable(stack) else stack
    with pytest.raises((ValueError, TypeError)) as caught:
        HyperOptimizer([{"params": weights((3,)), **group}], stack)
    assert "\n" not in str(caught.value)
    if group and "params" not in group:  # and when a group is added
        optimizer = HyperOptimizer(weights((3,)), stack)
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group({"params": weights((3,)), **group})


def sparse_gradient(optimizer: Any, w: list[Tensor]) -> None:
    w[0].grad = torch.zeros(3).to_sparse()


def thawed_elsewhere(optimizer: Any, w: list[Tensor]) -> None:
    optimizer.add_param_group({"params": [torch.zeros(2, device="meta")]})
    p = optimizer.param_groups[-1]["params"][0]
    p.grad = torch.zeros_like(p)


def reshaped(optimizer: Any, w: list[Tensor]) -> None:
    w[0].grad, w[0].data = None, torch.ones(5)
    w[0].grad = torch.ones(5)


@pytest.mark.parametrize(
    "change",
    [
        sparse_gradient,
        thawed_elsewhere,
        reshaped,
        lambda optimizer, w: optimizer.param_groups.pop(),
        lambda optimizer, w: optimizer.param_groups.append({"params": weights((2,))}),
        lambda optimizer, w: optimizer.param_groups[0].update(momentum=0.1),
        lambda optimizer, w: optimizer.param_groups[0].update(weight_decay=0.1),
        lambda optimizer, w: optimizer.param_groups[0].update(lr="fast"),
        lambda optimizer, w: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
        lambda optimizer, w: optimizer.state[w[0]].update(momentum_buffer=torch.ones(7)),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_later_mistakes_are_errors_in_the_next_step_and_change_nothing(change, steps):
    """Each case changes a valid optimizer in a way that no earlier check can see."""
    if change is reshaped and not steps:
        pytest.skip("nothing is kept of the old shape yet")
    w = weights((3,), (4,))
    groups = [{"params": w[:1]}, {"params": w[1:]}]
    optimizer = HyperOptimizer(groups, "SGD(0.1, momentum=0.9) / SGD(0.1)", compile=False)
    for t in range(steps):
        give_gradients(w, t)
        optimizer.step()
    give_gradients(w, 9)
    change(optimizer, w)
    before = [p.detach().clone() for p in w]
    for _ in range(2):  # it stays an error
        with pytest.raises((ValueError, TypeError)) as caught:
            optimizer.step()
        assert "\n" not in str(caught.value)
    assert all(map(torch.equal, w, before))


def test_a_warning_is_given_once_with_the_users_line_and_a_category():
    def branches(self: Any, w: Tensor, g: Tensor, s: Any, h: Any) -> Any:
        return (w - h.lr * g if g.sum() > 0 else w + h.lr * g), s

    kind = rule(update=branches)
    w = weights((3,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(3):
            optimizer = HyperOptimizer(w, kind(0.1), compile=True)
            give_gradients(w, t)
            optimizer.step()
    own = [one for one in caught if issubclass(one.category, HyperoptWarning)]
    assert len(own) == 1 and own[0].filename == __file__
    assert "could not be compiled" in str(own[0].message)
