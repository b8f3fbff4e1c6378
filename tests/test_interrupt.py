"""Ctrl-C and SIGTERM: the current step ends, a checkpoint is written, and the run can resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cli import Terminated
from experiments.config.compose import compose
from experiments.config.identity import run_hash
from experiments.config.resolve import resolve
from experiments.config.schema import Config
from experiments.records.store import RunStore
from experiments.training.interrupt import Interrupts
from experiments.training.trainer import Progress, train

# One epoch, of 4000 steps.
LONG = ("data=mnist-5k", "device=cpu", "trainer.epochs=1", "trainer.batch_size=1")
EAGER = ("trainer.compile=false", "trainer.compile_model=false", "progress=false")


def config(store: Path, *overrides: str) -> Config:
    return resolve(compose([*LONG, *EAGER, f"store={store}", *overrides]), "mnist-5k")


def same(one: dict, other: dict) -> bool:
    return {**one, "provenance": 0} == {**other, "provenance": 0}


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_an_interrupted_run_resumes_bit_for_bit(
    tmp_path: Path, number: int, error: type[BaseException]
) -> None:
    short = ("trainer.batch_size=40", "trainer.record_every=10")
    wanted = config(tmp_path / "cut", *short)

    def interrupt(progress: Progress) -> None:
        if progress.step == 30:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(error):
        train(wanted, interrupt)
    assert signal.getsignal(number) == before
    state = RunStore(tmp_path / "cut").run(run_hash(wanted)).checkpoint()
    assert state is not None and state["step"] == 30 and state["epoch"] == 0
    found = train(wanted)
    assert found["provenance"]["resumed"] == 1
    assert same(found, train(config(tmp_path / "whole", *short)))


def test_a_second_ctrl_c_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        interrupts.armed = True
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.pending == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it waited")


def test_the_handler_of_a_launcher_is_called_after_the_checkpoint() -> None:
    said: list[str] = []
    earlier = signal.signal(signal.SIGUSR2, lambda *_: said.append("launcher"))
    try:
        with Interrupts() as interrupts:
            interrupts.armed = True
            signal.raise_signal(signal.SIGUSR2)
            assert said == []
            interrupts.check(lambda: said.append("saved"))
        assert said == ["saved", "launcher"]
    finally:
        signal.signal(signal.SIGUSR2, earlier)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [pytest.param(False, marks=pytest.mark.long), True])
def test_sigterm_leaves_a_checkpoint_and_status_143(tmp_path: Path, sweep: bool) -> None:
    """For a single command, and for a sweep, where each worker writes its own."""
    seeds = ("-m", "seed=0,1,2", "workers=2") if sweep else ()
    command = [sys.executable, "-m", "experiments.run", *seeds, *LONG, *EAGER, f"store={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    begun = 2 if sweep else 1
    last = time.monotonic() + 120
    while len(list(tmp_path.glob("*/hypergradients.csv"))) < begun and time.monotonic() < last:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Interrupted. Finished work is kept; give the same command again" in said
    assert "Traceback" not in said and "leaked" not in said
    stores = [RunStore(tmp_path).run(path.parent.name) for path in tmp_path.glob("*/config.json")]
    states = [run.checkpoint() for run in stores]
    assert len(states) == begun
    assert all(state is not None and 0 < state["step"] < 4000 for state in states)
    assert not any(tmp_path.glob("*/lock")) and not (tmp_path / ".sweep").exists()
    if sweep:
        assert "3 runs: 0 finished, 0 failed, 2 cut short, 1 not started." in said
