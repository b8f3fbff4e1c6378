"""The convex problem: its gradient, its objective, and the optimum."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import Digits

from experiments.config.compose import compose
from experiments.config.resolve import resolve
from experiments.data.images import MNIST_SHA256, Dataset
from experiments.studies.robustness.softmax_optimum import PATH, least_objective
from experiments.tasks.classification import Classification
from models.softmax import Softmax

L2 = 0.3


def task(mnist: Digits) -> Classification:
    parts = mnist.x_train[:300], mnist.y_train[:300], mnist.x_test[:100], mnist.y_test[:100]
    return Classification(Dataset("mnist-5k", "", "", *parts), 64, False, "cpu", l2=L2)


def objective(model: Softmax, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    scores = F.linear(x.flatten(1) / 255, model.linear.weight, model.linear.bias)
    flat = torch.cat([p.flatten() for p in model.parameters()])
    return F.cross_entropy(scores, y) + L2 / 2 * (flat @ flat)


def test_the_penalty_is_part_of_loss_gradient_and_objective(mnist: Digits) -> None:
    images, model = task(mnist), Softmax()
    x, y = images.x_train[:64], images.y_train[:64]
    loss = images.gradient(model, compile=False, autocast=False)(x, y)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = objective(model, x, y)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, [*model.parameters()])))
    measured = images.evaluate(model)
    assert tuple(measured) == images.metrics == ("test_error", "objective")
    whole = objective(model, images.x_train, images.y_train).item()
    assert measured["objective"] == pytest.approx(whole, rel=1e-5)


def test_the_optimum_matches_torch_s_lbfgs(mnist: Digits) -> None:
    x, y = mnist.x_train[:300].double(), mnist.y_train[:300]
    model = Softmax().double()
    walk = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        walk.zero_grad()
        loss = objective(model, x, y)
        loss.backward()
        return loss

    walk.step(closure)
    reached = objective(model, x, y).item()
    found = least_objective(x.flatten(1) / 255, y, 10, L2)
    assert found["objective"] == pytest.approx(reached, abs=1e-8)
    assert found["objective"] - found["bound"] <= reached
    assert found["bound"] < 1e-12


def test_the_committed_optimum_has_the_experiment_s_setting() -> None:
    committed = json.loads(PATH.read_text())
    config = resolve(compose(["experiment=softmax"]), "mnist")
    assert committed["l2"] == config.trainer.l2
    assert committed["data_sha256"] == MNIST_SHA256
    assert 0 < committed["bound"] < 1e-7


@pytest.mark.parametrize(
    "overrides", [("trainer.l2=0",), ("experiment=char_rnn", "trainer.l2=0.1")]
)
def test_an_invalid_penalty_is_refused(overrides: tuple[str, ...]) -> None:
    data = "war_and_peace" if "experiment=char_rnn" in overrides else "mnist-5k"
    with pytest.raises(
        ValueError, match=r"trainer\.l2=.* (must be a number|does not apply to text)"
    ):
        resolve(compose(["device=cpu", *overrides]), data)
