"""The interface of loggers, which show a run's records outside the store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config.baselines import parse
from experiments.config.schema import Config
from experiments.records.store import RunDirectory

Row = dict[str, float]


class Logger:
    """Base class of loggers; it logs nothing, because the store has the curves.

    To add a logger, put its class under its config name in the `LOGGERS` of a module in this
    folder.
    """

    @classmethod
    def prepare(cls) -> None:
        """Set up resources that the runs of this process and its children share."""

    @classmethod
    def publish(cls, results: Path, config: Config) -> None:
        """Publish the tables and figures of a folder; `config` is of any of their runs."""

    @classmethod
    def say_where(cls, config: Config) -> None:
        """At the end of a command, print what the user still has to do, if anything."""

    @classmethod
    def of(cls, config: Config, directory: RunDirectory) -> Logger:
        """Make the logger of a run, in the process that writes the records."""
        return cls()

    def log(self, rows: Sequence[Row]) -> None:
        """Log the rows that `history` makes of an epoch."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the summary of the finished run."""

    def fail(self) -> None:
        """Mark the run as failed."""

    def interrupt(self) -> None:
        """Mark the run as stopped; it may resume later."""


LOGGERS = {"csv": Logger}


def made_by(config: Config) -> dict[str, Any]:
    """The table or figure that a run was done for; it does not affect the result."""
    return {"experiment": config.experiment, "preset": config.preset, "row": config.row}


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's summary to show."""
    made = summary["provenance"]
    found = {k: v for k, v in summary.items() if k.startswith("test_") or k == "objective"}
    found |= {name: summary[name] for name in ("train_loss", "diverged")}
    for level, values in enumerate(summary["hyperparameters"]):
        found |= {f"learned.{level}.{name}": value for name, value in values.items()}
    found |= {name: made[name] for name in ("seconds_per_step", "seconds", "finished")}
    return found


def initial(stack: str, first: Row) -> Row:
    """The row of step 0: a stack's initial values for the columns of the first row."""
    row: Row = {"step": 0, **{name: first[name] for name in first if name == "time"}}
    levels = parse(stack).levels
    for name in first:
        level, _, hyper = name.partition(".")
        if re.search(r"\[\d+\]$", name):  # a param group may have its own stack
            continue
        if level.isdigit() and int(level) < len(levels):
            value = levels[int(level)].values.get(hyper.partition("[")[0])
            if isinstance(value, (int, float)):
                row[name] = float(value)
    return row


def history(
    stack: str,
    start: float,
    curves: Sequence[Row],
    values: Sequence[Row],
    hypergradients: Sequence[Row],
    times: Sequence[float],
) -> list[Row]:
    """The rows to log: step 0, and one for each record of the hyperparameters.

    The last row of an epoch also has the epoch's loss and error.

    Args:
        start: the step before the first epoch.
        curves: a row for each epoch.
        values, hypergradients: a row every few steps, and at each epoch's end.
        times: seconds since 1970 at `start` and at the end of each epoch, or nothing. The `time` of
            a row between them is interpolated.
    """
    gradients = {row["step"]: row for row in hypergradients}
    rows = []
    begins = start == 0
    for k, end in enumerate(curves):
        for row in values:
            if start < row["step"] <= end["step"]:
                new = {**row, **gradients.get(row["step"], {})}
                if len(times) == len(curves) + 1:
                    share = (row["step"] - start) / (end["step"] - start)
                    new["time"] = times[k] + share * (times[k + 1] - times[k])
                rows.append({**new, **end} if row["step"] == end["step"] else new)
        start = end["step"]
    return [initial(stack, rows[0]), *rows] if rows and begins else rows
