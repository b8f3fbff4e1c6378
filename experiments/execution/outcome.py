"""What became of runs, and how it is said."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.config.schema import Config
from experiments.data.catalog import label
from experiments.tasks.catalog import headline


@dataclass
class Outcome:
    """What became of one run: its summary, or the error that ended it."""

    config: Config
    summary: dict[str, Any] | None = None
    error: str | None = None

    @property
    def reason(self) -> str:
        """The last line of the error."""
        return (self.error or "").rpartition("\n")[2]


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
    """List the runs that failed, each error once; whether there are any."""
    failed: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.summary is None:
            failed.setdefault(outcome.error or "", []).append(outcome)
    for error, those in failed.items():
        print("", *map(describe, those), sep="\n", file=sys.stderr)
        if "\n" in error:
            print(error, file=sys.stderr)
    if failed and len(outcomes) > 1:
        count = sum(map(len, failed.values()))
        print(f"\n{count} of {len(outcomes)} runs failed.", file=sys.stderr)
    return bool(failed)


def explain(error: Exception) -> str:
    """One line for what the command's user can mend; a traceback for a mistake in the program."""
    if isinstance(error, (ValueError, OSError)) and str(error):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
