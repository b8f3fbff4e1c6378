"""All loggers. Each module of this folder that has `LOGGERS` is found here."""

from __future__ import annotations

import functools
import pkgutil
from importlib import import_module
from pathlib import Path

from experiments.config.processes import is_first
from experiments.config.schema import Config
from experiments.records.loggers.logger import Logger
from experiments.records.store import RunDirectory


@functools.lru_cache(maxsize=1)
def loggers() -> dict[str, type[Logger]]:
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    folder = "experiments.records.loggers"
    modules = [import_module(f"{folder}.{name}") for name in names if name != "catalog"]
    return {k: v for module in modules for k, v in getattr(module, "LOGGERS", {}).items()}


def find(config: Config) -> type[Logger]:
    """The class of loggers that a config names.

    Raises:
        ValueError: an unknown name.
    """
    if config.logger.name not in loggers():
        known = ", ".join(loggers())
        raise ValueError(f"logger.name={config.logger.name!r} is not one of {known}")
    return loggers()[config.logger.name]


def make_logger(config: Config, directory: RunDirectory) -> Logger:
    """The logger of a run; it does nothing in processes that do not keep the run's records."""
    return find(config).of(config, directory) if is_first() else Logger()
