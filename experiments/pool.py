"""Many runs side by side: one process for each core, each keeping its compiled optimizer steps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from .config import Config, run_hash
from .logger import prepare
from .peers import parse
from .store import RunStore
from .task import headline
from .train import Progress, train

PLAIN_INTERVAL = 30.0  # seconds between two lines where there is no terminal
REPORT_INTERVAL = 0.2  # seconds between two reports of one worker


@dataclass
class Outcome:
    """What became of one run: its summary, or the error that ended it."""

    config: Config
    summary: dict[str, Any] | None = None
    error: str | None = None

    @property
    def reason(self) -> str:
        """The last line of the error."""
        return (self.error or "").rpartition("\n")[2]


def run_all(configs: Sequence[Config], workers: int | None = None) -> list[Outcome]:
    """Do all runs that are not finished yet, the longest first, and return what became of each.

    A run that fails, or whose process dies, takes no other with it. When this process dies, however
    it does, its workers end too.

    Args:
        configs: resolved ones.
        workers: runs side by side; None is one for each core that this process may use, or for each
            GPU where the runs are on several.

    Returns:
        One outcome for each config, in their order.
    """
    outcomes = [Outcome(config) for config in configs]
    waiting: list[Outcome] = []
    for outcome in outcomes:
        outcome.summary = RunStore(outcome.config.store).summary(run_hash(outcome.config))
        if outcome.summary is None:
            waiting.append(outcome)
    if waiting:
        show = all(outcome.config.progress for outcome in outcomes)
        size = workers or _side_by_side(waiting[0].config.device)
        prepare(waiting[0].config)
        _Pool(waiting, size, _display(len(outcomes), len(waiting), show)).run()
    return outcomes


def run_one(config: Config) -> Outcome:
    """Do one run in this process."""
    display = _display(1, 1, config.progress)
    with display:
        display.started(0, config)
        outcome = Outcome(config, train(config, lambda progress: display.moved(0, progress)))
        display.ended(0, outcome)
    return outcome


def explain(error: Exception) -> str:
    """One line for what the command's user can mend; a traceback for a mistake in the program."""
    if isinstance(error, (ValueError, OSError)) and str(error):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def use_gpu(number: int) -> None:
    """Give the `number`-th of the runs side by side a GPU of its own, where there are several."""
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(number % torch.cuda.device_count())


def _side_by_side(device: str) -> int:
    if device == "cuda" and torch.cuda.device_count() > 1:
        return torch.cuda.device_count()
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def structure(config: Config) -> tuple:
    """What one compiled step serves: runs that differ in numbers alone have the same structure."""
    levels = parse(config.stack.notation or "").levels
    return tuple((type(rule).__name__, *rule.tuned) for rule in levels)


class _Worker:
    """A process that does one run after another, and this side's view of it."""

    def __init__(self, slot: int) -> None:
        # A fresh interpreter: forking one in which torch's threads run is not safe.
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        # Large pages: a tenth of ResNet-20's step on a CPU went into being given small ones.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        self.process = context.Process(target=_work, args=(other, slot), daemon=True)
        self.process.start()
        other.close()
        self.structures: set[tuple] = set()
        self.job: Outcome | None = None

    def give(self, job: Outcome) -> None:
        """Raises an OSError where the process has died."""
        self.job = job  # first: if interrupted in between, `end` must not wait for it
        self.structures.add(structure(job.config))
        self.pipe.send(job.config)

    def end(self) -> None:
        """End the process: at once where it still has a run, which can be resumed."""
        if self.job is None:
            self.pipe.close()
            self.process.join(timeout=5.0)
        self.process.kill()
        self.process.join()


class _Pool:
    def __init__(self, jobs: list[Outcome], workers: int, display: _Display) -> None:
        self.waiting = jobs
        self.display = display
        self.size = min(workers, len(jobs))
        self.workers: list[_Worker] = []

    def run(self) -> None:
        with self.display:
            try:
                self.workers = [_Worker(slot) for slot in range(self.size)]
                for slot in range(self.size):
                    self._next_job(slot)
                while any(worker.job for worker in self.workers):
                    self._handle_messages()
            finally:
                for worker in self.workers:
                    worker.end()

    def _next_job(self, slot: int) -> None:
        """Give a worker the longest run; of equals one whose step it has already compiled."""
        if not self.waiting:
            return
        worker = self.workers[slot]
        taken = set[tuple]().union(*(other.structures for other in self.workers))

        def preference(job: Outcome) -> tuple:
            kind = structure(job.config)
            mine, nobodys = kind in worker.structures, kind not in taken
            return job.config.trainer.epochs, mine, nobodys, len(kind)

        job = max(self.waiting, key=preference)
        try:
            worker.give(job)
        except OSError:  # it died since its last run
            worker.end()
            self.workers[slot] = worker = _Worker(slot)
            worker.give(job)
        self.waiting.remove(job)
        self.display.started(slot, job.config)

    def _handle_messages(self) -> None:
        pipes = {worker.pipe: slot for slot, worker in enumerate(self.workers) if worker.job}
        for pipe in wait(list(pipes), timeout=1.0):
            slot = pipes[pipe]  # type: ignore[index]
            worker = self.workers[slot]
            assert worker.job is not None
            try:
                message = worker.pipe.recv()
            except (EOFError, ConnectionError):  # the process died
                worker.process.join()
                config = worker.job.config
                summary = RunStore(config.store).summary(run_hash(config))  # it may have been done
                message = f"its process died with exit code {worker.process.exitcode}"
                self._ended(slot, summary, message if summary is None else None)
                worker.end()
                self.workers[slot] = _Worker(slot)
                self._next_job(slot)
                continue
            if isinstance(message, Progress):
                self.display.moved(slot, message)
                continue
            if isinstance(message, dict):
                self._ended(slot, summary=message)
            else:
                self._ended(slot, error=message)
            self._next_job(slot)

    def _ended(self, slot: int, summary: dict | None = None, error: str | None = None) -> None:
        job = self.workers[slot].job
        assert job is not None
        job.summary, job.error = summary, error
        self.workers[slot].job = None
        self.display.ended(slot, job)


def _work(pipe: Connection, slot: int) -> None:
    """What a worker process does: receive configs; send Progress, then a summary or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_gpu(slot)
    last = 0.0

    def report(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_INTERVAL:
            last = now
            pipe.send(progress)

    while True:
        try:
            config = pipe.recv()
        except EOFError:  # there are no more
            return
        try:
            pipe.send(train(config, report))
        except Exception as error:
            pipe.send(explain(error))


def _end_with_parent() -> None:
    """End this process when its parent has ended, by SIGKILL too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


# What is shown meanwhile.


class _Display(Protocol):
    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: Any) -> None: ...
    def started(self, slot: int, config: Config) -> None: ...
    def moved(self, slot: int, progress: Progress) -> None: ...
    def ended(self, slot: int, outcome: Outcome) -> None: ...


def _display(total: int, waiting: int, show: bool) -> _Display:
    console = Console(stderr=True)
    if not show:
        return _Silence()
    if console.is_terminal:
        return _Bars(console, total, total - waiting)
    return _Lines(total, total - waiting)


def _label(config: Config) -> str:
    return f"{config.row or config.stack.notation}, seed {config.seed}"


def _numbers(progress: Progress) -> str:
    parts = [f"epoch {progress.epoch}/{progress.epochs}"]
    if progress.test is not None:
        parts += [f"loss {progress.train_loss:.4f}", headline(progress.test)]
    if progress.lr is not None:
        parts.append(f"lr {progress.lr:.4g}")
    return "  ".join(parts)


def _outcome(outcome: Outcome) -> str:
    if outcome.summary is None:
        return f"failed: {outcome.reason}"
    if outcome.summary["diverged"]:
        return f"diverged in epoch {outcome.summary['epochs']}"
    return headline(outcome.summary)


class _Silence:
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: Any) -> None: ...
    def started(self, slot: int, config: Config) -> None: ...
    def moved(self, slot: int, progress: Progress) -> None: ...
    def ended(self, slot: int, outcome: Outcome) -> None: ...


class _Bars:
    """For a terminal: a bar for all runs and one for each that is in flight."""

    def __init__(self, console: Console, total: int, finished: int) -> None:
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
        )
        self.total = total
        self.all = self.bars.add_task("all runs", total=total, completed=finished, numbers="")
        self.tasks: dict[int, TaskID] = {}
        self._count(0)

    def __enter__(self) -> None:
        self.bars.start()

    def __exit__(self, *exception: Any) -> None:
        self.bars.stop()

    def started(self, slot: int, config: Config) -> None:
        self.tasks[slot] = self.bars.add_task(_label(config), total=None, numbers="starting")

    def moved(self, slot: int, progress: Progress) -> None:
        self.bars.update(
            self.tasks[slot],
            completed=progress.step,
            total=progress.steps,
            numbers=_numbers(progress),
        )

    def ended(self, slot: int, outcome: Outcome) -> None:
        if outcome.summary is None:
            self.bars.console.print(f"{_label(outcome.config)}: {_outcome(outcome)}", markup=False)
        self.bars.remove_task(self.tasks.pop(slot))
        self._count(1)

    def _count(self, more: int) -> None:
        self.bars.advance(self.all, more)
        done = int(self.bars.tasks[0].completed)
        self.bars.update(self.all, numbers=f"{done}/{self.total}")


class _Lines:
    """For a log: a line every half minute, and one for each run that fails."""

    def __init__(self, total: int, finished: int) -> None:
        self.total, self.finished = total, finished
        self.began = self.last = time.monotonic()
        self.labels: dict[int, str] = {}
        self.numbers: dict[int, str] = {}

    def __enter__(self) -> None:
        print(f"{self.finished} of {self.total} runs are finished", file=sys.stderr, flush=True)

    def __exit__(self, *exception: Any) -> None:
        self._say()

    def started(self, slot: int, config: Config) -> None:
        self.labels[slot], self.numbers[slot] = _label(config), "starting"

    def moved(self, slot: int, progress: Progress) -> None:
        self.numbers[slot] = _numbers(progress)
        if time.monotonic() - self.last > PLAIN_INTERVAL:
            self._say()

    def ended(self, slot: int, outcome: Outcome) -> None:
        self.finished += 1
        label = self.labels.pop(slot)
        if outcome.summary is None:
            print(f"{label}: {_outcome(outcome)}", file=sys.stderr, flush=True)

    def _say(self) -> None:
        self.last = time.monotonic()
        minutes, seconds = divmod(int(self.last - self.began), 60)
        flight = "; ".join(f"{label}: {self.numbers[slot]}" for slot, label in self.labels.items())
        print(
            f"[{minutes}:{seconds:02d}] {self.finished} of {self.total} runs are finished"
            + (f"; in flight: {flight}" if flight else ""),
            file=sys.stderr,
            flush=True,
        )
