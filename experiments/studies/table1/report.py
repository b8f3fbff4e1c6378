"""Table 1, drawn from the CSVs of its runs: the table, the second one, and the figure."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments.data.catalog import label as data_label
from experiments.studies import pages, style
from experiments.studies.claim import Claim, scale
from experiments.studies.pages import csv_of, diverged, table, with_sd, write_all
from experiments.studies.table1.runs import LEARNED, REFERENCE

BLOCKS = {"a": "SGD", "b": "Adam", "c": "AdaGrad", "d": "RMSProp"}
HEADS = (
    *("Optimizer", "Kind", "Epochs", "Published", "Its code, rerun", "Ours", "n"),
    *("Learned", "Agrees"),
)
OWN_HEADS = (
    *("Tower", "Plain optimizer started at", "Ours", "n", "The paper's start", "Published"),
)
KINDS = {"baseline": "plain", "tower": "tower", "relearned": "plain, relearned"}


def summarize(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """One line for each row of the published table that was run, ours beside the published values.

    Ours are the mean and the sample standard deviation over seeds, in percent, and the same of the
    learned hyperparameters. `agrees`: the means differ by no more than twice the pooled standard
    deviation or 0.3 points, whichever is larger; it stays empty for runs that are not in the
    published setting.
    """
    lines = []
    for name, own in runs.groupby("row", sort=False):
        row = reference.loc[name]
        error, sd = own.test_error.mean(), own.test_error.std(ddof=1)
        line = {
            "block": row.block,
            "row": name,
            "kind": row.kind,
            "epochs": own.epochs.iloc[0],
            "published_error": row.published_error,
            "published_sd": row.published_sd,
            "rerun_error": row.rerun_error,
            "rerun_sd": row.rerun_sd,
            "our_error": round(error, 4),
            "our_sd": round(sd, 4),
            "n": len(own),
            "diverged": int(own.diverged.sum()),
        }
        for hyper in LEARNED:
            line[f"learned_{hyper}"] = own[f"learned_{hyper}"].mean()
            line[f"learned_{hyper}_sd"] = own[f"learned_{hyper}"].std(ddof=1)
        if is_published_setting(runs, reference):
            pooled = math.sqrt((row.published_sd**2 + sd**2) / 2)
            line["agrees"] = bool(abs(error - row.published_error) <= max(2 * pooled, 0.3))
        lines.append(line)
    return pd.DataFrame(lines)


def is_published_setting(runs: pd.DataFrame, reference: pd.DataFrame) -> bool:
    """Whether runs are on the full MNIST, with the paper's epochs and at least three seeds."""
    return bool(
        (runs.data == "mnist").all()
        and (runs.epochs.to_numpy() == reference.epochs.loc[runs.row].to_numpy()).all()
        and (runs.groupby("row").seed.nunique() >= 3).all()
    )


def setting(runs: pd.DataFrame, reference: pd.DataFrame) -> str:
    """The runs' setting in words, for a caption; a reduced one is named as such."""
    seeds = runs.seed.nunique()
    text = f"{data_label(runs.data.iloc[0])}, {seeds} seed{'s' * (seeds > 1)}"
    if is_published_setting(runs, reference):
        return text
    epochs = sorted(runs.epochs.unique())
    if len(epochs) == 1:
        text += f", {epochs[0]} epochs"
    return text + "; a reduced setting, not comparable with the paper's"


def learned_text(line: pd.Series) -> str:
    """As in "lr = 0.06958 ± 0.0043"; without a standard deviation where there is none."""
    texts = []
    for name in LEARNED:
        mean, sd = line[f"learned_{name}"], line[f"learned_{name}_sd"]
        if not math.isnan(mean):
            texts.append(f"{name} = {mean:.4g}" + ("" if math.isnan(sd) else f" ± {sd:.2g}"))
    return ", ".join(texts)


def verdict(line: pd.Series) -> str:
    return {True: "yes", False: "no"}.get(line.get("agrees"), "")


def markdown(rows: pd.DataFrame, own: pd.DataFrame | None, words: str, own_words: str) -> str:
    """The table, and the small one of the rows started from our own towers, as Markdown."""
    lines = [
        f"# Table 1: {words}",
        "",
        "Test error in percent after the last epoch, mean ± standard deviation over seeds. "
        "*Published* is the paper, *its code, rerun* the published package on the same data. "
        "*Relearned* is the plain optimizer started at the hyperparameters that the tower above it "
        "learned in the paper. *Learned* are our towers' final values, in the same way. "
        "*Agrees*: ours is within twice the pooled standard deviation of the published mean, or "
        "0.3 points, whichever is larger.",
        "",
        *table(
            HEADS,
            "llrrrrrll",
            (
                (
                    f"`{line.row}`",
                    KINDS[line.kind],
                    str(line.epochs),
                    with_sd(line.published_error, line.published_sd),
                    with_sd(line.rerun_error, line.rerun_sd),
                    with_sd(line.our_error, line.our_sd) + diverged(line),
                    str(line.n),
                    learned_text(line),
                    verdict(line),
                )
                for _, line in rows.iterrows()
            ),
        ),
    ]
    if own is not None:
        lines += [
            "",
            f"## Relearned rows, started from what our towers learned: {own_words}",
            "",
            "The plain optimizer started at the mean of our towers' final hyperparameters.",
            "",
            *table(
                OWN_HEADS,
                "llrrlr",
                (
                    (
                        f"`{line.tower}`",
                        f"`{line.start}`",
                        with_sd(line.our_error, line.our_sd) + diverged(line),
                        str(line.n),
                        f"`{line.row}`",
                        with_sd(line.published_error, line.published_sd),
                    )
                    for _, line in own.iterrows()
                ),
            ),
        ]
        for tower, row in itertools.pairwise(rows.itertuples()):
            if row.kind == "relearned" and row.row not in set(own.row):
                lines += [
                    "",
                    f"`{tower.row}` is left out: no plain optimizer can start at the mean of what "
                    f"our towers learned, {learned_text(rows.loc[tower.Index])}.",
                ]
    return "\n".join(lines) + "\n"


def latex(rows: pd.DataFrame, words: str) -> str:
    """The table for a paper."""
    body = []
    for block, own in rows.groupby("block", sort=False):
        body.append(f"\\midrule % {BLOCKS[str(block)]}")
        for _, line in own.iterrows():
            cells = [
                f"\\texttt{{{line.row}}}",
                re.sub(r"beta(\d)", r"$\\beta_\1$", learned_text(line)),
                with_sd(line.published_error, line.published_sd),
                with_sd(line.our_error, line.our_sd) + diverged(line),
                verdict(line),
            ]
            body.append(pages.latex_row(cells))
    heads = ("Optimizer", "Learned (ours)", "Published", "Ours", "Agrees")
    caption = f"Test error (\\%) of the MLP, published and ours. {words}"
    return pages.latex(caption, "llrrl", heads, body)


def figure(table: pd.DataFrame, words: str) -> plt.Figure:
    """Published and ours side by side, a panel for each block."""
    blocks = list(table.groupby("block", sort=False))
    fig, axes = plt.subplots(
        len(blocks),
        1,
        figsize=(style.WIDTH, 0.6 + 0.2 * len(table)),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [len(rows) for _, rows in blocks]},
    )
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


def own_table(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """`summarize`, with the tower of each row and the start that ours had."""
    rows, order = summarize(runs, reference), list(reference.index)
    rows["tower"] = [order[order.index(row) - 1] for row in rows.row]
    rows["start"] = [runs.loc[runs.row == row, "stack"].iloc[0] for row in rows.row]
    return rows.drop(columns=[c for c in rows.columns if c == "agrees" or "learned_" in c])


def draw(folder: Path) -> list[Path]:
    """Draw Table 1 from the CSVs of its runs; returns what was written beside them."""
    reference = pd.read_csv(REFERENCE).set_index("stack")
    runs = pd.read_csv(folder / "runs.csv")
    rows = summarize(runs, reference)
    words = setting(runs, reference)
    texts = {"table.csv": csv_of(rows)}
    own, own_words = None, ""
    if (folder / "own_runs.csv").exists():
        own_runs = pd.read_csv(folder / "own_runs.csv")
        own, own_words = own_table(own_runs, reference), setting(own_runs, reference)
        texts["own.csv"] = csv_of(own)
    texts["README.md"] = markdown(rows, own, words, own_words)
    texts["table.tex"] = latex(rows, words)
    return write_all(folder, texts) + style.save(figure(rows, words), folder / "figure")


def claims(folder: Path) -> Iterator[Claim]:
    """A claim for each row of Table 1."""
    runs = pd.read_csv(folder / "runs.csv")
    reference = pd.read_csv(REFERENCE).set_index("stack")
    for _, line in summarize(runs, reference).iterrows():
        own = runs[runs.row == line.row]
        yield Claim(
            data_label(own.data.iloc[0]),
            f"Table 1, {line.row}, {line.epochs} epochs",
            scale(bool(verdict(line))),
            "test error (%)",
            with_sd(line.published_error, line.published_sd),
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
    """Some rows of the table, and how many of all agree."""
    rows = pd.read_csv(folder / "table.csv").set_index("row")
    cells = (
        (
            f"`{name}`",
            with_sd(line.published_error, line.published_sd),
            with_sd(line.our_error, line.our_sd),
        )
        for name, line in rows.loc[list(SHOWN)].iterrows()
    )
    text = f"{rows.agrees.sum()} of the {len(rows)} rows of Table 1 agree with the paper."
    for name, line in rows[~rows.agrees.astype(bool)].iterrows():
        rerun = with_sd(line.rerun_error, line.rerun_sd)
        text += (
            f" `{name}` does not: {with_sd(line.our_error, line.our_sd)} here, "
            f"{with_sd(line.published_error, line.published_sd)} in the paper. The published "
            f"package gives {rerun} on the same data."
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
