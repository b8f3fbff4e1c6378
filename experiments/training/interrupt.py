"""Signals that end a run: Ctrl-C, SIGTERM, and a cluster's time-limit warning.

During training, a run finishes the current step and writes a checkpoint before it stops.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from experiments.cli import Terminated

# A launcher may have its own SIGUSR2 handler; submitit's requeues the job. It runs after the
# checkpoint.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupts:
    """A context in which signals wait for `check`.

    Attributes:
        armed: whether signals wait; else they interrupt at once. A second Ctrl-C never waits.
    """

    def __init__(self) -> None:
        self.armed = False
        self.pending: int | None = None
        self.earlier: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                known = signal.getsignal(number)
                if number == signal.SIGUSR2 and not callable(known):
                    continue
                if known is not signal.SIG_IGN:
                    self.earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
        if error[0] is None:  # a signal may have come after the last step
            self.check()

    def check(self, save: Callable[[], object] = lambda: None) -> None:
        """If a signal has come, call `save` and raise.

        Raises:
            KeyboardInterrupt: on SIGINT; its subclass Terminated on SIGTERM.
        """
        if self.pending is not None:
            save()
            self._interrupt(self.pending)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.pending == number == signal.SIGINT
        if not self.armed or again:
            self._interrupt(number)
        self.pending = self.pending or number

    def _interrupt(self, number: int) -> None:
        self.pending = None
        self.armed = False
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            raise Terminated
        signal.signal(number, self.earlier[number])
        signal.raise_signal(number)
