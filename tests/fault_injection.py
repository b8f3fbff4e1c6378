"""Harm sweeps in every way that a machine can, and compare them with an undisturbed sweep.

    python tests/fault_injection.py
    python tests/fault_injection.py runs=24 kills=10 launcher=joblib folder=faults seed=0

A sweep of short runs, shown on a stand-in for W&B, has its processes killed at random moments, with
SIGKILL and with SIGTERM, one of its workers or all, and is started again each time. Then two sweeps
do the same runs at once, one meets checkpoints that are cut short or of another run, one a data
file that is damaged, one a clock that jumps, one a disk that is full and one a store that cannot be
written to (where a small tmpfs can be mounted). Each must end with the tidy CSV of the sweep that
was left alone, byte for byte, have each step once on W&B, do nothing again when it is given once
more, and say in one line what was wrong. Ends with status 1 where one does not. With launcher=slurm
it starts a Slurm of one node; `harms` names some of the harms.
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

import slurm
import torch
from wandb_server import KEY, Server, serve

from experiments.cli import asked_for_help, choose, guarded, number, split
from experiments.records.archive import FILES
from experiments.records.store import RunStore
from experiments.records.tidy import read_summaries

PATIENCE = 600.0  # seconds for one sweep
PAUSE = 1.0  # maximum seconds between the planned and the actual kill

# Python imports this first in each process of a sweep whose clock jumps.
JUMPS = """
import time
clock, clock_ns = time.time, time.time_ns
time.time = lambda: clock() + 86400 * (int(clock()) % 2)
time.time_ns = lambda: int(time.time() * 1e9)
"""


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    runs: str = "24"
    kills: str = "10"
    epochs: str = "30"  # of each run; some 16 steps each
    folder: str = ""  # for the stores; a temporary one by default
    seed: str = "0"  # of the moments
    launcher: str = "pool"  # or joblib or slurm
    harms: str = ""  # all


class Harm(Exception):
    """Something was lost or not reported."""


class Faults:
    """Sweeps over the same runs, each with a store of its own.

    Args:
        runs: how many; a multiple of 2.
    """

    def __init__(
        self,
        folder: Path,
        runs: int,
        epochs: int,
        launcher: str = "pool",
        environment: dict[str, str] | None = None,
        server: Server | None = None,
    ) -> None:
        self.folder, self.runs, self.epochs = folder, runs, epochs
        self.launcher, self.environment, self.server = launcher, environment or {}, server

    def place(self, name: str) -> Path:
        """Make a new store; W&B forgets the last store's runs, which have the same hashes."""
        if self.server is not None:
            self.server.forget()
        return self.folder / name

    def start(self, store: Path, *overrides: str) -> subprocess.Popen[str]:
        """The sweep as a process, the leader of a group to which its workers belong."""
        store.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "experiments.run", "-m", "stack.rule=SGD", "stack.lr=0.1"),
            *("stack.height=0,1", f"seed=range(0,{self.runs // 2})", "data=mnist-5k", "device=cpu"),
            *("trainer.compile=false", "trainer.compile_model=false", "trainer.record_every=5"),
            *(f"trainer.epochs={self.epochs}", "workers=2", "progress=false", f"store={store}"),
        ]
        if self.launcher != "pool":
            command.append(f"hydra/launcher={self.launcher}")
        if self.launcher == "joblib":
            command.append("hydra.launcher.n_jobs=2")
        if self.server is not None:
            command.append("logger=wandb")
        return subprocess.Popen(
            [*command, *overrides],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def sweep(self, store: Path, *overrides: str) -> tuple[int, str, str]:
        """Do the sweep; returns its status and output."""
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
        """The tidy CSV of the whole sweep, which must have every run once and complete."""
        summaries = read_summaries(store)
        if len(summaries) != self.runs:
            raise Harm(f"{store} has {len(summaries)} runs, not {self.runs}")
        for summary in summaries:
            folder = RunStore(store).run(summary["hash"]).path
            files = {path.name for path in folder.iterdir()} - {"wandb", "wandb.json"}
            if files != {*FILES}:
                raise Harm(f"run {summary['hash']} has the files {sorted(files)}")
            if self.server is not None and store.name != "alone":
                self.check_shown(folder)
        found = [path for path in (store / "sweeps").glob("*.csv") if lines(path) == self.runs + 1]
        if len(found) != 1:
            raise Harm(f"{store} has {len(found)} tidy CSVs of the whole sweep")
        return found[0].read_bytes()

    def check_shown(self, folder: Path) -> None:
        """Raise a Harm unless W&B has each step of a run once."""
        assert self.server is not None
        rows = [line.partition(",")[0] for line in (folder / "hyperparameters.csv").open()][1:]
        steps = sorted(row["_step"] for row in self.server.received.get(folder.name, []))
        if steps != [0, *map(int, rows)]:
            raise Harm(f"W&B was sent {len(steps)} rows of run {folder.name}, not {len(rows) + 1}")

    def again(self, store: Path) -> None:
        """Raise a Harm if the same command does a run again."""
        before = {path: path.stat().st_mtime_ns for path in store.glob("*/summary.json")}
        status, _, complaint = self.sweep(store)
        after = {path: path.stat().st_mtime_ns for path in store.glob("*/summary.json")}
        if status or before != after:
            raise Harm(f"given once more it ended with status {status}: {complaint}")

    def killed(
        self, kills: int, dice: random.Random, number: int = signal.SIGKILL
    ) -> tuple[bytes, str]:
        """The sweep whose processes are killed, at moments spread over its whole course."""
        store = self.place(f"killed-{number:d}")
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
                if kill(process.pid, dice.random() < 0.3, dice, number):
                    workers += 1
                    done += 1
                    due = done * self.runs // (kills + 1)
                    if done == kills:
                        break
                    continue
                done += 1
                break
            else:  # as joblib's does when one of its workers has died
                if self.finished(store) == self.runs:
                    raise Harm(f"the sweep ended after {done} kills; give more epochs=")
            if done < kills:
                process.communicate(timeout=PATIENCE)
        process.communicate(timeout=PATIENCE)
        status, _, complaint = self.sweep(store)
        if status:
            raise Harm(f"the sweep that was killed fails now: {complaint}")
        self.again(store)
        resumed = sum(summary["provenance"]["resumed"] > 0 for summary in read_summaries(store))
        words = f"{done} kills, {workers} of them of one worker; {starts} starts; {resumed} resumed"
        return self.csv(store), words

    def at_once(self) -> tuple[bytes, str]:
        """Start two sweeps over the same runs in the same store."""
        store = self.place("at-once")
        both = [self.start(store), self.start(store)]
        said = [process.communicate(timeout=PATIENCE) for process in both]
        for process, (_, complaint) in zip(both, said, strict=True):
            if process.returncode:
                raise Harm(f"one of two sweeps at once failed: {complaint}")
        if said[0][0] != said[1][0]:
            raise Harm("two sweeps at once do not tell the same")
        return self.csv(store), "both told the same"

    def bad_checkpoints(self) -> tuple[bytes, str]:
        """A truncated checkpoint, and a checkpoint of another run."""
        store = self.place("checkpoints")
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
        if status or complaint.count("the run starts again from the beginning") != 2:
            raise Harm(f"two bad checkpoints ended with status {status} and: {complaint}")
        return self.csv(store), complaint.strip()

    def bad_data(self) -> tuple[bytes, str]:
        """A damaged data file: no run is done, and finished runs stay."""
        store = self.folder / "alone"
        damaged = self.folder / "damaged"
        damaged.mkdir()
        (damaged / "mnist.npz").write_bytes(os.urandom(10_000))
        status, _, complaint = self.sweep(store, "data=mnist", f"data.root={damaged}")
        if status != 2 or complaint.count("\n") != 1 or "mnist.npz" not in complaint:
            raise Harm(f"a damaged data file ended with status {status} and: {complaint}")
        return self.csv(store), complaint.strip()

    def jumping_clock(self) -> tuple[bytes, str]:
        """A clock that jumps by a day, back and forth, every second."""
        store, code, known = self.place("clock"), self.folder / "code", self.environment
        code.mkdir()
        (code / "sitecustomize.py").write_text(JUMPS)
        self.environment = {**known, "PYTHONPATH": str(code)}
        status, _, complaint = self.sweep(store)
        self.environment = known
        if status:
            raise Harm(f"a clock that jumps ended with status {status} and: {complaint}")
        return self.csv(store), "by a day, back and forth"

    def read_only(self) -> tuple[bytes, str]:
        """A store that is unwritable, then writable."""
        with tmpfs(self.place("read-only"), "64m") as store:
            remount = ["mount", "-o", "remount,ro", str(store)]
            subprocess.run(remount, check=True)
            status, _, complaint = self.sweep(store)
            if status not in (1, 2) or "Traceback" in complaint or "Read-only" not in complaint:
                raise Harm(f"a read-only store ended with status {status} and: {complaint}")
            subprocess.run(["mount", "-o", "remount,rw", str(store)], check=True)
            status, _, later = self.sweep(store)
            if status:
                raise Harm(f"the sweep fails when the store can be written to: {later}")
            (line, *_) = (line for line in complaint.splitlines() if "Read-only" in line)
            return self.csv(store), line

    def full_disk(self) -> tuple[bytes, str]:
        """A disk with room for a few runs, and then for all."""
        with tmpfs(self.place("disk"), "32m") as store:
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
    """A value that changes at the end of every epoch."""
    return max((path.stat().st_mtime_ns for path in store.glob("*/curves.csv")), default=0)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def kill(
    leader: int,
    one: bool = False,
    dice: random.Random | None = None,
    number: int = signal.SIGKILL,
) -> bool:
    """Signal a sweep's processes or one worker; returns whether it was a worker."""
    group = [pid for pid in processes() if with_group(pid) == leader and pid != leader]
    workers = [pid for pid in group if is_worker(pid)] + jobs()
    if one and dice is not None and workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(workers), number)
        return True
    for pid in jobs():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)
    return False


def is_worker(pid: int) -> bool:
    """Whether a process is a worker of the pool or of joblib."""
    line = command_line(pid)
    return b"spawn_main" in line or b"popen_loky_posix" in line


def jobs() -> list[int]:
    """The processes of jobs on the Slurm of this drill."""
    mark = f"SLURM_CONF={os.environ.get('DRILL_SLURM', 'none')}\0".encode()
    return [
        pid
        for pid in processes()
        if b"submitit.core._submit" in command_line(pid) and mark in environment_of(pid)
    ]


def environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


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
    """This user cannot mount a file system."""


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


def inject_all(
    folder: Path,
    runs: int,
    kills: int,
    epochs: int,
    seed: int,
    launcher: str = "pool",
    chosen: str = "",
) -> bool:
    """Do all harms one after the other; returns whether each ended correctly."""
    with contextlib.ExitStack() as stack:
        server, url = stack.enter_context(serve())
        environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}
        if launcher == "slurm":
            if reason := slurm.why_not():
                raise ValueError(reason)
            (folder / "slurm").mkdir(parents=True)
            environment |= stack.enter_context(slurm.cluster(folder / "slurm"))
            os.environ["DRILL_SLURM"] = environment["SLURM_CONF"]
        sweeps = Faults(folder, runs, epochs, launcher, environment, server)
        return _inject(sweeps, kills, seed, chosen)


def _inject(this: Faults, kills: int, seed: int, chosen: str) -> bool:
    alone = this.left_alone()
    print(f"{this.launcher}, left alone: {this.runs} runs, {len(alone)} bytes of CSV", flush=True)
    harms = {
        "SIGKILL": lambda: this.killed(kills, random.Random(seed)),
        "SIGTERM": lambda: this.killed(kills, random.Random(seed), signal.SIGTERM),
        "two at once": this.at_once,
        "bad checkpoints": this.bad_checkpoints,
        "damaged data": this.bad_data,
        "jumping clock": this.jumping_clock,
        "full disk": this.full_disk,
        "read-only store": this.read_only,
    }
    if chosen:
        harms = {name: harms[choose("harms", name, list(harms))] for name in chosen.split(",")}
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
    choose("launcher", options.launcher, ("pool", "joblib", "slurm"))
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
        return (
            0
            if inject_all(folder, runs, kills, epochs, seed, options.launcher, options.harms)
            else 1
        )


if __name__ == "__main__":
    sys.exit(guarded(main))
