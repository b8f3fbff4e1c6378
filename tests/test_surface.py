"""The hyperoptimization surface: recorded losses, its whole command, its figures."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import running
import torch
from running import planned

from experiments.config.compose import compose
from experiments.config.identity import identity, run_hash
from experiments.config.resolve import resolve
from experiments.data.catalog import load
from experiments.records.store import RunStore
from experiments.studies.surface import runs as surface
from experiments.studies.surface.runs import STUDY
from experiments.training.trainer import train
from models.mlp import MLP


def test_the_loss_of_a_step_is_its_batch_s_loss_before_the_step(tmp_path: Path) -> None:
    """Plain SGD in a loop of torch's own, with the same initial weights and batches."""
    options = [f"store={tmp_path}", "device=cpu", "trainer.compile=false"]
    (config,) = [
        resolve(c, "mnist-5k")
        for _, c in planned(STUDY, *options, "trainer.compile_model=false")
        if c.stack.notation == "SGD(0.1)"
    ]
    summary = train(config)
    folder = RunStore(tmp_path).run(summary["hash"]).path
    recorded = pd.read_csv(folder / "hyperparameters.csv")
    init_seed = np.random.SeedSequence(0).generate_state(2)[0]
    torch.manual_seed(int(init_seed))
    model, data, losses = MLP(), load("mnist-5k", ""), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in zip(data.x_train.split(300), data.y_train.split(300), strict=True):
        optimizer.zero_grad()
        loss = torch.nn.functional.nll_loss(model(x / 255), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert list(recorded.step) == [*range(1, 15)]
    np.testing.assert_allclose(recorded.loss, losses, rtol=1e-5)
    assert pd.read_csv(folder / "curves.csv").loss.iloc[-1] == recorded.loss.iloc[-1]


def test_the_record_is_part_of_a_run_and_leaves_earlier_hashes_alone() -> None:
    plain, recording = (
        resolve(compose([f"trainer.record_loss={value}", "device=cpu"]), "mnist")
        for value in ("false", "true")
    )
    assert "record_loss" not in identity(plain)["trainer"]
    assert run_hash(plain) != run_hash(recording)


def test_the_whole_command_trains_once_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surface, "LRS", (0.001, 0.01, 0.1, 1.0, 1e38))
    # No data but the 5,000 digits.
    fast = ["trainer.compile=false", "trainer.compile_model=false", "device=cpu"]
    arguments = [f"data.root={tmp_path}", "data.download=false", *fast]
    assert len(running.execute(STUDY, tmp_path, *arguments)) == 8
    results = tmp_path / "results" / "surface" / "paper-mnist-5k"  # not where those of MNIST are
    with open(results / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14 and len(rows[0]) == 1 + 8 + 3
    for line in pd.read_csv(results / "runs.csv").itertuples():
        folder = tmp_path / "runs" / str(line.hash)
        summary = json.loads((folder / "summary.json").read_text())
        assert line.test_error == summary["test_error"]
        kept = pd.read_csv(folder / "hyperparameters.csv")
        shown = [float(row[f"loss of {line.stack}"]) for row in rows]
        np.testing.assert_allclose(shown, kept.loss, rtol=1e-4)
        if "/" in str(line.stack):
            shown = [float(row[f"lr of {line.stack}"]) for row in rows]
            np.testing.assert_allclose(shown, kept["0.lr"], rtol=1e-4)
    assert "MNIST-5k, one epoch in the order" in (results / "README.md").read_text()
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    assert {name for name in before if name.endswith(".png")} == {"figure.png", "flat.png"}
    assert running.execute(STUDY, tmp_path, *arguments) == []
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before
