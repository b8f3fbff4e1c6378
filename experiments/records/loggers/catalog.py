"""All loggers: the `LOGGERS` of the modules in this folder."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from experiments.config.processes import is_first
from experiments.config.schema import Config
from experiments.found import found
from experiments.records.loggers.logger import Logger, Row
from experiments.records.store import RunDirectory


@functools.lru_cache(maxsize=1)
def loggers() -> dict[str, type[Logger]]:
    every = found("experiments.records.loggers", "LOGGERS")
    return {name: kind for each in every for name, kind in each.items()}


class Several(Logger):
    """Combines a run's loggers. A failing logger is reported and dropped; the run continues.

    Attributes:
        kinds: the loggers' classes.
    """

    kinds: ClassVar[tuple[type[Logger], ...]] = ()

    def __init__(self, each: Sequence[Logger]) -> None:
        self.each = list(each)

    @classmethod
    def prepare(cls) -> None:
        for kind in cls.kinds:
            kind.prepare()

    @classmethod
    def publish(cls, results: Path, config: Config) -> None:
        for kind in cls.kinds:
            kind.publish(results, config)

    @classmethod
    def say_where(cls, config: Config) -> None:
        for kind in cls.kinds:
            kind.say_where(config)

    @classmethod
    def of(cls, config: Config, directory: RunDirectory) -> Logger:
        made = []
        for kind in cls.kinds:
            try:
                made.append(kind.of(config, directory))
            except ValueError:  # a user error
                raise
            except Exception as error:
                _leave_out(kind, error)
        return cls(made)

    def log(self, rows: Sequence[Row]) -> None:
        self._each("log", rows)

    def finish(self, summary: dict[str, Any]) -> None:
        self._each("finish", summary)

    def fail(self) -> None:
        self._each("fail")

    def interrupt(self) -> None:
        self._each("interrupt")

    def _each(self, what: str, *arguments: Any) -> None:
        for logger in list(self.each):
            try:
                getattr(logger, what)(*arguments)
            except Exception as error:
                self.each.remove(logger)
                _leave_out(type(logger), error)


def _leave_out(kind: type[Logger], error: Exception) -> None:
    (name,) = (name for name, each in loggers().items() if each is kind)
    reason = str(error).partition("\n")[0]
    print(f"{name} failed and is left out of this run: {reason}", file=sys.stderr)


def find(config: Config) -> type[Logger]:
    """Return one class for all loggers in a config, whose names are separated by commas.

    Raises:
        ValueError: an unknown name.
    """
    names = config.logger.name.split(",")
    for name in names:
        if name not in loggers():
            raise ValueError(f"logger.name={name!r} is not one of {', '.join(loggers())}")
    kinds = tuple(loggers()[name] for name in dict.fromkeys(names))
    return type("Several", (Several,), {"kinds": kinds})


def make_logger(config: Config, directory: RunDirectory) -> Logger:
    """Make the logger of a run; in processes that write no records, it does nothing."""
    return find(config).of(config, directory) if is_first() else Logger()
