"""Draw Table 1, the table of relearned rows, and the figure from the CSVs of the runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from experiments.data.catalog import label as data_label
from experiments.studies import pages, style
from experiments.studies.claim import Claim, scale
from experiments.studies.pages import csv_of, diverged, table, with_sd, write_all
from experiments.studies.table1.runs import LEARNED, REFERENCE

BLOCKS = {"a": "SGD", "b": "Adam", "c": "AdaGrad", "d": "RMSProp"}
KINDS = {"baseline": "plain", "tower": "tower", "relearned": "plain, relearned"}


def summarize(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """A line for each row of the published table with runs, ours beside the published values.

    Ours: mean and sample standard deviation over seeds of the test error in percent and of the
    learned hyperparameters. `agrees`: the means differ by at most twice the pooled standard
    deviation or 0.3 points, whichever is larger. Runs in another setting have no such column.
    """
    learned = [f"learned_{name}" for name in LEARNED]
    columns: dict[str, Any] = {
        "block": ("block", "first"),
        "kind": ("kind", "first"),
        "epochs": ("epochs", "first"),
        "our_error": ("test_error", "mean"),
        "our_sd": ("test_error", "std"),
        "n": ("seed", "size"),
        "diverged": ("diverged", "sum"),
    }
    for name in learned:
        columns |= {name: (name, "mean"), f"{name}_sd": (name, "std")}
    ours = runs.groupby("row", sort=False).agg(**columns)
    both = ours.join(reference.drop(columns=["block", "kind", "epochs"])).reset_index()
    if is_published_setting(runs, reference):
        pooled = ((both.published_sd**2 + both.our_sd**2) / 2) ** 0.5
        off = (both.our_error - both.published_error).abs()
        both["agrees"] = off <= (2 * pooled).clip(lower=0.3)
    names = ["block", "row", "kind", "epochs", "published_error", "published_sd", "rerun_error"]
    names += ["rerun_sd", "our_error", "our_sd", "n", "diverged"]
    names += [column for name in learned for column in (name, f"{name}_sd")]
    names += ["agrees"] * ("agrees" in both)
    return both.round({"our_error": 4, "our_sd": 4})[names]


def is_published_setting(runs: pd.DataFrame, reference: pd.DataFrame) -> bool:
    """Whether runs are on the full MNIST, with the paper's epochs and at least three seeds."""
    return bool(
        (runs.data == "mnist").all()
        and (runs.epochs.to_numpy() == reference.epochs.loc[runs.row].to_numpy()).all()
        and (runs.groupby("row").seed.nunique() >= 3).all()
    )


def setting(runs: pd.DataFrame, reference: pd.DataFrame) -> str:
    """The runs' setting in words, for a caption; it mentions a reduced setting."""
    seeds = runs.seed.nunique()
    text = f"{data_label(runs.data.iloc[0])}, {seeds} seed{'s' * (seeds > 1)}"
    if is_published_setting(runs, reference):
        return text
    epochs = runs.epochs.unique()
    text += f", {epochs[0]} epochs" if len(epochs) == 1 else ""
    return text + "; a reduced setting, not comparable with the paper's"


def learned_text(line: pd.Series) -> str:
    """Such as "lr = 0.06958 ± 0.0043"; without the standard deviation if it is NaN."""
    texts = []
    for name in LEARNED:
        mean, sd = line[f"learned_{name}"], line[f"learned_{name}_sd"]
        if not math.isnan(mean):
            texts.append(f"{name} = {mean:.4g}" + ("" if math.isnan(sd) else f" ± {sd:.2g}"))
    return ", ".join(texts)


def verdict(line: pd.Series) -> str:
    return {True: "yes", False: "no"}.get(line.get("agrees"), "")


def published(line: pd.Series) -> str:
    return with_sd(line.published_error, line.published_sd)


def ours(line: pd.Series) -> str:
    return with_sd(line.our_error, line.our_sd) + diverged(line)


def markdown(rows: pd.DataFrame, own: pd.DataFrame | None, words: str, own_words: str) -> str:
    """The page: the table, and the table of rows relearned from our own towers, as Markdown."""
    lines = [line for _, line in rows.iterrows()]
    heads = ["Optimizer", "Kind", "Epochs", "Published", "Its code, rerun", "Ours", "n"]
    cells = (
        (
            *(f"`{line.row}`", KINDS[line.kind], str(line.epochs), published(line)),
            *(with_sd(line.rerun_error, line.rerun_sd), ours(line), str(line.n)),
            *(learned_text(line), verdict(line)),
        )
        for line in lines
    )
    parts: list[Any] = [
        f"# Table 1: {words}",
        "Test error in percent after the last epoch, mean ± standard deviation over seeds. "
        "*Published*: the paper. *Its code, rerun*: the published package on the same data. "
        "*Relearned*: the plain optimizer, started at the hyperparameters that the tower above it "
        "learned in the paper. *Learned*: our towers' final values, mean ± standard deviation. "
        "*Agrees*: the means differ by at most twice the pooled standard deviation or 0.3 points, "
        "whichever is larger.",
        table([*heads, "Learned", "Agrees"], "llrrrrrll", cells),
    ]
    if own is not None:
        heads = ["Tower", "Plain optimizer started at", "Ours", "n", "The paper's start"]
        rows_of_own = (
            (f"`{o.tower}`", f"`{o.start}`", ours(o), str(o.n), f"`{o.row}`", published(o))
            for _, o in own.iterrows()
        )
        parts += [
            f"## Relearned rows, started from our own towers: {own_words}",
            "The plain optimizer starts at the mean of our towers' final hyperparameters.",
            table([*heads, "Published"], "llrrlr", rows_of_own),
        ]
        parts += [
            f"`{tower.row}` is left out: no plain optimizer can start at the mean of our towers' "
            f"values, {learned_text(tower)}."
            for tower, row in itertools.pairwise(lines)
            if row.kind == "relearned" and row.row not in set(own.row)
        ]
    return pages.page(*parts)


def latex(rows: pd.DataFrame, words: str) -> str:
    """The table as LaTeX."""
    groups = (
        (
            BLOCKS[str(block)],
            [
                (f"`{line.row}`", learned_text(line), published(line), ours(line), verdict(line))
                for _, line in own.iterrows()
            ],
        )
        for block, own in rows.groupby("block", sort=False)
    )
    heads = ("Optimizer", "Learned (ours)", "Published", "Ours", "Agrees")
    caption = f"Test error (\\%) of the MLP, published and ours. {words}"
    return pages.latex(caption, "llrrl", heads, groups)


def figure(table: pd.DataFrame, words: str) -> plt.Figure:
    """Draw published and our errors side by side, a panel for each block."""
    blocks = list(table.groupby("block", sort=False))
    ratios = {"height_ratios": [len(rows) for _, rows in blocks]}
    height = 0.6 + 0.2 * len(table)
    shared: dict[str, Any] = {"sharex": True, "squeeze": False, "gridspec_kw": ratios}
    fig, axes = style.subplots(len(blocks), 1, height, **shared)
    for axis, (block, rows) in zip(axes[:, 0], blocks, strict=True):
        places = range(len(rows))
        for offset, prefix, label, look in (
            (-0.15, "published", "published", style.PAPER),
            (+0.15, "our", "ours", style.OURS),
        ):
            axis.errorbar(
                rows[f"{prefix}_error"],
                [place + offset for place in places],
                xerr=rows[f"{prefix}_sd"].fillna(0.0),
                linestyle="none",
                **look,
                elinewidth=1,
                capsize=2,
                label=label,
            )
        axis.set_yticks(list(places), rows.row)
        for tick, kind in zip(axis.get_yticklabels(), rows.kind, strict=True):
            tick.set_fontweight("bold" if kind == "tower" else "normal")
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(f"({block}) {BLOCKS[str(block)]}, {rows.epochs.iloc[0]} epochs", loc="left")
    axes[0, 0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    axes[-1, 0].set_xlabel("test error (%), mean ± standard deviation")
    style.title(fig, f"{words}\ntowers in bold, plain optimizers not")
    return fig


def captions(folder: Path) -> dict[str, str]:
    return {"figure": "Test error of the 32 rows of Table 1, the paper's beside ours"}


def own_table(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """The result of `summarize`, with each row's tower and our start."""
    rows, order = summarize(runs, reference), list(reference.index)
    rows["tower"] = [order[order.index(row) - 1] for row in rows.row]
    rows["start"] = [runs.loc[runs.row == row, "stack"].iloc[0] for row in rows.row]
    return rows.drop(columns=[c for c in rows.columns if c == "agrees" or "learned_" in c])


def read(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Read the runs of a CSV; returns them, their table, and their setting in words."""
    reference = pd.read_csv(REFERENCE).set_index("stack")
    runs = pd.read_csv(path)
    return runs, summarize(runs, reference), setting(runs, reference)


def draw(folder: Path) -> list[Path]:
    """Draw Table 1 from the CSVs of its runs; returns the written files."""
    _, rows, words = read(folder / "runs.csv")
    texts = {"table.csv": csv_of(rows)}
    own, own_words = None, ""
    if (folder / "own_runs.csv").exists():
        own_runs, _, own_words = read(folder / "own_runs.csv")
        own = own_table(own_runs, pd.read_csv(REFERENCE).set_index("stack"))
        texts["own.csv"] = csv_of(own)
    texts["README.md"] = markdown(rows, own, words, own_words)
    texts["table.tex"] = latex(rows, words)
    return write_all(folder, texts) + style.save(figure(rows, words), folder / "figure")


def claims(folder: Path) -> Iterator[Claim]:
    """A claim for each row of Table 1."""
    runs, rows, _ = read(folder / "runs.csv")
    for _, line in rows.iterrows():
        own = runs[runs.row == line.row]
        yield Claim(
            data_label(own.data.iloc[0]),
            f"Table 1, {line.row}, {line.epochs} epochs",
            scale(bool(verdict(line))),
            "test error (%)",
            published(line),
            with_sd(line.our_error, line.our_sd),
            int(line.n),
            verdict(line),
            " ".join(own.hash),
        )


SHOWN = (
    *("SGD(0.01)", "SGD(0.01) / SGD(0.01)", "SGD(0.01) / Adam(0.1)"),
    *("Adam(0.001)", "Adam(0.001) / SGD(1e-5)", "Adam(0.001)[lr] / Adam(0.001)"),
    *("AdaGrad(0.01)", "AdaGrad(0.01) / AdaGrad(0.01)"),
    *("RMSProp(0.01)", "RMSProp(0.01) / RMSProp(1e-4)"),
)


def prose(folder: Path) -> dict[str, str]:
    """The blocks in README and docs: some rows of the table, and how many agree."""
    rows = pd.read_csv(folder / "table.csv").set_index("row")
    shown = rows.loc[list(SHOWN)].iterrows()
    cells = (
        (f"`{name}`", published(line), with_sd(line.our_error, line.our_sd)) for name, line in shown
    )
    text = f"{rows.agrees.sum()} of the {len(rows)} rows of Table 1 agree with the paper."
    for name, line in rows[~rows.agrees.astype(bool)].iterrows():
        text += (
            f" `{name}` does not: {with_sd(line.our_error, line.our_sd)} here, {published(line)} "
            f"in the paper. The published package gives {with_sd(line.rerun_error, line.rerun_sd)} "
            "on the same data."
        )
    best = rows.loc["Adam(0.001) / SGD(1e-5)"]
    line = (
        "Table 1: MLP, MNIST",
        f"test error of `{best.name}`: {with_sd(best.published_error, best.published_sd)} %",
        f"{with_sd(best.our_error, best.our_sd)} %; {rows.agrees.sum()} of all {len(rows)} rows "
        "agree",
    )
    return {
        "rows": "\n".join(table(("Stack", "The paper", "Here"), "lrr", cells)),
        "agree": text,
        "line": " | ".join(line),
    }
