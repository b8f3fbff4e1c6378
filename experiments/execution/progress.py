"""What is shown while runs go on: bars on a terminal, lines in a log, or nothing."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from experiments.config.schema import Config
from experiments.execution.outcome import Outcome
from experiments.tasks.catalog import headline
from experiments.training.trainer import Progress

PLAIN_INTERVAL = 30.0  # seconds between two lines where there is no terminal


class Display(Protocol):
    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: Any) -> None: ...
    def started(self, slot: int, config: Config) -> None: ...
    def moved(self, slot: int, progress: Progress) -> None: ...
    def ended(self, slot: int, outcome: Outcome) -> None: ...


def make_display(total: int, waiting: int, show: bool) -> Display:
    console = Console(stderr=True)
    if not show:
        return Silence()
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


class Silence:
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
        self.failed = 0
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
        self.failed += outcome.summary is None
        self.bars.remove_task(self.tasks.pop(slot))
        self._count(1)

    def _count(self, more: int) -> None:
        self.bars.advance(self.all, more)
        done = int(self.bars.tasks[0].completed)
        failed = f", {self.failed} failed" if self.failed else ""
        self.bars.update(self.all, numbers=f"{done}/{self.total}{failed}")


class _Lines:
    """For a log: a line every half minute, and when a run fails."""

    def __init__(self, total: int, finished: int) -> None:
        self.total, self.finished, self.failed = total, finished, 0
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
        del self.labels[slot]
        if outcome.summary is None:
            self.failed += 1
            self._say()
        else:
            self.finished += 1

    def _say(self) -> None:
        self.last = time.monotonic()
        minutes, seconds = divmod(int(self.last - self.began), 60)
        flight = "; ".join(f"{label}: {self.numbers[slot]}" for slot, label in self.labels.items())
        print(
            f"[{minutes}:{seconds:02d}] {self.finished} of {self.total} runs are finished"
            + (f", {self.failed} failed" if self.failed else "")
            + (f"; in flight: {flight}" if flight else ""),
            file=sys.stderr,
            flush=True,
        )
