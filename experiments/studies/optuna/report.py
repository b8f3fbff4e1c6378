"""Table of test errors of searches and towers by budget, from the CSV of their runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.studies.pages import table, with_sd

BUDGETS = {5: 1, 40: 5}  # total epochs: epochs of each trial of a search


def prose(folder: Path) -> dict[str, str]:
    """The table; a search counts by each seed's trial with the smallest training loss."""
    runs = pd.read_csv(folder / "runs.csv")
    plain = runs[runs["stack.height"] == 0]
    best = plain.loc[plain.groupby(["trainer.epochs", "seed"]).train_loss.idxmin()]

    def errors(own: pd.DataFrame, epochs: int) -> str:
        found = own.test_error[own["trainer.epochs"] == epochs]
        return with_sd(found.mean(), found.std())

    rows = [
        ["`Adam(lr)`, best trial of Optuna's", *(errors(best, each) for each in BUDGETS.values())]
    ]
    for stack, own in runs[runs["stack.height"] > 0].groupby("stack"):
        rows.append([f"`{stack}`", *(errors(own, budget) for budget in BUDGETS)])
    heads = ("Stack", *(f"{budget} epochs in all" for budget in BUDGETS))
    return {"table": "\n".join(table(heads, "lrr", rows))}
