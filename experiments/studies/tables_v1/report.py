"""Draw Tables 1 and 2 of the paper's first version from the CSV of our runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.data.catalog import label as data_label
from experiments.studies import pages
from experiments.studies.claim import Claim, scale
from experiments.studies.pages import csv_of, diverged, table, with_sd, write_all
from experiments.studies.tables_v1.runs import REFERENCE

TOO_MUCH = (
    "With SGD(0.001) / SGD(0.0001) above Adam, the step size of the second level falls below 0 "
    "within three steps, and Adam's step size then grows for the rest of the epoch. The published "
    "package (1.0) gives the same results on this stack, to rounding (tests/test_published.py). So "
    "the first version must have used other constants than those in its table."
)


def summarize(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """A line for each row of the published tables, accuracies in percent, times in ms.

    Ours: mean and sample standard deviation over seeds, and the time of the fastest seed, because
    the first run of some stacks includes the compilation.
    """
    ours = runs.groupby(["table", "row"]).agg(
        accuracy=("test_accuracy", "mean"),
        sd=("test_accuracy", "std"),
        ms_per_step=("ms_per_step", "min"),
        n=("seed", "size"),
        diverged=("diverged", "sum"),
    )
    published = reference.rename(
        columns={
            "stack": "row",
            "test_accuracy": "published_accuracy",
            "ms_per_step": "published_ms_per_step",
        }
    )
    return published.merge(ours.reset_index(), on=["table", "row"], validate="one_to_one")


def setting(runs: pd.DataFrame) -> str:
    """The runs' setting in words."""
    seeds = runs.seed.nunique()
    return (
        f"MLP on {data_label(runs.data.iloc[0])}, {runs.epochs.iloc[0]} epoch, batch 300, in the "
        f"order of the file, {seeds} seeds, {' and '.join(runs.device.unique())}"
    )


def ours(line: pd.Series) -> str:
    return with_sd(line.accuracy, line.sd) + diverged(line)


def cells(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    return [
        (
            *(f"`{line.row}`", f"{line.published_accuracy:.2f}", ours(line)),
            *(f"{line.published_ms_per_step:g}", f"{line.ms_per_step:.2f}"),
        )
        for _, line in rows.iterrows()
    ]


def markdown(rows: pd.DataFrame, words: str) -> str:
    heads = ("Optimizer", "Published", "Ours", "Published time", "Our time")
    parts: list[Any] = [
        f"# The first version's tables: {words}",
        "Test accuracy in percent, mean ± standard deviation over seeds. *Published*: arXiv "
        "1909.13371v1, one run of each. A plain row below a tower starts at the values that the "
        "tower learned in the paper. *Time*: ms of a whole training step. The published times are "
        "from a 2.4 GHz laptop core. Ours are of the fastest seed, with parallel runs and perhaps "
        "other load; see [results/step_time](../../step_time) for a benchmark.",
    ]
    for number, own in rows.groupby("table"):
        parts += [f"## Table {number}", table(heads, "lrrrr", cells(own))]
    return pages.page(*parts, TOO_MUCH)


def latex(rows: pd.DataFrame, words: str) -> str:
    """The tables as LaTeX."""
    groups = ((f"Table {number}", cells(own)) for number, own in rows.groupby("table"))
    caption = f"Test accuracy (\\%), published in the first version and ours. {words}"
    heads = ("Optimizer", "Published", "Ours", "ms", "ms, ours")
    return pages.latex(caption, "lrrrr", heads, groups)


def draw(folder: Path) -> list[Path]:
    """Draw the tables from the CSV of the runs; returns the written files."""
    runs = pd.read_csv(folder / "runs.csv")
    rows, words = summarize(runs, pd.read_csv(REFERENCE)), setting(runs)
    texts = {
        "table.csv": csv_of(rows),
        "README.md": markdown(rows, words),
        "table.tex": latex(rows, words),
    }
    return write_all(folder, texts)


def claims(folder: Path) -> Iterator[Claim]:
    """A claim for each row of the first version's tables, with the tables' digits."""
    runs = pd.read_csv(folder / "runs.csv")
    for _, line in summarize(runs, pd.read_csv(REFERENCE)).iterrows():
        own = runs[(runs.table == line.table) & (runs.row == line.row)]
        near = abs(line.accuracy - line.published_accuracy) <= max(2 * line.sd, 0.5)
        yield Claim(
            data_label(own.data.iloc[0]),
            f"first version, Table {line.table}, {line.row}",
            scale(own.data.iloc[0] == "mnist"),
            "test accuracy (%)",
            f"{line.published_accuracy:g}",
            ours(line),
            int(line.n),
            "yes" if near else "no",
            " ".join(own.hash) if "hash" in own else "",
        )


def prose(folder: Path) -> dict[str, str]:
    """The block in README: how many rows agree."""
    found = [claim.verdict for claim in claims(folder)]
    line = (
        "First version, Tables 1 and 2",
        f"test accuracies of {len(found)} rows",
        f"{found.count('yes')} of {len(found)} rows agree",
    )
    return {"line": " | ".join(line)}
