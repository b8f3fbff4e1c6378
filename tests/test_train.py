"""The training run and its command line, on the embedded digits."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.config.compose import compose
from experiments.config.identity import run_hash
from experiments.config.resolve import resolve, resolve_all
from experiments.config.schema import Config
from experiments.data.catalog import load
from experiments.data.images import normalised, pixels
from experiments.records.provenance import of_process
from experiments.records.provenance import provenance as summed_up
from experiments.records.store import RunStore
from experiments.tasks.compiled_gradient import make_gradient
from experiments.training.trainer import Progress, train
from models.mlp import MLP


def config(store: Path, *overrides: str) -> Config:
    """Three epochs of 16 steps, eager unless said otherwise."""
    fast = ["trainer.epochs=3", "trainer.compile=false", "trainer.compile_model=false"]
    fixed = ["data=mnist-5k", "device=cpu", "trainer.record_every=5", f"store={store}"]
    return resolve(compose([*fixed, *fast, *overrides]), "mnist-5k")


def result(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "provenance"}


def curves(store: Path, summary: dict[str, Any]) -> tuple[str, str]:
    folder = store / summary["hash"]
    return (folder / "curves.csv").read_text(), (folder / "hyperparameters.csv").read_text()


class Cut(Exception):
    """Stands for any end of a process."""


def cut_at(step: int) -> Any:
    def report(progress: Progress) -> None:
        if progress.step >= step:
            raise Cut

    return report


# The run.


def test_a_run_learns_and_records(tmp_path: Path) -> None:
    summary = train(config(tmp_path, "stack=SGD(0.1) / SGD(0.01)"))
    assert summary["test_error"] < 25 and summary["steps"] == 48 and not summary["diverged"]
    assert summary["tuned"] == ["lr"] and summary["hyperparameters"][0]["lr"] != 0.1
    assert summary["hyperparameters"][1]["lr"] == 0.01
    table = [line.split(",") for line in curves(tmp_path, summary)[0].splitlines()]
    assert table[0][:5] == ["epoch", "step", "train_loss", "test_error", "0.lr"]
    assert [row[:2] for row in table[1:]] == [["1", "16"], ["2", "32"], ["3", "48"]]
    assert float(table[-1][3]) == summary["test_error"]
    assert float(table[-1][4]) == summary["hyperparameters"][0]["lr"]
    steps = [line.split(",")[0] for line in curves(tmp_path, summary)[1].splitlines()[1:]]
    assert steps == ["5", "10", "15", "16", "20", "25", "30", "32", "35", "40", "45", "48"]
    made = summary["provenance"]
    assert {"commit", "dirty", "torch", "device", "seconds_per_step"} <= set(made)


def test_the_train_loss_is_the_mean_over_digits(tmp_path: Path) -> None:
    """With one batch of everything, it is the loss of the initial weights on the training set."""
    one = config(tmp_path, "trainer.epochs=1", "trainer.batch_size=4000")
    uneven = config(tmp_path, "trainer.epochs=1", "trainer.batch_size=3999", "stack=SGD(0)")
    assert train(one)["train_loss"] == pytest.approx(train(uneven)["train_loss"], abs=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        ("stack=Adam(0.001) / SGD(1e-5)",),
        ("stack=SGD(0.01, momentum=0.9) / Adam(0.01) / SGD(0.001)",),
        ("stack=RMSProp(0.01) / RMSProp(1e-4)", "trainer.compile=true"),
        ("stack=SGD(0.1)", "trainer.compile=true", "trainer.compile_model=true"),
    ],
    ids=["height 1", "height 2", "compiled", "height 0, all compiled"],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    whole = train(config(tmp_path / "whole", *overrides))
    torch.rand(7)  # the run must not use the global generator
    broken = config(tmp_path / "broken", *overrides)
    for step in (5, 20, 32, 35):  # in the first epoch, in the second, at its end, in the third
        with pytest.raises(Cut):
            train(broken, cut_at(step))
        assert RunStore(broken.store).summary(run_hash(broken)) is None
    again = train(broken)
    assert result(again) == result(whole)
    assert curves(tmp_path / "broken", again) == curves(tmp_path / "whole", whole)
    assert (whole["provenance"]["resumed"], again["provenance"]["resumed"]) == (0, 2)


def test_provenance_is_of_the_code_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits during a run do not count; the process before an interrupt does."""
    now = {**of_process(), "commit": "a"}
    monkeypatch.setattr("experiments.training.trainer.of_process", lambda: dict(now))

    def report(progress: Progress) -> None:
        now["commit"] = "b"
        cut_at(20)(progress)

    for _ in range(2):  # the second is cut at the same checkpoint
        with pytest.raises(Cut):
            train(config(tmp_path), report)
    made = train(config(tmp_path), lambda progress: now.update(commit="c"))["provenance"]
    assert made["commit"] == "b" and [one["commit"] for one in made["earlier"]] == ["a"]
    found = summed_up([{**train(config(tmp_path)), "data": "mnist"}])
    assert found["commit"] == ["a", "b"] and len(found["device"]) == 1
    assert "earlier" not in train(config(tmp_path, "seed=1"))["provenance"]


@pytest.mark.parametrize("harm", ["changed", "deleted"])
def test_a_run_keeps_the_replayed_file_it_began_with(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "learned.csv"
    path.write_text("step,lr\n1,0.1\n48,0.01\n")
    replayed = config(tmp_path, "stack=SGD(0.1)", "schedule=replay", f"schedule.file={path}")
    name = run_hash(replayed)

    def report(progress: Progress) -> None:
        path.write_text("step,lr\n1,0.5\n") if harm == "changed" else path.unlink(missing_ok=True)

    summary = train(replayed, report)
    settings = json.loads((tmp_path / name / "config.json").read_text())
    assert summary["hash"] == name and summary["schedule"] == settings["schedule"]
    assert summary["hyperparameters"][0]["lr"] == pytest.approx(0.01)


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    first = train(config(tmp_path))

    def never(progress: Progress) -> None:
        raise AssertionError("it ran again")

    assert train(config(tmp_path), never) == first


@pytest.mark.parametrize(
    "harm", ["cut short", "of another run", "of another model", "a flipped bit"]
)
def test_a_bad_checkpoint_is_reported_and_the_run_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    whole = train(config(tmp_path / "whole"))
    broken = config(tmp_path / "broken")
    with pytest.raises(Cut):
        train(broken, cut_at(20))
    run = RunStore(broken.store).run(run_hash(broken))
    path = run.path / "checkpoint.pt"
    if harm == "cut short":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        state = torch.load(path, weights_only=True)
        if harm == "of another run":
            state["hash"] = "0" * 16
        elif harm == "a flipped bit":  # which may be any error
            state["optimizer"]["state"][0]["moved"] = 3
        else:
            state["model"]["hidden.weight"] = torch.zeros(3, 3)
        torch.save(state, path)
    assert result(train(broken)) == result(whole)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "starts again from the beginning" in said


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_diverged_run_is_a_result(tmp_path: Path, compiled: str) -> None:
    diverging = config(tmp_path, "stack=SGD(1e42)", f"trainer.compile_model={compiled}")
    summary = train(diverging)
    assert summary["diverged"] and summary["epochs"] == 1 and summary["train_loss"] is None
    assert RunStore(tmp_path).summary(run_hash(diverging)) == summary
    json.dumps(summary, allow_nan=False)


def test_results_depend_on_seeds_and_not_on_global_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = train(config(tmp_path / "1"))
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    same = train(config(tmp_path / "2"))
    other = train(replace(config(tmp_path / "3"), seed=1))
    assert result(one) == result(same)
    assert one["train_loss"] != other["train_loss"]


@pytest.mark.compiler
@pytest.mark.filterwarnings("error:gradients could not be compiled")
def test_the_compiled_gradient_is_the_gradient() -> None:
    digits = load("mnist-5k", "")
    model = MLP()
    for images, labels in (
        (digits.x_train[:64], digits.y_train[:64]),
        (digits.x_train[64:100], digits.y_train[64:100]),  # a last batch, smaller than the others
    ):
        loss = make_gradient(model, pixels, 64, compile=False)(images, labels)
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        compiled_loss = make_gradient(model, pixels, 64, compile=True)(images, labels)
        torch.testing.assert_close(compiled_loss, loss)
        for p, grad in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None and p.grad.stride() == p.stride()
            torch.testing.assert_close(p.grad, grad, atol=1e-7, rtol=1e-4)


def test_the_compiled_gradient_updates_buffers_once() -> None:
    """Compiled for 8 images; the batch of 5 goes the eager way, through the same buffers."""
    eager = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LogSoftmax(1))
    compiled = copy.deepcopy(eager)
    gradients = [
        make_gradient(model, normalised, 8, compile)
        for model, compile in ((eager, False), (compiled, True))
    ]
    for n in (8, 8, 5):
        images, labels = torch.randint(256, (n, 6, 6, 3), dtype=torch.uint8), torch.arange(n)
        losses = [gradient(images, labels) for gradient in gradients]
        torch.testing.assert_close(losses[1], losses[0])
        for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)
    assert compiled[1].num_batches_tracked == 3
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))


# The configuration.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.epcohs=3"], "no config key 'trainer.epcohs'; did you mean trainer.epochs"),
        (["+trainer.epocs=3"], "no config key 'trainer.epocs'; did you mean trainer.epochs"),
        (["sede=3"], "no config key 'sede'; did you mean seed"),
        (["stack.hight=3"], "no config key 'stack.hight'; did you mean stack.height"),
        (["model=mpl"], "there is no model 'mpl'; did you mean mlp?"),
        (["logger=wandbb"], "there is no logger 'wandbb'; did you mean wandb?"),
        (["trainer.epochs=many"], "many"),
        (["stack=SGD(0.01) / SDG(0.01)"], "SDG"),
        (["stack=SGD(0.01)", "stack.rule=SGD"], "both given; give the notation, or"),
        (["stack.height=-1"], "stack.height=-1 must be 0"),
        (["stack.rule=Adamm"], "Adamm"),
        (["device=tpu"], "device='tpu' is not known; give auto, cpu or cuda"),
        (["trainer.batch_size=0"], "trainer.batch_size=0 must be 1 or more"),
        (["trainer.epochs=0"], "trainer.epochs=0 must be 1 or more"),
        (["trainer.steps=0"], "trainer.steps=0 must be 1 or more"),
        (["data.augment=true"], "data.augment=true is for images in colour, not for grey images"),
        (["schedule=hee"], "there is no schedule 'hee'; did you mean he?"),
        (["seed=-1"], "seed=-1 must be 0 or more"),
        (["workers=-1"], "workers=-1 must be 1 or more, or null for a worker on each core"),
        (["trainer.clip_value=inf"], "trainer.clip_value=inf must be a number above 0, or null"),
        (["trainer.l2=nan"], "trainer.l2=nan must be a number above 0, or null"),
        (["model.name=mpl"], "model.name='mpl' is not one of char_rnn, mlp"),
        (["model=resnet20"], "model.name='resnet20' does not read grey images; give model=mlp"),
    ],
)
def test_a_bad_value_gets_one_clear_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_all([compose(["data=mnist-5k", *overrides])])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_level_of_a_tower_has_the_same_rule_and_lr() -> None:
    tower = compose(["stack.rule=Adam", "stack.height=2", "stack.lr=1e-4", "data=mnist-5k"])
    expected = "Adam(0.0001) / Adam(0.0001) / Adam(0.0001)"
    assert resolve_all([tower])[0].stack.notation == expected


# The command line.


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "experiments.run", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)


EAGER = ("trainer.compile=false", "trainer.compile_model=false", "data=mnist-5k", "device=cpu")


def test_the_readmes_single_run(tmp_path: Path) -> None:
    done = run(
        *("experiment=table1", "stack=SGD(0.01) / SGD(0.01)"),
        *(*EAGER, "trainer.epochs=1", f"store={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SGD(0.01) / SGD(0.01), seed 0: test error ")
    assert len([path for path in tmp_path.iterdir() if (path / "summary.json").exists()]) == 1


def test_the_readmes_sweep(tmp_path: Path) -> None:
    before = set(Path.cwd().iterdir())
    done = run(
        *("-m", "model=mlp", "stack.rule=SGD", "stack.height=0,1,2,3", "stack.lr=1e-4,1e-3,1e-2"),
        *("seed=0,1,2", *EAGER, "trainer.epochs=1", f"store={tmp_path}", "workers=2"),
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 36
    tidy = Path(last.removeprefix("The tidy CSV of 36 runs is "))
    assert tidy.parent == tmp_path / "sweeps" and len(tidy.read_text().splitlines()) == 37
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("*/summary.json")]
    found = {(summary["stack"], summary["seed"]) for summary in summaries}
    stacks = {" / ".join([f"SGD({lr})"] * n) for n in (1, 2, 3, 4) for lr in (0.0001, 0.001, 0.01)}
    assert found == {(stack, seed) for stack in stacks for seed in (0, 1, 2)}
    assert set(Path.cwd().iterdir()) == before  # no outputs/, no multirun/


@pytest.mark.long
def test_a_sweep_over_stacks(tmp_path: Path) -> None:
    done = run(
        *(
            "-m",
            "stack=Adam(0.001)[lr, beta1] / SGD({lr: 1e-5, beta1: 1e-6}),SGD(0.1, 0.9)",
            f"store={tmp_path}",
        ),
        *(*EAGER, "trainer.epochs=1"),
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(", seed")[0] for line in done.stdout.splitlines()[:-1]] == [
        "Adam(0.001)[lr, beta1] / SGD({lr: 1e-5, beta1: 1e-6})",
        "SGD(0.1, momentum=0.9)",
    ]


@pytest.mark.parametrize("key", ["trainer.epcohs=1", "experiment=tabel1"])
def test_a_mistyped_command_line_fails_at_once_with_what_was_meant(key: str) -> None:
    done = run(key)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert {"trainer.epcohs=1": "trainer.epochs", "experiment=tabel1": "table1"}[key] in done.stderr


def test_after_ctrl_c_the_same_command_finishes_the_run(tmp_path: Path) -> None:
    arguments = (*EAGER, "trainer.epochs=400", f"store={tmp_path}", "stack=SGD(0.01) / SGD(0.01)")
    process = subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job may ignore it
    )
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "give the same command again to continue" in said and "Traceback" not in said
    (run,) = tmp_path.glob("[0-9a-f]*")
    assert not (run / "summary.json").exists()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert 0 < state["epoch"] < 400


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_wandb_never_asks_and_never_fails_a_run(tmp_path: Path) -> None:
    done = subprocess.run(
        command(*EAGER, "trainer.epochs=2", f"store={tmp_path}", "logger=wandb"),
        env={k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        | {"HOME": str(tmp_path)},  # where no key lies
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "test error" in done.stdout and "wandb failed" not in done.stderr
    assert list(tmp_path.glob("*/wandb/offline-run-*"))
