"""Optimizers of other packages instead of a stack: their results in a run, and its records."""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import Cut, config, curves, cut_at, result
from torch import Tensor, nn

import hyperopt
from experiments.config import baselines
from experiments.config.baselines import BASELINES, judged, make_optimizer, parse
from experiments.config.identity import run_hash
from experiments.data.catalog import load
from experiments.data.images import Dataset, pixels
from experiments.execution.outcome import Outcome, describe
from experiments.execution.pool import structure
from experiments.records.store import RunStore
from experiments.records.tidy import tidy
from experiments.tasks.classification import Classification
from experiments.training.trainer import train
from hyperopt import RULES
from models.mlp import MLP

STACKS = ["AdamWScheduleFree(0.01)", "Prodigy()", "DAdaptAdam()", "DAdaptSGD()"]
# Peers of the suite, and whether their runs can resume.
SUITE = {
    "ProdigyPlusScheduleFree()": True,
    "MomoAdam()": False,
    "Mechanic()": False,
    "Trac()": False,
}


def by_hand(kind: type, lr: float, digits: Dataset) -> tuple[float, float]:
    """An epoch of the package's own optimizer: the mean loss over digits, and the test error."""
    init, shuffle = np.random.SeedSequence(0).generate_state(2)
    torch.manual_seed(int(init))
    model = MLP()
    optimizer = kind(model.parameters(), lr=lr)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(int(shuffle)))
    x, y = pixels(digits.x_train)[order], digits.y_train[order]
    if hasattr(optimizer, "train"):
        optimizer.train()
    total = 0.0
    for images, labels in zip(x.split(256), y.split(256), strict=True):
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    wrong = model(pixels(digits.x_test)).argmax(1) != digits.y_test
    return total / 4000, 100 * float(wrong.float().mean())


@pytest.mark.parametrize("stack", STACKS)
def test_a_run_is_the_package_s_own_loop(tmp_path: Path, stack: str) -> None:
    peer = parse(stack).levels[0]
    assert isinstance(peer, baselines.Baseline)
    own = config(tmp_path, f"stack={stack}", "trainer.epochs=1")
    kind = getattr(import_module(peer.package), peer.name)
    loss, error = by_hand(kind, peer.lr, load(own.data.name, own.data.root))
    summary = train(own)
    assert summary["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert summary["test_error"] == pytest.approx(error, abs=0.11)  # one digit of a thousand
    assert summary["provenance"]["peer"].startswith(peer.package)


@pytest.mark.parametrize("stack", STACKS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, stack: str) -> None:
    overrides = f"stack={stack}", "trainer.epochs=2", "trainer.checkpoint_every=7"
    whole = train(config(tmp_path / "whole", *overrides))
    broken = config(tmp_path / "broken", *overrides)
    for step in (10, 20):  # in the first epoch and in the second
        with pytest.raises(Cut):
            train(broken, cut_at(step))
    again = train(broken)
    assert result(again) == result(whole)
    assert curves(tmp_path / "broken", again) == curves(tmp_path / "whole", whole)


@pytest.mark.parametrize("stack", SUITE)
def test_a_peer_of_the_suite_resumes_or_restarts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stack: str
) -> None:
    peer = parse(stack).levels[0]
    assert isinstance(peer, baselines.Baseline)
    pytest.importorskip(peer.package)
    overrides = f"stack={stack}", "trainer.epochs=1", "trainer.checkpoint_every=7"
    whole = train(config(tmp_path / "whole", *overrides))
    broken = config(tmp_path / "broken", *overrides)
    with pytest.raises(Cut):
        train(broken, cut_at(10))
    again = train(broken)
    assert result(again) == result(whole)
    assert again["provenance"]["resumed"] == SUITE[stack]
    assert ("cannot resume from a checkpoint" in capsys.readouterr().err) != SUITE[stack]


def test_a_peer_that_needs_the_loss_receives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("momo")
    weight = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(weight, "MomoAdam()", compile=False)
    assert isinstance(optimizer, baselines.BaselineOptimizer)

    def gradient(x: Tensor) -> Tensor:
        weight.weight.grad = torch.ones(1, 1)
        return x.sum()

    told = []
    monkeypatch.setattr(optimizer.optimizer, "step", lambda loss: told.append(float(loss)))
    optimizer.watch(gradient)(torch.tensor([2.0]))
    optimizer.step()
    assert told == [2.0]


def test_the_records_of_a_peer_have_the_usual_form(tmp_path: Path) -> None:
    own = config(tmp_path, "stack=Prodigy()", "trainer.epochs=1")
    summary = train(own)
    assert summary["stack"] == "Prodigy(1.0)" and summary["tuned"] == []
    (values,) = summary["hyperparameters"]
    assert values["lr"] == 1 and values["d"] > 1e-6
    assert curves(tmp_path, summary)[1].startswith("step,0.lr,0.d\n")
    line = tidy(summary)
    assert (line["stack.rule"], line["stack.height"], line["0.lr"]) == ("Prodigy", 0, 1.0)
    assert "Prodigy(1.0), seed 0: test error" in describe(Outcome(own, summary))
    assert structure(own) == (("Prodigy",),)
    assert RunStore(tmp_path).summary(run_hash(own)) == summary


def test_a_too_large_lr_is_recorded_as_diverged(tmp_path: Path) -> None:
    summary = train(config(tmp_path, "stack=AdamWScheduleFree(1e38)"))
    assert summary["diverged"] and summary["epochs"] == 1


def test_schedules_apply_to_peers(tmp_path: Path) -> None:
    summary = train(config(tmp_path, "stack=AdamWScheduleFree(0.01)", "schedule=cosine"))
    assert 0 < summary["hyperparameters"][0]["lr"] < 1e-4


class Stretched(nn.Module):
    """A model whose averages depend on its one weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.mean = cast(Tensor, self.norm.running_mean)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.weight * images.flatten(1).mean(1, keepdim=True))


def test_batch_normalisation_follows_the_evaluation_weights() -> None:
    images, labels = torch.full((512, 2, 2), 255, dtype=torch.uint8), torch.zeros(512).long()
    data = Classification(Dataset("mnist", "", "", images, labels, images, labels), 8, False, "cpu")
    for stack, expected in (("AdamWScheduleFree(1.0)", "moved"), ("SGD(1.0)", "left alone")):
        model = Stretched()
        optimizer = make_optimizer(model, stack, compile=False)
        for _ in range(4):
            model.weight.grad = torch.ones(1)
            optimizer.step()
        trained, before = model.weight.item(), model.mean.clone()
        with judged(optimizer, partial(data.renew_averages, model)):
            if expected == "moved":
                assert model.weight.item() != trained
                # All images are ones: the mean is the weight, but for what is left of the 0 before.
                share = 1 - 0.9**50
                assert float(model.mean) == pytest.approx(share * model.weight.item(), rel=1e-5)
            else:
                assert torch.equal(model.mean, before)
        assert model.weight.item() == pytest.approx(trained, rel=1e-6)


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ("Prodigy() / SGD(1e-5)", "Prodigy(1.0) has no tuned hyperparameter"),
        ("Prodigy()[lr] / SGD(1e-5)", "cannot tune another level or be tuned"),
        ("SGD(0.1) / Prodigy()", "cannot tune another level or be tuned"),
        ("Prodogy()", "did you mean 'Prodigy'?"),
        ("Prodigy(-1)", "lr must lie in [0, inf), but is -1"),
    ],
)
def test_errors(stack: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(stack)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(baselines, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs the package prodigyopt; pip install '.\[peers\]'"):
        parse("Prodigy()").levels[0].make([nn.Parameter(torch.ones(1))])  # type: ignore[attr-defined]


def test_the_library_s_notation_does_not_know_them() -> None:
    assert not BASELINES.keys() & RULES.keys()
    with pytest.raises(ValueError, match="there is no rule 'Prodigy'"):
        hyperopt.parse("Prodigy()")
