"""A search for Adam's lr by Optuna, beside towers that have as many epochs in all.

    python -m experiments.studies optuna

prints the table. Its runs are made by the commands in docs/sweeps.md.
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
