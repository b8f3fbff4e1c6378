"""Rules that are not elementwise, separate stacks for param groups, and scopes per element."""

import copy
import io
import itertools
import pickle
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from hyperopt import RULES, SGD, HyperOptimizer, Muon, Rule, algorithm, parse, split_matrices

SHAPES = ((6, 4), (4, 6), (5, 5))
MIXED = ((6, 4), (7,), (), (2, 3, 4))


def trained(make, steps=30, shapes=SHAPES, dtype=torch.float64):
    """Parameters after some steps on noisy quadratics."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    optimizer = make(params)
    for _ in range(steps):
        for p in params:
            p.grad = p.detach() + torch.randn(p.shape, generator=generator, dtype=dtype) / 3
        optimizer.step()
    return [p.detach() for p in params]


def assert_equal(ours, theirs, tolerance=1e-9):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


# Height 0 computes what torch.optim computes.

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon yet")


@needs_muon
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(adjust, nesterov):
    options = f"0.02, 0.1, 0.9, nesterov={nesterov}, adjust_lr_fn={adjust}"
    # Torch rounds to bfloat16; without that, equal to the last digits says more.
    with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor.clone()):
        theirs = trained(
            lambda params: torch.optim.Muon(
                params, 0.02, 0.1, 0.9, nesterov=nesterov, adjust_lr_fn=adjust
            )
        )
    ours = trained(lambda params: HyperOptimizer(params, f"Muon({options}, bfloat16=False)"))
    assert_equal(ours, theirs)


@needs_muon
def test_muon_in_bfloat16_is_torchs_to_its_rounding():
    theirs = trained(lambda params: torch.optim.Muon(params, 0.02), 1, dtype=torch.float32)
    ours = trained(lambda params: HyperOptimizer(params, "Muon(0.02)"), 1, dtype=torch.float32)
    precise = trained(
        lambda params: HyperOptimizer(params, "Muon(0.02, bfloat16=False)"), 1, dtype=torch.float32
    )
    assert_equal(ours, theirs, 1e-6)
    with pytest.raises(AssertionError):
        assert_equal(precise, theirs, 1e-6)


@pytest.mark.parametrize("eps1", [None, 1e-3])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compiler)])
def test_adafactor_is_torchs(compile, eps1):
    stack = f"Adafactor(0.3, weight_decay=0.1, d=1.5, eps1={eps1 or 0.0})"
    theirs = trained(
        lambda params: torch.optim.Adafactor(
            params, 0.3, weight_decay=0.1, d=1.5, eps=(eps1, 1e-3)
        ),
        shapes=MIXED,
    )
    ours = trained(lambda params: HyperOptimizer(params, stack, compile=compile), shapes=MIXED)
    assert_equal(ours, theirs)


class AuthorsSOAP:
    """SOAP as its authors' code has it, for matrices (github.com/nikhilvyas/SOAP).

    But eps is added as in Adam: their code adds it to the moment before its bias is corrected.
    """

    def __init__(self, params, lr, betas, eps, weight_decay, frequency):
        self.params, self.lr, self.betas, self.eps = params, lr, betas, eps
        self.weight_decay, self.frequency = weight_decay, frequency
        self.state: list[dict[str, Any]] = [{} for _ in params]

    def step(self):
        for p, s in zip(self.params, self.state, strict=True):
            self.move(p.data, p.grad, s)

    def move(self, p, grad, s):
        b1, b2 = self.betas
        if not s:
            s |= {"step": 0, "M": torch.zeros_like(p), "V": torch.zeros_like(p)}
            # To the last bit: the larger one has null vectors, and any of these are eigenvectors.
            s["GG"] = [torch.zeros_like(m).lerp(m, 1 - b2) for m in (grad @ grad.T, grad.T @ grad)]
            s["Q"] = [torch.linalg.eigh(m)[1].flip(1) for m in s["GG"]]
            return
        s["step"] += 1
        left, right = s["Q"]
        projected = left.T @ grad @ right
        s["M"] = b1 * s["M"] + (1 - b1) * grad  # Algorithm 3: in the space of the weights
        s["V"] = b2 * s["V"] + (1 - b2) * projected**2
        m, v = left.T @ s["M"] @ right / (1 - b1 ** s["step"]), s["V"] / (1 - b2 ** s["step"])
        p.sub_(self.lr * left @ (m / (v.sqrt() + self.eps)) @ right.T)
        p.sub_(self.lr * self.weight_decay * p)
        s["GG"][0].lerp_(grad @ grad.T, 1 - b2)
        s["GG"][1].lerp_(grad.T @ grad, 1 - b2)
        if s["step"] % self.frequency == 0:
            for i, (m, q) in enumerate(zip(s["GG"], s["Q"], strict=True)):
                order = torch.argsort(torch.diag(q.T @ m @ q), descending=True)
                s["V"] = s["V"].index_select(i, order)
                s["Q"][i] = torch.linalg.qr(m @ q[:, order])[0]


SOAP_3 = "SOAP(0.02, betas=(0.9, 0.8), eps=1e-3, weight_decay=0.1, precondition_frequency=3)"


def test_soap_is_its_authors():
    theirs = trained(lambda params: AuthorsSOAP(params, 0.02, (0.9, 0.8), 1e-3, 0.1, 3))
    assert_equal(trained(lambda params: HyperOptimizer(params, SOAP_3)), theirs)


def test_soap_in_the_axes_is_adam():
    """Diagonal gradients have the axes as eigenvectors. SOAP is Adam, one step late."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.ones(4, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    soap = HyperOptimizer([p], "SOAP(0.02, eps=1e-3, weight_decay=0, precondition_frequency=2)")
    adam = torch.optim.Adam([q], 0.02, betas=(0.95, 0.95), eps=1e-3)
    for t in range(12):
        p.grad = torch.randn(4, generator=generator, dtype=torch.float64).diag()
        q.grad = p.grad.clone()
        soap.step()
        if t:
            adam.step()
    assert_equal([p.detach()], [q.detach()], 1e-12)
    assert not torch.equal(p, torch.ones_like(p))


def test_soap_turns_with_its_rows_and_columns():
    """Weights and gradients in other orthogonal axes take the same path in those axes."""
    generator = torch.Generator().manual_seed(0)
    u, v, w = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    p, q = w.clone().requires_grad_(), (u @ w @ v.T).requires_grad_()
    optimizers = [HyperOptimizer([x], f"{SOAP_3} / SGD(1e-4)") for x in (p, q)]
    adams = [HyperOptimizer([x.detach().clone().requires_grad_()], "Adam(0.02)") for x in (p, q)]
    for _ in range(20):
        p.grad = p.detach() + torch.randn(5, 5, generator=generator, dtype=torch.float64) / 3
        q.grad = u @ p.grad @ v.T
        for optimizer, adam, x in zip(optimizers, adams, (p, q), strict=True):
            adam.param_groups[0]["params"][0].grad = x.grad.clone()
            optimizer.step()
            adam.step()
    assert_equal([q.detach()], [u @ p.detach() @ v.T])
    assert_equal([optimizers[0].snapshot()], [optimizers[1].snapshot()])
    first, second = (adam.param_groups[0]["params"][0].detach() for adam in adams)
    assert (second - u @ first @ v.T).abs().max() > 0.01


@pytest.mark.parametrize("stack", ["SOAP(0.02)", "SOAP(0.02)[lr: log] / SGD(0.1)"])
@pytest.mark.parametrize("when", [0, 3])
def test_soap_and_a_gradient_that_is_not_finite(stack, when):
    """As in torch.optim it spreads to the weights; under a tower the step is left out."""
    p = torch.ones(3, 2, requires_grad=True)
    optimizer = HyperOptimizer([p], stack)
    for t in range(25):
        p.grad = torch.full_like(p, torch.nan) if t == when else torch.randn(3, 2)
        optimizer.step()
    assert bool(p.isfinite().all()) == ("/" in stack)


@pytest.mark.parametrize("name", ["Muon", "SOAP"])
def test_matrices_resume_bit_for_bit(name):
    shapes, runs = [(6, 4), (3, 5)], {}
    for stop in (None, 7):
        torch.manual_seed(0)
        params = [torch.randn(shape).requires_grad_() for shape in shapes]
        optimizer = HyperOptimizer(params, f"{SHAPED[name]} / Adam(0.01, horizon=3) / SGD(1e-4)")
        for t in range(14):
            if t == stop:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                params = [p.detach().clone().requires_grad_() for p in params]
                optimizer = HyperOptimizer(params, optimizer.stack)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            for p in params:
                p.grad = p.detach() + torch.randn(p.shape) / 3
            optimizer.step()
        runs[stop] = [*(p.detach() for p in params), optimizer.snapshot()]
    assert_equal(runs[7], runs[None], 0)


# Hypergradients.

SHAPED = {
    "Muon": "Muon(0.05, 0.1, 0.6, bfloat16=False)[lr: log, weight_decay, momentum]",
    "Adafactor": "Adafactor(0.3, -0.5, d=1.1, weight_decay=0.1)"
    "[lr: log, beta2_decay, d, weight_decay]",
    "SOAP": "SOAP(0.05, 0.6, 0.8, weight_decay=0.1, precondition_frequency=2)"
    "[lr: log, beta1, beta2, weight_decay]",
}


def test_all_of_them_are_here():
    assert SHAPED.keys() == {name for name, rule in RULES.items() if not rule.elementwise}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_hypergradients_are_differences(name, shape):
    (rule, _) = parse(f"{SHAPED[name]} / SGD(0.0)").levels
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = HyperOptimizer([w], f"{rule} / SGD(0.0)", compile=False)
    state, before = rule.init(w.detach()), None
    for t in range(5):
        g = torch.randn(shape, generator=generator, dtype=torch.float64) + w.detach()
        w.grad = g.clone()
        if before is not None:
            names = dict(zip(optimizer.names, itertools.repeat(None), strict=False))
            expected = [difference(rule, before, g, n) for n in rule.tuned]
        last, state_before = (w.detach().clone(), g), state
        optimizer.step()
        values = {n: torch.tensor(x, dtype=torch.float64) for n, x in rule.values.items()}
        state = rule.update(*last, state, SimpleNamespace(**values))[1]
        if before is not None:
            found = optimizer.hypergradients().tolist()
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), (t, list(names))
            assert any(found) or torch.equal(before[0], last[0])  # SOAP's first update
        before = (*last, state_before)


def difference(rule, before, g, name):
    """How the loss changes with a raw value of the last update, by central differences."""
    domain, values = rule.tuned[name].domain, rule.values

    def loss(d):
        raw = torch.tensor(domain.raw(values[name]) + d, dtype=torch.float64)
        h = {n: torch.tensor(x, dtype=torch.float64) for n, x in values.items()}
        h[name] = domain.value(raw)
        w, last_g, state = before
        return float((g * rule.update(w, last_g, state, SimpleNamespace(**h))[0]).sum())

    return (loss(1e-5) - loss(-1e-5)) / 2e-5


def flat(rule, shape):
    """The same rule on a vector, as the definition has it."""
    kind: Any = type(rule)

    class Flat(kind, known=False):  # type: ignore[call-arg]
        elementwise, ndim = True, None

        def init(self, w):
            return kind.init(self, w.view(shape))

        def update(self, w, g, s, h):
            new, after = kind.update(self, w.view(shape), g.view(shape), s, h)
            return new.reshape(-1), after

    twin = object.__new__(Flat)
    twin.__dict__.update(rule.__dict__)
    return twin


ABOVE = ["SGD(1e-3)", "SGD(1e-3) / SGD(1e-5)", "AdaGrad(0.1, horizon=inf, normalize=True)"]
ABOVE += ["Adam(0.01, horizon=3) / SGD(1e-4)", "SGD(1e-3, surrogate=True) / SGD(1e-4)"]


@pytest.mark.parametrize("above", ABOVE)
@pytest.mark.parametrize("name", SHAPED)
def test_towers_are_those_of_the_definition(name, above):
    lowest = SHAPED[name]
    if "normalize" in above:  # rounding noise, such as that of momentum, is not in the definition
        lowest = lowest.partition("[")[0] + "[lr: log]"
    shape, stack = (4, 3), parse(f"{lowest} / {above}")
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(12, generator=generator, dtype=torch.float64)
    p = nn.Parameter(w.view(shape).clone())
    optimizer = HyperOptimizer([p], stack, compile=False)
    levels = algorithm.start(type(stack)(flat(stack.levels[0], shape), *stack.levels[1:]), w)
    for t in range(12):
        g = w + torch.randn(12, generator=generator, dtype=torch.float64) / 3
        p.grad = g.view(shape) / (0 if t == 6 else 1)
        optimizer.step()
        if t == 6:
            levels = algorithm.skip(levels)
        else:
            w, levels = algorithm.step(levels, w, g)
        torch.testing.assert_close(p.detach().reshape(-1), w, rtol=1e-11, atol=1e-11)


@pytest.mark.compiler
def test_a_compiled_tower_of_adafactor():
    stack = f"{SHAPED['Adafactor']} / Adam(0.01) / SGD(1e-4)"
    runs = [trained(lambda p, c=c: HyperOptimizer(p, stack, compile=c), 12, MIXED) for c in (0, 1)]
    assert_equal(*runs)


def test_unsupported_features_are_refused_at_once():
    with pytest.raises(ValueError, match=r"Muon moves parameters of 2 dimensions.*shape \[3\]"):
        HyperOptimizer([torch.ones(3, requires_grad=True)], "Muon(0.1)")
    with pytest.raises(ValueError, match="can be the lowest level only"):
        parse("Adam(0.1) / Muon(0.1)")
    with pytest.raises(ValueError, match="adjust_lr_fn cannot be 'orig'; did you mean 'original'"):
        parse("Muon(0.1, adjust_lr_fn=orig)")
    stack = parse("Muon(0.02, adjust_lr_fn=match_rms_adamw, ns_coefficients=(2.0, -1.5, 0.5))")
    assert parse(str(stack)) == stack


def test_vectors_keep_no_gradient_of_the_last_step():
    """An update that costs matrix products is made once: its derivatives are kept."""
    calls = []

    class Counted(Muon, known=False):
        def update(self, w, g, s, h):
            calls.append(w.shape)
            return super().update(w, g, s, h)

    p = torch.randn(4, 3, requires_grad=True)
    optimizer = HyperOptimizer([p], Counted(0.02)["lr"] / SGD(1e-4), compile=False)
    for _ in range(3):
        p.grad = torch.ones(4, 3)
        calls.clear()
        optimizer.step()
        assert len(calls) == 1
    assert sorted(optimizer.state[p]) == ["momentum_buffer", "sensitivity_lr"]


# A separate stack for each param group.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(9, 6), nn.Linear(6, 8)
        self.norm, self.middle, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.tanh(self.hidden(self.embed(x)))
        return self.head(torch.tanh(self.middle(self.norm(hidden))))


STACKS = ("Muon(0.02)[lr] / SGD(1e-3)", "AdamW(0.003) / SGD(1e-4) / SGD(1e-6)")
X, Y = torch.arange(36) % 9, torch.arange(36) % 3


def made(compile=False):
    torch.manual_seed(0)
    net = Net()
    hidden, rest = split_matrices(net)
    groups = [{"params": p, "stack": s} for p, s in zip((hidden, rest), STACKS, strict=True)]
    return net, HyperOptimizer(groups, compile=compile)


def train(net, *optimizers, steps=5, scheduler=None):
    for _ in range(steps):
        net.zero_grad()
        nn.functional.cross_entropy(net(X), Y).backward()
        for optimizer in optimizers:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in net.parameters()]


def test_the_usual_rule():
    hidden, rest = split_matrices(Net())
    assert [name for name, _ in hidden] == ["hidden.weight", "middle.weight"]
    assert len(hidden) + len(rest) == len([*Net().parameters()])
    net = Net()
    hidden, _ = split_matrices(net, head=net.hidden)
    assert [name for name, _ in hidden] == ["middle.weight", "head.weight"]
    net.head = nn.Linear(6, 9)
    net.head.weight = net.embed.weight
    assert "head.weight" not in [name for name, _ in split_matrices(net)[0]]


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compiler)])
def test_two_stacks_are_two_optimizers(compile):
    net, optimizer = made(compile)
    other = copy.deepcopy(net)
    parts = split_matrices(other)
    apart = [HyperOptimizer(p, s, compile=compile) for p, s in zip(parts, STACKS, strict=True)]
    assert_equal(train(net, optimizer), train(other, *apart), 0)
    values = optimizer.hyperparameters()
    for i, one in enumerate(apart):
        for level, own in enumerate(one.hyperparameters()):
            for name, value in own.items():
                assert values[level][f"{name}[{i}]"] == value
    names, numbers = optimizer.names, optimizer.snapshot().tolist()
    assert len(names) == len({*names}) == len(numbers)
    assert numbers[names.index("0.lr[1]")] == values[0]["lr[1]"]
    tuned = dict(zip(names, optimizer.hypergradients().tolist(), strict=False))
    assert [*tuned] == ["0.lr[0]", "0.lr[1]", "0.beta1[1]", "0.beta2[1]", "1.lr[1]"]
    assert tuned["0.lr[0]"] == float(apart[0].hypergradients()[0])
    assert tuned["1.lr[1]"] == float(apart[1].hypergradients()[-1])
    assert optimizer.skipped == [0, 0, 0]
    assert [str(stack) for stack in optimizer.stacks] == [*map(str, map(parse, STACKS))]


def test_one_state_dict_copy_and_pickle_go_on_bit_for_bit():
    net, optimizer = made()
    train(net, optimizer)
    for p in net.parameters():
        optimizer.state[p]["mine"] = 3
    optimizer.state["key"] = {"a": 1}
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    copies = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    expected = train(net, optimizer)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh = made()
    fresh[0].load_state_dict(weights)
    fresh[1].load_state_dict(state)
    for other in (*copies, fresh):
        assert_equal(train(*other), expected, 0)
        assert other[1].state["key"] == {"a": 1}
        assert all(other[1].state[p]["mine"] == 3 for p in other[0].parameters())


def test_a_state_of_other_stacks_is_refused_and_changes_nothing():
    net, optimizer = made()
    train(net, optimizer)
    other = HyperOptimizer(
        [{"params": [p], "stack": "SGD(0.1)"} for p in net.parameters()], compile=False
    )
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="stacks"):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_schedulers_and_groups_that_come_later():
    net, optimizer = made()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    train(net, optimizer, steps=1, scheduler=scheduler)
    values = optimizer.hyperparameters()[0]
    for i in (0, 1):
        assert values[f"effective_lr[{i}]"] == pytest.approx(values[f"lr[{i}]"])
    train(net, optimizer, steps=2, scheduler=scheduler)
    values = optimizer.hyperparameters()[0]
    for i in (0, 1):
        assert values[f"effective_lr[{i}]"] == pytest.approx(values[f"lr[{i}]"] / 2)
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="has the stack SGD"):
        optimizer.add_param_group({"params": [("new", p)], "stack": "SGD(0.1)"})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": [("new", p)], "stack": STACKS[1], "lr": 0.25})
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.hyperparameters()[0]["lr[2]"] == pytest.approx(0.25)
    assert (p != 0).all()


def test_missing_or_late_stacks_are_refused():
    net = Net()
    with pytest.raises(ValueError, match="no stack was given"):
        HyperOptimizer(net.parameters())
    hidden, rest = split_matrices(net)
    with pytest.raises(ValueError, match="has no stack"):
        HyperOptimizer([{"params": hidden, "stack": "Muon(0.1)"}, {"params": rest}])
    HyperOptimizer([{"params": hidden, "stack": "Muon(0.1)"}, {"params": rest}], "AdamW(1e-3)")
    optimizer = HyperOptimizer(net.head.parameters(), "AdamW(1e-3)")
    with pytest.raises(ValueError, match="give groups with their own stacks to the constructor"):
        optimizer.add_param_group({"params": [net.hidden.weight], "stack": "Muon(0.1)"})


# One value for each weight.


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compiler)])
@pytest.mark.parametrize("domain", ["real", "log"])
def test_an_lr_per_weight_matches_the_literature(compile, domain):
    """Almeida et al. 1999 and Baydin et al. 2018 per weight; Sutton's IDBD (1992) moves log lr."""
    stack = f"SGD(0.1)[lr: {domain} per element] / SGD(1e-3)"
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(7, generator=generator, dtype=torch.float64)
    p = nn.Parameter(w.clone())
    optimizer = HyperOptimizer([p], stack, compile=compile)
    lr, last = torch.full_like(w, 0.1), torch.zeros_like(w)
    for _ in range(20):
        g = w * torch.arange(1, 8) + torch.randn(7, generator=generator, dtype=torch.float64)
        p.grad = g.clone()
        optimizer.step()
        # With w' = w - lr g: dL/dlr = - g' g, and dL/dlog lr = - lr g' g.
        lr = lr + 1e-3 * g * last if domain == "real" else lr * (1e-3 * lr * g * last).exp()
        w, last = w - lr * g, g
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
    assert "0.lr" not in optimizer.names and "1.lr" in optimizer.names


PER_ELEMENT = [
    "SGD(0.05, momentum=0.5)[lr: log per element, momentum: per element] / Adam(0.01)",
    "Adam(0.05)[lr: per element] / SGD(1e-3, 0.5) / SGD(1e-4)",
    "RMSProp(0.05)[lr: square from 0.04 to 0.06 per element] / SGD(0.1, 0.5) / Adam(0.01) / SGD(1)",
]


@pytest.mark.parametrize("stack", PER_ELEMENT)
def test_towers_above_are_those_of_the_definition(stack):
    sizes = (3, 1, 4)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, generator=generator, dtype=torch.float64)
    params = [nn.Parameter(part.clone()) for part in w.split(sizes)]
    optimizer = HyperOptimizer(params, stack, compile=False)
    levels = algorithm.start(parse(stack), w, [i for i, n in enumerate(sizes) for _ in range(n)])
    for _ in range(15):
        g = w + torch.randn(8, generator=generator, dtype=torch.float64) / 3
        for p, part in zip(params, g.split(sizes), strict=True):
            p.grad = part.clone()
        optimizer.step()
        w, levels = algorithm.step(levels, w, g)
        ours = torch.cat([p.detach() for p in params])
        torch.testing.assert_close(ours, w, rtol=1e-11, atol=1e-11)


def test_per_element_resumes_is_scaled_and_copied():
    stack = "Adam(0.05)[lr: log per element] / Adam(0.01) / SGD(1e-3)"
    net = Net()
    optimizer = HyperOptimizer(net.parameters(), stack)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 8)
    train(net, optimizer, steps=4, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    other = copy.deepcopy(net)
    fresh = HyperOptimizer(other.parameters(), stack)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    both = copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))
    expected = train(net, optimizer)
    for one in (*both, (other, fresh)):
        assert_equal(train(*one), expected, 0)
    optimizer.param_groups[0]["lr"] = 0.0
    assert_equal(train(net, optimizer), expected, 0)
    shapes = [value.shape for value in optimizer.state[net.norm.weight].values() if value.ndim]
    assert len(shapes) == 2 + 2 + 2  # of Adam, its lr and slope, and of the Adam above


def test_an_infinite_gradient_keeps_its_element():
    p = torch.ones(3, requires_grad=True)
    optimizer = HyperOptimizer([p], "SGD(0.1)[lr: log per element] / SGD(0.1)")
    for _ in range(3):
        p.grad = torch.tensor([1.0, float("inf"), 1.0])
        optimizer.step()
    assert p.isfinite().all() and p[1] == 1 and p[0] < 1


@pytest.mark.parametrize(
    "stack, why",
    [
        ("SGD(0.1, 0.9)[lr: log per element, momentum] / SGD(1)", "all have to be, but momentum"),
        ("SGD(0.1)[lr: per element] / SGD(1, horizon=3)", "horizon is not for"),
        ("SGD(0.1)[lr: per element] / SGD({lr: 0.1})", "must be one number"),
        ("SGD(0)[lr: per element] / SGD(1)", "start above 0"),
        ("Muon(0.1)[lr: per element] / SGD(1)", "is not elementwise"),
    ],
)
def test_unsupported_per_element_options_are_refused_at_once(stack, why):
    with pytest.raises(ValueError, match=why):
        HyperOptimizer([torch.ones(3, 3, requires_grad=True)], stack)


def test_rules_state_their_requirements():
    assert Rule.elementwise and Rule.ndim is None
    assert all(rule.example().ndim in (1, rule.ndim or 2) for rule in (R() for R in RULES.values()))
