"""One run by two processes that torchrun starts, on the CPU."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from experiments.config.compose import compose
from experiments.config.identity import run_hash
from experiments.config.resolve import resolve
from experiments.training.trainer import train

# Shares of 128 and 127 images, and in the last batch of 88 and 87.
SETTING = (
    *("data=mnist-5k", "device=cpu", "stack=Adam(0.001) / SGD(1e-5)", "trainer.batch_size=255"),
    *("trainer.epochs=2", "trainer.compile=false", "trainer.compile_model=false"),
    "trainer.record_every=4",
)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *command, "-m", "experiments.run", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows(path: Path) -> list[list[float]]:
    with open(path, newline="") as file:
        return [[float(value) for value in row] for row in list(csv.reader(file))[1:]]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    alone = train(resolve(compose([*SETTING, f"store={tmp_path / 'alone'}"]), "mnist-5k"))
    store = tmp_path / "together"
    done = torchrun(*SETTING, f"store={store}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test error") == 1
    (run,) = (path.parent for path in store.glob("*/summary.json"))
    both = json.loads((run / "summary.json").read_text())
    assert both["trainer"] == {**alone["trainer"], "processes": 2} and run.name != alone["hash"]
    for name in ("curves", "hyperparameters", "hypergradients"):
        expected = rows(tmp_path / "alone" / alone["hash"] / f"{name}.csv")
        found = rows(run / f"{name}.csv")
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-7)
    assert both["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-5)

    again = torchrun(*SETTING, f"store={store}")
    assert again.returncode == 0 and again.stdout == done.stdout
    assert "epoch" not in again.stderr


def test_unsupported_options_of_two_processes_get_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(SETTING)
    assert "processes" not in str(resolve(config, "mnist-5k").stack)
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = resolve(config, "mnist-5k")
    assert two.trainer.processes == 2 and not two.trainer.compile_model
    assert resolve(two, "mnist-5k") == two
    recorded = compose([*SETTING, "trainer.record_loss=true"])
    with pytest.raises(ValueError, match=r"start without torchrun$"):
        resolve(recorded, "mnist-5k")
    monkeypatch.delenv("WORLD_SIZE")
    assert run_hash(resolve(config, "mnist-5k")) != run_hash(two)
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2 -m experiments\.run$"):
        resolve(two, "mnist-5k")
