"""The run store: a run's identity, when it is finished, and locks."""

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.config.compose import compose
from experiments.config.identity import identity, run_hash
from experiments.config.lr_schedules import ScheduleConfig
from experiments.config.resolve import resolve
from experiments.config.schema import Config
from experiments.data.catalog import load
from experiments.files import make_folder, write_text
from experiments.records.store import RunDirectory, RunStore
from experiments.training.trainer import train


def resolved(*overrides: str) -> Config:
    return resolve(compose(["data=mnist-5k", "device=cpu", *overrides]), "mnist-5k")


# Identity.


def test_the_same_config_has_the_same_hash_however_it_is_written() -> None:
    hashes = {
        run_hash(resolved("stack=SGD(0.01) / SGD(0.01)")),
        run_hash(resolved("stack=SGD(1e-2)/SGD(lr=.01)")),
        run_hash(resolved("stack.rule=SGD", "stack.height=1", "stack.lr=0.01")),
    }
    assert len(hashes) == 1
    program = "from tests.test_store import *; print(run_hash(resolved()))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert other.stdout.split() == [run_hash(resolved())], other.stderr


def test_any_changed_field_of_the_identity_changes_the_hash() -> None:
    config = resolved("stack=SGD(0.01) / SGD(0.01)")
    others = [
        replace(config, model=replace(config.model, name="other")),
        replace(config, data=replace(config.data, name="mnist")),
        replace(config, data=replace(config.data, augment=True)),
        replace(config, data=replace(config.data, validation=True)),
        replace(config, model=replace(config.model, hidden=64)),
        replace(config, model=replace(config.model, layers=64)),
        replace(config, schedule=ScheduleConfig("cosine", final=0.0)),
        replace(config, schedule=ScheduleConfig("cosine", final=0.1)),
        replace(config, stack=replace(config.stack, notation="SGD(0.01) / SGD(0.02)")),
        replace(config, seed=1),
        replace(config, device="cuda"),
    ]
    for field in fields(config.trainer):
        if field.name == "checkpoint_every":  # it only decides where an interrupted run resumes
            continue
        value = getattr(config.trainer, field.name)
        changed: Any = not value if isinstance(value, bool) else (value or 0) + 1
        others.append(replace(config, trainer=replace(config.trainer, **{field.name: changed})))
    hashes = [run_hash(other) for other in (config, *others)]
    assert len(set(hashes)) == len(hashes)
    assert set(identity(config)) == {"model", "data", "stack", "trainer", "seed", "device"}


def test_folders_loggers_and_the_like_do_not_change_the_hash(tmp_path: Path) -> None:
    config = resolved()
    root = f"data.root={tmp_path}"
    others = ("workers=7", "logger=wandb", "progress=false", f"store={tmp_path}", root, "row=a")
    assert {run_hash(resolved(other)) for other in others} == {run_hash(config)}


# When it is finished.

SUMMARY = {"stack": "SGD(0.1)", "seed": 0, "hyperparameters": [{"lr": 0.1}], "test_error": 1.5}


def test_a_run_is_finished_when_its_summary_is_complete(tmp_path: Path) -> None:
    run = RunStore(tmp_path).run("0123456789abcdef")
    assert run.summary() is None
    run.save_config({"seed": 0})
    run.save_checkpoint({"epoch": 1})
    run.save_curves("curves", ["epoch"], [[1]])
    assert run.summary() is None
    run.finish(SUMMARY)
    assert run.summary() == {"hash": "0123456789abcdef", **SUMMARY}
    assert not (run.path / "checkpoint.pt").exists()


@pytest.mark.parametrize("keep", [0, 1, 20])
def test_a_half_written_summary_is_not_a_finished_run(tmp_path: Path, keep: int) -> None:
    run = RunDirectory(tmp_path / "0123456789abcdef")
    run.finish(SUMMARY)
    whole = (run.path / "summary.json").read_text()
    (run.path / "summary.json").write_text(whole[:keep])
    assert run.summary() is None


@pytest.mark.parametrize("missing", ["stack", "seed", "hyperparameters"])
def test_an_incomplete_summary_is_not_read(tmp_path: Path, missing: str) -> None:
    run = RunDirectory(tmp_path / "0123456789abcdef")
    run.finish({name: value for name, value in SUMMARY.items() if name != missing})
    assert run.summary() is None


def test_a_summary_of_another_run_is_not_read(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "one").finish(SUMMARY)
    (tmp_path / "one").rename(tmp_path / "two")
    assert RunDirectory(tmp_path / "two").summary() is None


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def cut_short(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", cut_short)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_an_unwritable_path_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr(Path, "mkdir", refuse)
    told = f"{os.strerror(number)}; give a writable folder"
    path = tmp_path / "folder" / "file"
    with pytest.raises(OSError, match=f"{path} cannot be written: {told}"):
        write_text(path, "new")
    with pytest.raises(OSError, match=f"{path.parent} cannot be written: {told}"):
        make_folder(path.parent)
    with pytest.raises(OSError, match=f"a cannot be written: {told}"), RunStore(path).claim("a"):
        pass


def write_often(path: Path) -> None:
    for _ in range(300):
        write_text(path, "whole")


def test_several_processes_may_write_the_same_file(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("spawn").Process(target=write_often, args=(tmp_path / "a",))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_next_claim_removes_a_killed_process_s_files(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a")
    run.save_curves("curves", ["epoch"], [])
    (run.path / "checkpoint.pt.123.tmp").touch()
    with RunStore(tmp_path).claim("a"):
        assert sorted(path.name for path in run.path.iterdir()) == ["curves.csv", "lock"]


def test_checkpoints_round_trip(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a")
    assert run.checkpoint() is None
    run.save_checkpoint({"epoch": 3, "weights": torch.arange(5.0)})
    state = run.checkpoint()
    assert state is not None and state["epoch"] == 3
    assert state["weights"].equal(torch.arange(5.0))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "cut"])
def test_an_unreadable_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    run = RunDirectory(tmp_path / "a")
    run.save_checkpoint({"weights": torch.arange(5000.0)})
    path = run.path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:9000] if content is None else content)
    with pytest.raises(ValueError, match=r"a/checkpoint.pt cannot be read as a checkpoint"):
        run.checkpoint()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "a").save_checkpoint({"epoch": 1})
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ValueError, match="is not a checkpoint of run b"):
        RunDirectory(tmp_path / "b").checkpoint()


# Locks.


def hold(root: str, pipe: Any) -> None:
    with RunStore(root).claim("a"):
        pipe.send("claimed")
        time.sleep(60)


def test_a_claim_ends_with_its_process_even_by_sigkill(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(str(tmp_path), there))
    process.start()
    assert here.recv() == "claimed"
    process.kill()
    process.join()
    with RunStore(tmp_path).claim("a"):
        pass


def test_only_one_of_many_processes_holds_a_run(tmp_path: Path) -> None:
    """Each removes the lock file at its end, and none remains."""
    store, inside, most = RunStore(tmp_path), [], []

    def hold() -> None:
        for _ in range(20):
            with store.claim("run"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 160 and max(most) == 1
    assert list(store.run("run").path.iterdir()) == []


def test_the_stale_lock_of_a_finished_run_is_removed(tmp_path: Path) -> None:
    run = RunStore(tmp_path).run("a")
    run.finish(SUMMARY)
    (run.path / "lock").touch()
    assert RunStore(tmp_path).finished("a") == {"hash": "a", **SUMMARY}
    assert [path.name for path in run.path.iterdir()] == ["summary.json"]


def test_another_process_s_run_is_waited_for_and_read(tmp_path: Path) -> None:
    """This test is the other process; it writes an error of 12.34%."""
    config = resolved(
        *(f"store={tmp_path}", "trainer.epochs=1"),
        *("trainer.compile=false", "trainer.compile_model=false"),
    )
    load("mnist-5k", config.data.root)  # the run would take a tenth of a second now
    found: list[dict[str, Any]] = []
    other = threading.Thread(target=lambda: found.append(train(config)))
    with RunStore(tmp_path).claim(run_hash(config)) as run:
        other.start()
        other.join(timeout=3)
        assert other.is_alive()
        assert [path.name for path in run.path.iterdir()] == ["lock"]
        run.finish({**SUMMARY, "test_error": 12.34})
    other.join(timeout=60)
    assert found == [{"hash": run.hash, **SUMMARY, "test_error": 12.34}]
    assert sorted(path.name for path in run.path.iterdir()) == ["summary.json"]
