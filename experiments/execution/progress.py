"""Progress of runs: bars on a terminal, lines in a log, or nothing."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from experiments.config.schema import Config
from experiments.execution.outcome import Outcome
from experiments.tasks.catalog import headline
from experiments.training.trainer import Progress

PLAIN_INTERVAL = 30.0  # seconds between two lines without a terminal


def _numbers(progress: Progress) -> str:
    parts = [f"epoch {progress.epoch}/{progress.epochs}"]
    if progress.test is not None:
        parts += [f"loss {progress.train_loss:.4f}", headline(progress.test)]
    if progress.lr is not None:
        parts.append(f"lr {progress.lr:.4g}")
    return "  ".join(parts)


class Display:
    """Shows a bar for all runs and one for each active run, or a line every half minute.

    Args:
        total, finished: the number of all runs, and of those finished before this command.
        show: whether to show anything.
    """

    def __init__(self, total: int, finished: int, show: bool) -> None:
        self.console = Console(stderr=True, quiet=not show, highlight=False, soft_wrap=True)
        self.total, self.finished, self.failed = total, finished, 0
        self.flight: dict[int, TaskID] = {}  # active runs, by the worker's slot
        self.began = self.last = time.monotonic()
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self.all = self.bars.add_task("all runs", total=total, numbers="")

    def __enter__(self) -> None:
        self._count()
        self.bars.start()
        if not self.console.is_terminal:
            self.console.print(f"{self.finished} of {self.total} runs are finished")

    def __exit__(self, *exception: Any) -> None:
        self.bars.stop()
        self._say()

    def started(self, slot: int, config: Config) -> None:
        label = f"{config.row or config.stack.notation}, seed {config.seed}"
        self.flight[slot] = self.bars.add_task(label, total=None, numbers="starting")

    def moved(self, slot: int, progress: Progress) -> None:
        self.bars.update(
            self.flight[slot],
            completed=progress.step,
            total=progress.steps,
            numbers=_numbers(progress),
        )
        if time.monotonic() - self.last > PLAIN_INTERVAL:
            self._say()

    def ended(self, slot: int, outcome: Outcome) -> None:
        self.bars.remove_task(self.flight.pop(slot))
        self.finished += outcome.summary is not None
        self.failed += outcome.summary is None
        self._count()
        if outcome.summary is None:
            self._say()

    def _count(self) -> None:
        failed = f", {self.failed} failed" if self.failed else ""
        done = self.finished + self.failed
        self.bars.update(self.all, completed=done, numbers=f"{done}/{self.total}{failed}")

    def _say(self) -> None:
        """Print a line if there is no terminal."""
        if self.console.is_terminal:
            return
        self.last = time.monotonic()
        minutes, seconds = divmod(int(self.last - self.began), 60)
        tasks = [task for task in self.bars.tasks if task.id != self.all]
        flight = "; ".join(f"{task.description}: {task.fields['numbers']}" for task in tasks)
        self.console.print(
            f"[{minutes}:{seconds:02d}] {self.finished} of {self.total} runs are finished"
            + (f", {self.failed} failed" if self.failed else "")
            + (f"; in flight: {flight}" if flight else ""),
            markup=False,
        )
