"""Harm sweeps in every way that a machine has, and compare them with one that was left alone.

    python -m scripts.fault_injection
    python -m scripts.fault_injection runs=24 kills=10 folder=faults seed=0

A sweep of short runs has its processes killed with SIGKILL at random moments, one of its workers or
all, and is started again each time. Then two sweeps do the same runs at once, one meets checkpoints
that are cut short or of another run, one a data file that is damaged, and one a disk that is full
(where a small tmpfs can be mounted). Each must end with the tidy CSV of the sweep that was left
alone, byte for byte, and say in one line what was wrong. Ends with status 1 where one does not.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.cli import asked_for_help, guarded, number, split
from experiments.records.archive import FILES
from experiments.records.store import RunStore
from experiments.records.tidy import read_summaries

PATIENCE = 600.0  # seconds for one sweep
PAUSE = 1.0  # seconds at most between the moment that a kill is due and the kill


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    runs: str = "24"
    kills: str = "10"
    epochs: str = "30"  # of each run; some 16 steps each
    folder: str = ""  # for the stores; a temporary one by default
    seed: str = "0"  # of the moments


class Harm(Exception):
    """Something was lost or not said."""


class Faults:
    """Sweeps over the same runs, each with a store of its own.

    Args:
        runs: how many; a multiple of 2.
    """

    def __init__(self, folder: Path, runs: int, epochs: int) -> None:
        self.folder, self.runs, self.epochs = folder, runs, epochs

    def start(self, store: Path, *overrides: str) -> subprocess.Popen[str]:
        """The sweep as a process, the leader of a group to which its workers belong."""
        store.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "experiments.run", "-m", "stack.rule=SGD", "stack.lr=0.1"),
            *("stack.height=0,1", f"seed=range(0,{self.runs // 2})", "data=mnist-5k", "device=cpu"),
            *("trainer.compile=false", "trainer.compile_model=false", "trainer.record_every=5"),
            *(f"trainer.epochs={self.epochs}", "workers=2", "progress=false", f"store={store}"),
        ]
        return subprocess.Popen(
            [*command, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def sweep(self, store: Path, *overrides: str) -> tuple[int, str, str]:
        """Do the sweep; its status, and what it said."""
        process = self.start(store, *overrides)
        said, complaint = process.communicate(timeout=PATIENCE)
        return process.returncode, said, complaint

    def finished(self, store: Path) -> int:
        return len(list(store.glob("*/summary.json")))

    def left_alone(self) -> bytes:
        """The tidy CSV that all others must have."""
        store = self.folder / "alone"
        status, _, complaint = self.sweep(store)
        if status:
            raise Harm(f"the sweep that was left alone failed: {complaint}")
        return self.csv(store)

    def csv(self, store: Path) -> bytes:
        """The tidy CSV of the whole sweep, every run of which must be there once and whole."""
        summaries = read_summaries(store)
        if len(summaries) != self.runs:
            raise Harm(f"{store} has {len(summaries)} runs, not {self.runs}")
        for summary in summaries:
            files = {path.name for path in RunStore(store).run(summary["hash"]).path.iterdir()}
            if files != {*FILES}:
                raise Harm(f"run {summary['hash']} has the files {sorted(files)}")
        found = [path for path in (store / "sweeps").glob("*.csv") if lines(path) == self.runs + 1]
        if len(found) != 1:
            raise Harm(f"{store} has {len(found)} tidy CSVs of the whole sweep")
        return found[0].read_bytes()

    def killed(self, kills: int, dice: random.Random) -> tuple[bytes, str]:
        """The sweep whose processes are killed, at moments spread over its whole course."""
        store = self.folder / "killed"
        starts, done, workers = 0, 0, 0
        while done < kills:
            process, starts = self.start(store), starts + 1
            due = done * self.runs // (kills + 1)
            began = time.monotonic()
            known = last_change(store)
            while process.poll() is None:
                waiting = time.monotonic() < began + PATIENCE
                if self.finished(store) < due or (last_change(store) == known and waiting):
                    time.sleep(0.02)
                    continue
                time.sleep(dice.uniform(0, PAUSE))
                if kill(process.pid, one=dice.random() < 0.3, dice=dice):
                    workers += 1
                    done += 1
                    due = done * self.runs // (kills + 1)
                    if done == kills:
                        break
                    continue
                done += 1
                break
            else:
                raise Harm(f"the sweep ended after {done} kills; give more epochs=")
            if done < kills:
                process.communicate(timeout=PATIENCE)
        process.communicate(timeout=PATIENCE)
        status, _, complaint = self.sweep(store)
        if status:
            raise Harm(f"the sweep that was killed fails now: {complaint}")
        resumed = sum(summary["provenance"]["resumed"] > 0 for summary in read_summaries(store))
        words = f"{done} kills, {workers} of them of one worker; {starts} starts; {resumed} resumed"
        return self.csv(store), words

    def at_once(self) -> tuple[bytes, str]:
        """Two sweeps over the same runs in the same store."""
        store = self.folder / "at-once"
        both = [self.start(store), self.start(store)]
        said = [process.communicate(timeout=PATIENCE) for process in both]
        for process, (_, complaint) in zip(both, said, strict=True):
            if process.returncode:
                raise Harm(f"one of two sweeps at once failed: {complaint}")
        if said[0][0] != said[1][0]:
            raise Harm("two sweeps at once do not tell the same")
        return self.csv(store), "both told the same"

    def bad_checkpoints(self) -> tuple[bytes, str]:
        """A checkpoint that is cut short, and one that is another run's."""
        store = self.folder / "checkpoints"
        process = self.start(store)
        while process.poll() is None and len(list(store.glob("*/checkpoint.pt"))) < 2:
            time.sleep(0.01)
        kill(process.pid)
        process.communicate(timeout=PATIENCE)
        found = sorted(store.glob("*/checkpoint.pt"))
        if len(found) < 2:
            raise Harm("there were no two checkpoints to harm; give more epochs=")
        shutil.copy(found[1], found[0])
        found[1].write_bytes(found[1].read_bytes()[:1000])
        status, _, complaint = self.sweep(store)
        if status or complaint.count("the run starts again from its beginning") != 2:
            raise Harm(f"two bad checkpoints ended with status {status} and: {complaint}")
        return self.csv(store), complaint.strip()

    def bad_data(self) -> tuple[bytes, str]:
        """A data file that is damaged: nothing is done, and what was done stays."""
        store = self.folder / "alone"
        damaged = self.folder / "damaged"
        damaged.mkdir()
        (damaged / "mnist.npz").write_bytes(os.urandom(10_000))
        status, _, complaint = self.sweep(store, "data=mnist", f"data.root={damaged}")
        if status != 2 or complaint.count("\n") != 1 or "mnist.npz" not in complaint:
            raise Harm(f"a damaged data file ended with status {status} and: {complaint}")
        return self.csv(store), complaint.strip()

    def full_disk(self) -> tuple[bytes, str]:
        """A disk with room for a few runs, and then for all."""
        with tmpfs(self.folder / "disk", "32m") as store:
            ballast = store / "ballast"
            ballast.write_bytes(bytes(30 << 20))
            status, _, complaint = self.sweep(store)
            before = self.finished(store)
            if status != 1 or "the disk is full" not in complaint or "Traceback" in complaint:
                raise Harm(f"a full disk ended with status {status} and: {complaint}")
            ballast.unlink()
            status, _, complaint_later = self.sweep(store)
            if status:
                raise Harm(f"the sweep fails when there is room again: {complaint_later}")
            (line, *_) = (line for line in complaint.splitlines() if "the disk is full" in line)
            return self.csv(store), f"with {before} runs finished: {line}"


def last_change(store: Path) -> int:
    """Changes whenever an epoch has ended."""
    return max((path.stat().st_mtime_ns for path in store.glob("*/curves.csv")), default=0)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def kill(leader: int, one: bool = False, dice: random.Random | None = None) -> bool:
    """SIGKILL for a sweep's processes, or for one of its workers; whether it was one of these."""
    group = [pid for pid in processes() if with_group(pid) == leader and pid != leader]
    workers = [pid for pid in group if b"spawn_main" in command_line(pid)]
    if one and dice is not None and workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(workers), signal.SIGKILL)
        return True
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    return False


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def with_group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class NoMount(Exception):
    """This user may not mount a file system."""


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        raise NoMount(str(error)) from None
    if done.returncode:
        raise NoMount(done.stderr.strip())
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def inject_all(folder: Path, runs: int, kills: int, epochs: int, seed: int) -> bool:
    """All harms one after the other; whether each ended as it should."""
    this = Faults(folder, runs, epochs)
    alone = this.left_alone()
    print(f"left alone: {runs} runs, {len(alone)} bytes of CSV", flush=True)
    harms = {
        "killed": lambda: this.killed(kills, random.Random(seed)),
        "two at once": this.at_once,
        "bad checkpoints": this.bad_checkpoints,
        "damaged data": this.bad_data,
        "full disk": this.full_disk,
    }
    good = True
    for name, harm in harms.items():
        try:
            found, words = harm()
            if found != alone:
                raise Harm("its tidy CSV is another one")
        except NoMount as error:
            print(f"{name}: left out, {error}", flush=True)
        except Harm as error:
            good = False
            print(f"{name}: FAILED, {error}", flush=True)
        else:
            print(f"{name}: the same CSV; {words}", flush=True)
    return good


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    runs, kills, epochs, seed = (
        number(options, name) for name in ("runs", "kills", "epochs", "seed")
    )
    if runs < 2 or runs % 2:
        raise ValueError(f"runs={runs} must be an even number above 0")
    if kills < 1 or epochs < 1:
        raise ValueError(f"kills={kills} and epochs={epochs} must be 1 or more")
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        if options.folder:
            folder = Path(options.folder)
            if folder.exists():
                raise ValueError(f"folder={folder} is there already; give one that is not")
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return 0 if inject_all(folder, runs, kills, epochs, seed) else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
