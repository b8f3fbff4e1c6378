"""MLflow logger: a run's records in MLflow's tracking store, for `mlflow ui`.

MLFLOW_TRACKING_URI names the tracking store; the default is a database in the run store.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config.identity import identity
from experiments.config.schema import Config
from experiments.files import locked
from experiments.records.loggers.logger import Logger, Row, results
from experiments.records.store import RunDirectory

PROJECT = "hyperopt"
BATCH = 900  # metrics of one request; MLflow's limit is 1000


class MLflowLogger(Logger):
    """An MLflow run, found by its hash. A resumed run logs only steps that MLflow lacks."""

    def __init__(
        self, directory: RunDirectory, settings: dict[str, Any], project: str | None
    ) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise ValueError("logger=mlflow needs: pip install mlflow") from None
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # no messages about its tables
        store = directory.path.parent
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.resolve()}/mlflow.db"
        with locked(Path(store)):  # the first run of a sweep makes the database
            self.client = MlflowClient(tracking_uri=uri)
            known = self.client.get_experiment_by_name(project or PROJECT)
            experiment = (
                known.experiment_id if known else self.client.create_experiment(project or PROJECT)
            )
        found = self.client.search_runs([experiment], f"tags.hash = '{directory.hash}'")
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, "RUNNING")
        else:
            tags = {"hash": directory.hash}
            made = self.client.create_run(experiment, tags=tags, run_name=directory.hash)
            self.run = made.info.run_id
            for name, value in settings.items():
                self.client.log_param(self.run, name, value)
        logged = self.client.get_metric_history(self.run, "step")
        self.last = max((metric.step for metric in logged), default=-1)

    @classmethod
    def of(cls, config: Config, directory: RunDirectory) -> Logger:
        return cls(directory, identity(config), config.logger.project)

    def log(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        for row in rows:
            step = int(row["step"])
            if step > self.last:
                at = int(1000 * row.get("time", time.time()))
                # The step is last, so that a row with a step is complete.
                names = sorted(row.keys() - {"time", "step"})
                metrics = [Metric(name, row[name], at, step) for name in (*names, "step")]
                for k in range(0, len(metrics), BATCH):
                    self.client.log_batch(self.run, metrics[k : k + BATCH])
                self.last = step

    def finish(self, summary: dict[str, Any]) -> None:
        for name, value in results(summary).items():
            self.client.set_tag(self.run, name, value)
        self.client.set_terminated(self.run, "FINISHED")

    def fail(self) -> None:
        self.client.set_terminated(self.run, "FAILED")

    def interrupt(self) -> None:
        self.client.set_terminated(self.run, "KILLED")


LOGGERS = {"mlflow": MLflowLogger}
