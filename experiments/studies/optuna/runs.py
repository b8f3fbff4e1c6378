"""A search for Adam's lr by Optuna, beside towers with the same total number of epochs.

    python -m experiments.studies optuna

The command prints the table. docs/sweeps.md has the commands of its runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.cli import ROOT, asked_for_help, split
from experiments.studies.optuna import report
from experiments.studies.study import Measurement, Nothing


def main(arguments: Sequence[str]) -> int:
    if asked_for_help(__doc__, Nothing, arguments=arguments):
        return 0
    split(arguments, Nothing, ())
    print(report.prose(ROOT / "results" / "optuna")["table"])
    return 0


STUDY = Measurement("optuna", main, __doc__)
