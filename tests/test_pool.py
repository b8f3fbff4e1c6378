"""The pool: parallel runs, and runs that fail."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.config.compose import compose
from experiments.config.resolve import resolve
from experiments.config.schema import Config
from experiments.execution.outcome import Outcome, describe, explain
from experiments.execution.pool import _Pool, _Worker, run_all, structure
from experiments.execution.progress import Display
from experiments.training.trainer import train


def config(store: Path, *overrides: str) -> Config:
    fixed = ["data=mnist-5k", "device=cpu", "progress=false", f"store={store}", "workers=2"]
    fast = ["trainer.epochs=1", "trainer.compile=false", "trainer.compile_model=false"]
    return resolve(compose([*fixed, *fast, *overrides]), "mnist-5k")


@pytest.mark.long
def test_outcomes_come_in_the_order_of_the_configs_and_equal_those_of_single_runs(
    tmp_path: Path,
) -> None:
    configs = [config(tmp_path, f"seed={seed}", f"trainer.epochs={1 + seed}") for seed in range(3)]
    outcomes = run_all(configs, workers=2)
    assert [outcome.config for outcome in outcomes] == configs
    for outcome in outcomes:
        assert outcome.summary is not None and outcome.error is None
        alone = train(replace(outcome.config, store=str(tmp_path / "alone")))
        assert alone["train_loss"] == outcome.summary["train_loss"]


@pytest.mark.long
def test_finished_runs_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [config(tmp_path, f"seed={seed}") for seed in range(2)]
    first = run_all(configs, workers=1)
    monkeypatch.setattr("experiments.execution.pool._Pool", None)  # nothing is left for a pool
    assert run_all(configs, workers=1) == first


def test_a_failing_run_does_not_affect_others(tmp_path: Path) -> None:
    good = [config(tmp_path, f"seed={seed}") for seed in range(3)]
    bad = replace(good[0], data=replace(good[0].data, name="mnist", root=str(tmp_path)))
    outcomes = run_all([bad, *good], workers=1)
    assert outcomes[0].summary is None
    assert "there is no MNIST under" in (outcomes[0].error or "")
    assert all(outcome.summary is not None for outcome in outcomes[1:])


def test_a_dying_process_fails_only_its_run(tmp_path: Path) -> None:
    endless = config(tmp_path, "trainer.epochs=100000")
    others = [config(tmp_path, f"seed={seed}") for seed in range(3)]
    outcomes: list[Outcome] = []
    pool = threading.Thread(target=lambda: outcomes.extend(run_all([endless, *others], workers=2)))
    pool.start()
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("*/summary.json"))) < 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    pool.join(timeout=60)
    assert outcomes[0].error == "its process died with exit code -9"
    assert all(outcome.summary is not None for outcome in outcomes[1:])


@pytest.mark.long
def test_a_process_that_dies_between_two_runs_is_replaced(tmp_path: Path) -> None:
    job = Outcome(config(tmp_path))
    pool = _Pool([job], 1, Display(2, 0, show=False))
    pool.workers = [dead] = [_Worker(0)]
    dead.process.kill()
    dead.process.join()
    try:
        pool._next_job(0)
        while pool.workers[0].job:
            pool._handle_messages()
    finally:
        pool.workers[0].end()
    assert job.summary is not None and pool.workers[0] is not dead


def test_an_error_without_a_message_gets_a_line(tmp_path: Path) -> None:
    asked_for = compose(["stack.lr=0.1"])  # and not resolved: its stack has no notation
    said = describe(Outcome(asked_for, error=explain(ValueError())))
    assert said == "stack.rule=SGD stack.height=1 stack.lr=0.1, seed 0: failed: ValueError"
    assert describe(Outcome(asked_for)).endswith(": failed: ")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")
@pytest.mark.parametrize("own", [None, "glibc.malloc.arena_max=1"])
def test_workers_use_large_pages_by_default(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", own or "")
    if not own:
        monkeypatch.delenv("GLIBC_TUNABLES")
    worker = _Worker(0)
    try:
        environ = Path(f"/proc/{worker.process.pid}/environ")
        wanted, end = f"GLIBC_TUNABLES={own or 'glibc.malloc.hugetlb=1'}", time.monotonic() + 60
        while wanted not in environ.read_text().split("\0"):  # until it is a process of its own
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        worker.end()


def test_runs_that_differ_only_in_numbers_share_a_structure(tmp_path: Path) -> None:
    def of(stack: str) -> tuple:
        return structure(config(tmp_path, f"stack={stack}"))

    assert of("Adam(0.001) / SGD(1e-5)") == of("Adam(0.1, 0.8) / SGD(2)")
    stacks = ["Adam(0.1)", "Adam(0.1) / SGD(2)", "Adam(0.1)[lr] / SGD(2)", "SGD(1) / SGD(2)"]
    assert len({of(stack) for stack in stacks}) == len(stacks)


class FakeWorker(_Worker):
    """Takes jobs and does nothing."""

    def __init__(self) -> None:
        self.structures: set[tuple] = set()
        self.job = None

    def give(self, job: Outcome) -> None:
        self.job = job
        self.structures.add(structure(job.config))


def test_the_longest_run_goes_first_and_compiled_steps_are_kept(tmp_path: Path) -> None:
    sgd, adam, adagrad = "stack=SGD(0.1)", "stack=Adam(0.1)", "stack=AdaGrad(0.1)"
    jobs = [
        Outcome(config(tmp_path, stack, f"seed={seed}", f"trainer.epochs={epochs}"))
        for stack, epochs in ((sgd, 1), (adam, 5), (sgd, 5), (adagrad, 5))
        for seed in (0, 1)
    ]
    pool = _Pool(list(jobs), 2, Display(2, 0, show=False))
    pool.workers = [FakeWorker(), FakeWorker()]
    given = []
    for slot in (0, 1, 0, 1, 0, 1, 0, 1):
        pool._next_job(slot)
        job = pool.workers[slot].job
        assert job is not None
        given.append((job.config.trainer.epochs, structure(job.config)[0][0]))
    first, second, third = given[0][1], given[1][1], given[4][1]
    assert {first, second, third} == {"SGD", "Adam", "AdaGrad"}
    assert given[:4] == [(5, first), (5, second), (5, first), (5, second)]
    assert given[4:] == [(5, third), (5, third), (1, "SGD"), (1, "SGD")]
