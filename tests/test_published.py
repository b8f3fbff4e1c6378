"""Every tower of Table 1 gives the results of the published package.

`gradient-descent-the-ultimate-optimizer` 1.0, by the authors of Chandra et al. (2022), has other
constants than torch.optim, which the stacks here name.
"""

import gradient_descent_the_ultimate_optimizer.gdtuo as published
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperopt import HyperOptimizer

ADAM, ADAGRAD, RMSPROP = (
    "v0=1e-8",
    "initial_accumulator_value=0.1, eps_inside=True",
    "eps_inside=True",
)
ABOVE_SGD = {
    "SGD(0.01)": lambda: published.SGD(0.01),
    f"Adam(0.1, {ADAM})": lambda: published.Adam(0.1),
    f"AdaGrad(0.01, {ADAGRAD})": lambda: published.AdaGrad(0.01),
    f"RMSProp(0.1, {RMSPROP})": lambda: published.RMSProp(0.1),
}
ABOVE_ADAM = {
    "SGD(1e-5)": lambda: published.SGD(1e-5),
    f"Adam(0.001, {ADAM})": lambda: published.Adam(0.001),
}
ABOVE_RMSPROP = {
    "SGD(1e-4)": lambda: published.SGD(1e-4),
    f"RMSProp(1e-4, {RMSPROP})": lambda: published.RMSProp(1e-4),
}
TOWERS = {
    **{f"SGD(0.01) / {top}": (published.SGD, 0.01, make) for top, make in ABOVE_SGD.items()},
    **{
        f"Adam(0.001, {ADAM}){subset} / {top}": (rule, 0.001, make)
        for subset, rule in {"": published.Adam, "[lr]": published.AdamBaydin}.items()
        for top, make in ABOVE_ADAM.items()
    },
    f"AdaGrad(0.01, {ADAGRAD}) / SGD(0.01)": (
        published.AdaGrad,
        0.01,
        lambda: published.SGD(0.01),
    ),
    f"AdaGrad(0.01, {ADAGRAD}) / AdaGrad(0.01, {ADAGRAD})": (
        published.AdaGrad,
        0.01,
        lambda: published.AdaGrad(0.01),
    ),
    **{
        f"RMSProp(0.01, {RMSPROP}){subset} / {top}": (rule, 0.01, make)
        for subset, rule in {"": published.RMSProp, "[lr]": published.RMSPropAlpha}.items()
        for top, make in ABOVE_RMSPROP.items()
    },
    # Of the first version's tables; the step size of the second level falls below 0 in three steps,
    # and roundings grow with the lr that it leads far off.
    f"Adam(0.001, {ADAM})[lr] / SGD(0.001) / SGD(0.0001)": (
        published.AdamBaydin,
        0.001,
        lambda: published.SGD(0.001, optimizer=published.SGD(0.0001)),
    ),
    # Taller than any of Table 1.
    f"Adam(0.001, {ADAM}) / RMSProp(1e-4, {RMSPROP}) / SGD(1e-7)": (
        published.Adam,
        0.001,
        lambda: published.RMSProp(1e-4, optimizer=published.SGD(1e-7)),
    ),
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class MLP(nn.Module):
    """The paper's net, with fewer hidden units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(784, 16), nn.Linear(16, 10)

    def forward(self, x):
        return F.log_softmax(torch.tanh(self.out(torch.tanh(self.hidden(x)))), dim=1)


def hyperparameters(rule: published.Optimizable) -> dict[str, float]:
    """The values, by our names, of what a published rule lets the rule above it move."""
    values = {name: p.item() for name, p in rule.parameters.items()}
    unit = {
        name: (torch.tensor(values[name]).tanh().item() + 1) / 2
        for name in ("beta1", "beta2", "gamma")
        if name in values
    }
    square = isinstance(rule, (published.RMSProp, published.RMSPropAlpha))
    return {"lr": values["alpha"] ** 2 if square else values["alpha"], **unit}


@pytest.mark.parametrize("stack", TOWERS)
def test_towers_of_table_1_match_the_published_package(stack, mnist):
    images = mnist.x_train[:1024].double().div(255).reshape(-1, 784)
    labels = mnist.y_train[:1024]
    dead = ~images.bool().any(dim=0)
    assert 20 < dead.sum() < 400, "the digits must have pixels that are always black"

    ours, net = MLP(), MLP()
    optimizer = HyperOptimizer(ours.parameters(), stack, compile=False)
    rule, lr, make = TOWERS[stack]
    theirs = published.ModuleWrapper(net, optimizer=rule(lr, optimizer=make()))
    theirs.initialize()
    for t in range(120):
        batch = slice(64 * (t % 16), 64 * (t % 16) + 64)
        x, y = images[batch], labels[batch]
        optimizer.zero_grad()
        F.nll_loss(ours(x), y).backward()
        optimizer.step()
        theirs.begin()
        loss = F.nll_loss(theirs.forward(x), y)
        theirs.zero_grad()
        loss.backward(create_graph=True)
        theirs.step()
        level = theirs.optimizer
        for k, values in enumerate(optimizer.hyperparameters()):
            for name, value in hyperparameters(level).items():
                assert values[name] == pytest.approx(value, rel=1e-8), (t, k, name)
            level = level.optimizer
    trained = dict(theirs.module.named_parameters())
    for name, p in ours.named_parameters():
        # Of a pixel that is lit in few digits the gradient is mostly rounding, and a rule that
        # divides by its size shows it.
        torch.testing.assert_close(p, trained[name], rtol=1e-8, atol=1e-10)
    assert torch.equal(ours.hidden.weight[:, dead], MLP().hidden.weight[:, dead])
    # The run is long enough: the tower has changed what it tunes.
    assert optimizer.hyperparameters()[0]["lr"] != pytest.approx(lr, rel=1e-4)
