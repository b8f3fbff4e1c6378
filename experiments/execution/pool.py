"""Parallel runs: one worker process for each core. Each worker keeps its compiled steps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

import torch

from experiments.cli import Terminated
from experiments.config.baselines import parse
from experiments.config.identity import run_hash
from experiments.config.schema import Config
from experiments.execution.outcome import Outcome, explain
from experiments.execution.progress import Display
from experiments.records.loggers.catalog import find
from experiments.records.store import RunStore
from experiments.training.trainer import Progress, train

GRACE = 20.0  # seconds for interrupted workers to write their checkpoints
REPORT_INTERVAL = 0.2  # seconds between two reports of one worker


def run_all(configs: Sequence[Config], workers: int | None = None) -> list[Outcome]:
    """Do all runs that are not finished yet, the longest first.

    A run that fails, or whose process dies, does not affect the others. If this process dies, for
    any reason, its workers end too.

    Args:
        configs: resolved configs.
        workers: parallel runs; None is one for each available core, or one for each GPU if there
            are several.

    Returns:
        One outcome for each config, in the same order.
    """
    outcomes = [Outcome(config) for config in configs]
    fill(outcomes, workers)
    return outcomes


def fill(outcomes: Sequence[Outcome], workers: int | None = None) -> None:
    """Do the runs of `outcomes` as `run_all` does; an interrupt leaves the finished ones filled."""
    waiting: list[Outcome] = []
    for outcome in outcomes:
        outcome.summary = RunStore(outcome.config.store).finished(run_hash(outcome.config))
        if outcome.summary is None:
            waiting.append(outcome)
    if waiting:
        show = all(outcome.config.progress for outcome in outcomes)
        size = workers or _side_by_side(waiting[0].config.device)
        find(waiting[0].config).prepare()
        _Pool(waiting, size, Display(len(outcomes), len(outcomes) - len(waiting), show)).run()


def run_one(config: Config) -> Outcome:
    """Do one run in this process."""
    display = Display(1, 0, config.progress)
    with display:
        display.started(0, config)
        outcome = Outcome(config, train(config, lambda progress: display.moved(0, progress)))
        display.ended(0, outcome)
    return outcome


def use_gpu(number: int) -> None:
    """With several GPUs, give each of the parallel runs its own; `number` counts the runs."""
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(number % torch.cuda.device_count())


def _side_by_side(device: str) -> int:
    if device == "cuda" and torch.cuda.device_count() > 1:
        return torch.cuda.device_count()
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def structure(config: Config) -> tuple:
    """The part of a config that a compiled step depends on: rules and tuned names, not numbers."""
    levels = parse(config.stack.notation or "").levels
    return tuple((type(rule).__name__, *rule.tuned) for rule in levels)


class _Worker:
    """A process that does one run after another, as its parent sees it."""

    def __init__(self, slot: int) -> None:
        # A fresh interpreter: forking a process with torch's threads is not safe.
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        # Large pages: allocating small pages took a tenth of ResNet-20's step on a CPU.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        self.process = context.Process(target=_work, args=(other, slot), daemon=True)
        self.process.start()
        other.close()
        self.structures: set[tuple] = set()
        self.job: Outcome | None = None

    def give(self, job: Outcome) -> None:
        """Start a job.

        Raises:
            OSError: the process has died.
        """
        job.started = True
        self.job = job  # before sending, so that `stop` terminates the process on an interrupt
        self.structures.add(structure(job.config))
        self.pipe.send(job.config)

    def stop(self) -> None:
        """Ask the process to end; a worker with a run first writes a checkpoint."""
        if self.job is None:
            self.pipe.close()
        else:
            self.process.terminate()

    def end(self, patience: float = 5.0) -> None:
        """Wait for the process to end; kill it after `patience` seconds."""
        try:
            self.process.join(timeout=patience)
        finally:
            self.process.kill()
            self.process.join()


class _Pool:
    def __init__(self, jobs: list[Outcome], workers: int, display: Display) -> None:
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
                    worker.stop()
                last = time.monotonic() + GRACE
                for worker in self.workers:
                    worker.end(max(0.0, last - time.monotonic()))

    def _next_job(self, slot: int) -> None:
        """Give a worker the longest run; among equals, prefer a step that it has compiled."""
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
        except OSError:  # the process died after its last run
            worker.end(0.0)
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
                # It may have died after the run was finished.
                summary = RunStore(config.store).summary(run_hash(config))
                message = f"its process died with exit code {worker.process.exitcode}"
                self._ended(slot, summary, message if summary is None else None)
                worker.end(0.0)
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
    """Main loop of a worker process: receive configs; send Progress, then a summary or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
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
        except EOFError:  # no more configs
            return
        try:
            pipe.send(train(config, report))
        except Terminated:
            os._exit(143)
        except Exception as error:
            pipe.send(explain(error))


def _end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
