"""A sweep on a real Slurm of one node: each job's end, and repeating the command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import slurm
from gate import Gate

from experiments.config.compose import compose
from experiments.config.resolve import resolve
from experiments.records.store import RunStore
from experiments.records.tidy import tidy_csv
from experiments.training.trainer import train

FIXED = ("data=mnist-5k", "device=cpu", "trainer.compile=false", "trainer.compile_model=false")
LENGTH = "trainer.epochs=4"
SWEEP = ("-m", "seed=0,1,2,3", "hydra/launcher=submitit_slurm", *FIXED, LENGTH)


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    if reason := slurm.why_not():
        pytest.skip(reason)
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield {**os.environ, **environment}


def start(store: Path, environment: dict[str, str], *more: str) -> "subprocess.Popen[str]":
    """Start the sweep; the file `said` beside the store has its standard error."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(store.with_name("said"), "w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.run", *SWEEP, f"store={store}", *more],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, "it took too long"
        time.sleep(0.2)


def kill(mark: bytes) -> None:
    """Send SIGKILL to a job's Python process, which has `mark` in its environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes() and b"_submit" in (path.parent / "cmdline").read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


def alive(queue: dict[str, str]) -> bool:
    """Whether Slurm still has a job on its node."""
    mark = f"SLURM_CONF={queue['SLURM_CONF']}\0".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            name = (path.parent / "cmdline").read_bytes()
            if b"slurmstepd" in name and mark in path.read_bytes():
                return True
    return False


@pytest.mark.slow
def test_jobs_end_independently_and_the_same_command_does_the_rest(
    tmp_path: Path, queue: dict[str, str]
) -> None:
    """One is cancelled, one requeued, one warned of its time limit, one killed."""

    gate, store, said = Gate(tmp_path / "gate"), tmp_path / "store", tmp_path / "said"
    environment = {**queue, **gate.environment}

    def ask(*command: str) -> str:
        done = subprocess.run(command, env=queue, capture_output=True, text=True, timeout=30)
        return done.stdout

    def run_of(seed: int) -> str:
        for path in store.glob("*/config.json"):
            if json.loads(path.read_text())["seed"] == seed:
                return path.parent.name
        return ""

    def waits(seed: int) -> bool:
        return bool(run_of(seed)) and gate.waits(run_of(seed))

    first = start(store, environment)
    wait_for(lambda: (waits(0) and waits(1)) or first.poll() is not None)
    names = ask("squeue", "--array", "--noheader", "--format=%i|%j")
    assert "1_3|sweep_SGD(0.01)_height_1_seed_3" in names
    assert re.search(r"0 of 4 runs are finished, 2 pending, 2 running", said.read_text())
    ask("scancel", "1_0")
    ask("scontrol", "requeue", "1_1")
    wait_for(lambda: not waits(1))
    gate.open(run_of(1))
    wait_for(lambda: waits(2) and waits(3))
    ask("scancel", "--signal=USR2", "1_2")
    kill(b"SLURM_ARRAY_TASK_ID=3\0")
    wait_for(lambda: not waits(2))
    gate.open(run_of(2))
    out, _ = first.communicate(timeout=300)
    err = said.read_text()
    assert first.returncode == 1
    assert re.search(r"^job 1_2: SGD\(0.01\) height 1, seed 2, log \S+err$", err, re.M)
    assert "1 run failed: it was cancelled (Slurm job 1_0: CANCELLED)" in err
    assert "1 run failed: its process failed (Slurm job 1_3: FAILED)" in err
    assert "4 runs: 2 finished, 2 failed, 0 not started.\n" in err
    assert "Traceback" not in err and "sacct" not in err
    found = {path.parent.name for path in store.glob("*/summary.json")}
    summaries = [RunStore(store).summary(name) or {} for name in found]
    assert sorted(summary["seed"] for summary in summaries) == [1, 2]
    assert all(summary["provenance"]["resumed"] for summary in summaries)
    assert "The tidy CSV of 2 runs is" in out

    (gate.folder / f"{run_of(3)}.waits").unlink()  # which it left when it was killed
    second = start(store, environment)  # only what is left is queued; then the command is stopped
    wait_for(lambda: waits(0) and waits(3))
    (noted,) = store.glob(".sweep/*/jobs.json")
    queued = [job["id"] for job in json.loads(noted.read_text())]
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=300)
    err = said.read_text()
    assert second.returncode == 130
    assert "2 jobs continue without this command" in err and f"scancel {' '.join(queued)}" in err
    third = start(store, environment)
    wait_for(
        lambda: (
            "queued jobs already have these runs" in said.read_text() or third.poll() is not None
        )
    )
    for seed in (0, 3):
        gate.open(run_of(seed))
    out, _ = third.communicate(timeout=300)
    err = said.read_text()
    assert third.returncode == 0, err
    assert "4 runs: 4 finished, 0 failed, 0 not started." in err
    assert f"2 queued jobs already have these runs: {', '.join(queued)}" in err
    ids = ask("squeue", "--array", "--states=all", "--noheader", "--format=%i").split()
    assert {*ids} <= {"1_0", "1_1", "1_2", "1_3", *queued}  # nothing was queued a third time
    path = Path(re.findall(r"The tidy CSV of 4 runs is (\S+)", out)[0])
    alone = tmp_path / "alone"
    configs = [compose([*FIXED, LENGTH, f"seed={seed}", f"store={alone}"]) for seed in range(4)]
    assert path.read_text() == tidy_csv([train(resolve(one, "mnist-5k")) for one in configs])

    bad = start(tmp_path / "other", queue, "hydra.launcher.partition=nope")
    bad.communicate(timeout=300)
    err = said.read_text()
    assert bad.returncode == 2 and err.count("\n") == 1
    assert err.startswith("error: Slurm took no job: ") and "artition" in err


def resumed(store: Path) -> list[int]:
    """How often each run has resumed from a checkpoint."""
    summaries = map(json.loads, (path.read_text() for path in store.glob("*/summary.json")))
    return [summary["provenance"]["resumed"] for summary in summaries]


@pytest.mark.long
def test_runs_resume_after_a_node_failure(tmp_path: Path, queue: dict[str, str]) -> None:
    gate, store = Gate(tmp_path / "gate"), tmp_path / "store"

    def node(state: str) -> None:
        asked = ["sinfo", "--noheader", "--format=%n"]
        name = subprocess.run(asked, env=queue, capture_output=True, text=True).stdout.strip()
        words = [f"NodeName={name}", f"State={state}", "Reason=test"]
        subprocess.run(["scontrol", "update", *words], env=queue, check=True)

    sweep = start(store, {**queue, **gate.environment}, "seed=0,1")
    wait_for(lambda: len(gate.waiting()) == 2 or sweep.poll() is not None)
    names = gate.waiting()
    node("DOWN")
    wait_for(lambda: not alive(queue))
    for name in names:
        gate.open(name)
    node("RESUME")
    sweep.communicate(timeout=600)
    assert sweep.returncode == 0, (tmp_path / "said").read_text()
    assert resumed(store) == [1, 1]


@pytest.mark.long
def test_a_run_resumes_after_its_time_limit(tmp_path: Path, queue: dict[str, str]) -> None:
    """Slurm ends the run and gives the reason; the same command does the rest."""
    gate, store, said = Gate(tmp_path / "gate"), tmp_path / "store", tmp_path / "said"
    environment = {**queue, **gate.environment}
    sweep = start(store, environment, "seed=0")
    wait_for(lambda: gate.waiting() or sweep.poll() is not None)
    (name,) = gate.waiting()
    (job,) = re.findall(r"^job (\S+):", said.read_text(), re.M)
    limit = ["scontrol", "update", f"JobId={job}", "TimeLimit=1"]
    subprocess.run(limit, env=queue, check=True)
    sweep.communicate(timeout=600)
    failure = f"1 run failed: it reached its time limit (Slurm job {job}: TIMEOUT"
    assert sweep.returncode == 1 and failure in said.read_text()
    gate.open(name)
    again = start(store, environment, "seed=0")
    again.communicate(timeout=600)
    assert again.returncode == 0 and resumed(store) == [1]


@pytest.mark.long
def test_a_job_out_of_memory_is_reported(tmp_path: Path, queue: dict[str, str]) -> None:
    """A gate that stays shut keeps it there until Slurm has looked."""
    gate = Gate(tmp_path / "gate")
    little = "hydra.launcher.mem_gb=0.2"
    sweep = start(tmp_path / "store", {**queue, **gate.environment}, "seed=0", little)
    sweep.communicate(timeout=600)
    said = (tmp_path / "said").read_text()
    assert sweep.returncode == 1 and "1 run failed: it ran out of memory (Slurm job" in said


def test_without_slurm_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = start(tmp_path / "store", {**os.environ, "PATH": str(tmp_path)})
    process.communicate(timeout=300)
    assert process.returncode == 2
    assert (tmp_path / "said").read_text() == (
        "error: Slurm took no job: sbatch is not installed; give the command on a machine of the "
        "cluster\n"
    )
