"""TensorBoard logger: a run's records in event files, for `tensorboard --logdir runs`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

from experiments.config.identity import identity
from experiments.config.schema import Config
from experiments.records.loggers.logger import Logger, Row, results
from experiments.records.store import RunDirectory

FOLDER = "tensorboard"  # in the run's directory


class TensorBoardLogger(Logger):
    """Event files of a run. A resumed run begins a new file and logs all rows again."""

    def __init__(self, directory: RunDirectory, settings: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("logger=tensorboard needs: pip install tensorboard") from None
        shutil.rmtree(directory.path / FOLDER, ignore_errors=True)
        self.writer = SummaryWriter(directory.path / FOLDER)
        self.writer.add_text("config", f"```\n{json.dumps(settings, indent=2)}\n```")

    @classmethod
    def of(cls, config: Config, directory: RunDirectory) -> Logger:
        return cls(directory, identity(config))

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in row.items():
                if name not in ("step", "time"):
                    self.writer.add_scalar(name, value, int(row["step"]), row.get("time"))
        self.writer.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        told = {name: value for name, value in results(summary).items() if value is not None}
        self.writer.add_text("results", f"```\n{json.dumps(told, indent=2)}\n```")
        self.writer.close()

    def fail(self) -> None:
        self.writer.close()

    def interrupt(self) -> None:
        self.writer.close()


LOGGERS = {"tensorboard": TensorBoardLogger}
