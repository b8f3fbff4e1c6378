"""What a run's records are shown by, beside the curves that the store always has."""

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
    """A logger of one run; this one has nothing beside the store.

    A class of loggers is one of the `LOGGERS` of a module in this folder, by its name in configs.
    """

    @classmethod
    def prepare(cls) -> None:
        """Start what the runs of this process and its children share."""

    @classmethod
    def publish(cls, results: Path, config: Config) -> None:
        """Take the tables and figures of a folder; `config` is that of any of their runs."""

    @classmethod
    def say_where(cls, config: Config) -> None:
        """Say at the end of a command what is left to do for its user, if anything is."""

    @classmethod
    def of(cls, config: Config, directory: RunDirectory) -> Logger:
        """The logger of a run, in the process that keeps its records."""
        return cls()

    def log(self, rows: Sequence[Row]) -> None:
        """Take what `history` makes of an epoch."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Take the summary of the finished run."""

    def fail(self) -> None:
        """The run has failed."""

    def interrupt(self) -> None:
        """The run is stopped, to go on later."""


LOGGERS = {"csv": Logger}


def made_by(config: Config) -> dict[str, Any]:
    """Which table or figure a run was done for; it does not change the run."""
    return {"experiment": config.experiment, "preset": config.preset, "row": config.row}


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """What of a run's summary is shown."""
    made = summary["provenance"]
    found = {k: v for k, v in summary.items() if k.startswith("test_") or k == "objective"}
    found |= {name: summary[name] for name in ("train_loss", "diverged")}
    for level, values in enumerate(summary["hyperparameters"]):
        found |= {f"learned.{level}.{name}": value for name, value in values.items()}
    found |= {name: made[name] for name in ("seconds_per_step", "seconds", "finished")}
    return found


def initial(stack: str, first: Row) -> Row:
    """The row of step 0: the values that a stack starts from, of what the first row has."""
    row: Row = {"step": 0, **{name: first[name] for name in first if name == "time"}}
    levels = parse(stack).levels
    for name in first:
        level, _, hyper = name.partition(".")
        if re.search(r"\[\d+\]$", name):  # of a param group with a stack of its own
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
    """The rows that are logged: one for each record of the hyperparameters, and that of step 0.

    An epoch's last one has its loss and error too.

    Args:
        start: the step before the first epoch here.
        curves: a row for each epoch.
        values, hypergradients: a row every few steps, and at each epoch's end.
        times: the seconds since 1970 at `start` and at the end of each epoch; between them a row's
            `time` lies on the line. It may be empty.
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
