"""Views of a run's records beside the curves that the run store always has."""

from __future__ import annotations

import os
import sys
from typing import Any

from .config import Config, identity
from .store import RunDirectory


class Logger:
    """Nothing beside the store: the curves are its CSV files."""

    def epoch(self, row: dict[str, float]) -> None:
        """Take the numbers of a finished epoch."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Take the summary of the finished run."""


class WandbLogger(Logger):
    """Weights & Biases. Offline where no key is set; it never asks, and never fails a run."""

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        self.run: Any = None
        self._try(self._open, config, directory)

    def _open(self, config: Config, directory: RunDirectory) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _has_key():
            mode = "offline"
        self.run = wandb.init(
            project=config.logger.project,
            id=directory.hash,
            resume="allow",
            name=config.row or config.stack.notation,
            config=identity(config),
            dir=str(directory.path),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off"),
        )

    def epoch(self, row: dict[str, float]) -> None:
        self._try(lambda: self.run.log(row, step=int(row["epoch"])))

    def finish(self, summary: dict[str, Any]) -> None:
        def close() -> None:
            self.run.summary.update({k: v for k, v in summary.items() if k.startswith("test_")})
            self.run.finish()

        self._try(close)

    def _try(self, do: Any, *arguments: Any) -> None:
        """Do something with wandb; at its first failure say so, and leave it alone from then on."""
        if self.run is None and do != self._open:
            return
        try:
            do(*arguments)
        except Exception as error:  # whatever it is, the run matters more
            self.run = None
            print(f"wandb failed and is left out of this run: {error}", file=sys.stderr)


def _has_key() -> bool:
    """Whether wandb would find a key without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    return wandb.api.api_key is not None


LOGGERS = {"csv": lambda config, directory: Logger(), "wandb": WandbLogger}


def make_logger(config: Config, directory: RunDirectory) -> Logger:
    """The logger that the config names.

    Raises:
        ValueError: an unknown name.
    """
    if config.logger.name not in LOGGERS:
        raise ValueError(f"logger.name={config.logger.name!r} is not one of {', '.join(LOGGERS)}")
    return LOGGERS[config.logger.name](config, directory)
