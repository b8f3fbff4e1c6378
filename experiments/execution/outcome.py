"""Outcomes of runs: notes, one-line descriptions, and lists of failures."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from experiments.config.command import command_of
from experiments.config.schema import Config, to_config
from experiments.data.catalog import label
from experiments.files import write_json
from experiments.records.store import RunStore
from experiments.tasks.catalog import headline


@dataclass
class Outcome:
    """A run with its summary or its error; both are None until the run ends."""

    config: Config
    summary: dict[str, Any] | None = None
    error: str | None = None
    started: bool = field(default=False, compare=False)

    @property
    def reason(self) -> str:
        """The last line of the error."""
        return (self.error or "").rpartition("\n")[2]


here: list[Outcome] = []  # of this process's sweep, if its launcher fills the list


def objective(outcome: Outcome) -> float:
    """The training loss of the last epoch; infinite if the run diverged."""
    assert outcome.summary is not None
    loss = outcome.summary["train_loss"]
    return math.inf if outcome.summary["diverged"] or loss is None else loss


def returned(outcomes: Sequence[Outcome], overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    """The jobs' results for Hydra's sweeper; a failed job has the value None."""
    done = []
    for outcome, job in zip(outcomes, overrides, strict=True):
        done.append(JobReturn(overrides=job, status=JobStatus.COMPLETED))
        done[-1].return_value = objective(outcome) if outcome.summary else None
    return done


def note_of(folder: Path, number: int) -> Path:
    """The path of the note with a job's outcome."""
    return folder / f"job-{number:06d}.json"


def leave_note(path: Path, outcome: Outcome) -> None:
    name = outcome.summary and outcome.summary["hash"]
    note = {"config": asdict(outcome.config), "hash": name, "error": outcome.error}
    write_json(path, {**note, "started": outcome.started})


def read_note(path: Path) -> Outcome:
    """Read the outcome of a job.

    Raises:
        OSError, ValueError: the note is missing or incomplete.
    """
    note = json.loads(path.read_text())
    config = to_config(OmegaConf.merge(OmegaConf.structured(Config), note["config"]))
    outcome = Outcome(config, error=note["error"], started=note["started"])
    if note["hash"] is not None:
        outcome.summary = RunStore(config.store).summary(note["hash"])
        if outcome.summary is None:
            outcome.error = "its summary is missing"
    return outcome


def describe(outcome: Outcome) -> str:
    """One line for a finished run."""
    summary = outcome.summary
    stack = outcome.config.stack
    given = [f"stack.{name}={value}" for name, value in vars(stack).items() if value is not None]
    name = f"{stack.notation or ' '.join(given)}, seed {outcome.config.seed}"
    if summary is None:
        return f"{name}: failed: {outcome.reason}"
    values = " / ".join(
        ", ".join(f"{name}={value:.4g}" for name, value in level.items() if value is not None)
        for level in summary["hyperparameters"]
    )
    if summary["diverged"]:
        state = f"diverged in epoch {summary['epochs']}"
    else:
        state = f"test {headline(summary)}"
    return (
        f"{name}: {state} on {label(summary['data'])}, hyperparameters {values}, "
        f"in {outcome.config.store}/{summary['hash']}"
    )


def report_failures(outcomes: Sequence[Outcome]) -> bool:
    """Print the counts of all outcomes, and the failed runs with their commands.

    Runs with the same error are listed together.

    Returns:
        Whether any run has no summary.
    """
    failed: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            failed.setdefault(outcome.error, []).append(outcome)
    for error, those in failed.items():
        many = len(those) > 1
        print(
            f"\n{len(those)} runs failed" if many else "\n1 run failed",
            error,
            sep=": ",
            file=sys.stderr,
        )
        print("To run each alone:" if many else "To run it alone:", file=sys.stderr)
        for command in dict.fromkeys(command_of(outcome.config) for outcome in those):
            print(f"    {command}", file=sys.stderr)
    if len(outcomes) > 1 or failed:
        print(f"\n{count(outcomes)}.", file=sys.stderr)
    return any(outcome.summary is None for outcome in outcomes)


def count(outcomes: Sequence[Outcome]) -> str:
    """How many runs are finished, diverged, failed and not started."""
    finished = [outcome.summary for outcome in outcomes if outcome.summary is not None]
    failed = sum(outcome.error is not None for outcome in outcomes)
    diverged = sum(summary["diverged"] for summary in finished)
    left = [outcome for outcome in outcomes if outcome.summary is None and outcome.error is None]
    cut_short = sum(outcome.started for outcome in left)
    parts = {
        f"{len(outcomes)} runs: {len(finished)} finished": True,
        f"{diverged} of them diverged": diverged,
        f"{failed} failed": True,
        f"{cut_short} cut short": cut_short,
        f"{len(left) - cut_short} not started": True,
    }
    return ", ".join(text for text, told in parts.items() if told)


def explain(error: Exception) -> str:
    """One line for a user error; a traceback for a bug."""
    if isinstance(error, (ValueError, OSError)) and str(error):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
