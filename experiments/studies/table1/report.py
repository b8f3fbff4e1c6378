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
from experiments.studies import style
from experiments.studies.claim import Claim, scale
from experiments.studies.curves import csv_of, write_all
from experiments.studies.table1.runs import LEARNED, REFERENCE

BLOCKS = {"a": "SGD", "b": "Adam", "c": "AdaGrad", "d": "RMSProp"}
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


def error_text(mean: float, sd: float) -> str:
    """As in "4.81 ± 0.10"; without a standard deviation where there is none."""
    return f"{mean:.2f}" if math.isnan(sd) else f"{mean:.2f} ± {sd:.2f}"


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


def markdown(table: pd.DataFrame, own: pd.DataFrame | None, words: str, own_words: str) -> str:
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
        "| Optimizer | Kind | Epochs | Published | Its code, rerun | Ours | n | Learned | Agrees |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for _, line in table.iterrows():
        cells = [
            f"`{line.row}`",
            KINDS[line.kind],
            str(line.epochs),
            error_text(line.published_error, line.published_sd),
            error_text(line.rerun_error, line.rerun_sd),
            error_text(line.our_error, line.our_sd) + _diverged(line),
            str(line.n),
            learned_text(line),
            verdict(line),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if own is not None:
        lines += [
            "",
            f"## Relearned rows, started from what our towers learned: {own_words}",
            "",
            "The plain optimizer started at the mean of our towers' final hyperparameters.",
            "",
            "| Tower | Plain optimizer started at | Ours | n | The paper's start | Published |",
            "| --- | --- | ---: | ---: | --- | ---: |",
        ]
        for _, line in own.iterrows():
            cells = [
                f"`{line.tower}`",
                f"`{line.start}`",
                error_text(line.our_error, line.our_sd) + _diverged(line),
                str(line.n),
                f"`{line.row}`",
                error_text(line.published_error, line.published_sd),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        for tower, row in itertools.pairwise(table.itertuples()):
            if row.kind == "relearned" and row.row not in set(own.row):
                lines += [
                    "",
                    f"`{tower.row}` is left out: no plain optimizer can start at the mean of what "
                    f"our towers learned, {learned_text(table.loc[tower.Index])}.",
                ]
    return "\n".join(lines) + "\n"


def _diverged(line: pd.Series) -> str:
    return f" ({line.diverged} of {line.n} diverged)" if line.diverged else ""


def latex(table: pd.DataFrame, words: str) -> str:
    """The table for a paper; needs the booktabs package."""
    lines = [
        "\\begin{table}",
        f"  \\caption{{Test error (\\%) of the MLP, published and ours. {words}.}}",
        "  \\centering\\small",
        "  \\begin{tabular}{llrrl}",
        "    \\toprule",
        "    Optimizer & Learned (ours) & Published & Ours & Agrees \\\\",
    ]
    for block, rows in table.groupby("block", sort=False):
        lines.append(f"    \\midrule % {BLOCKS[str(block)]}")
        for _, line in rows.iterrows():
            cells = [
                f"\\texttt{{{line.row}}}",
                re.sub(r"beta(\d)", r"$\\beta_\1$", learned_text(line)),
                error_text(line.published_error, line.published_sd),
                error_text(line.our_error, line.our_sd) + _diverged(line),
                verdict(line),
            ]
            lines.append(f"    {' & '.join(cells)} \\\\".replace("±", "$\\pm$"))
    return "\n".join([*lines, "    \\bottomrule", "  \\end{tabular}", "\\end{table}"]) + "\n"


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
        for offset, prefix, label, colour, marker, fill in (
            (-0.15, "published", "published", style.ORANGE, "o", "none"),
            (+0.15, "our", "ours", style.BLUE, "s", style.BLUE),
        ):
            axis.errorbar(
                rows[f"{prefix}_error"],
                [place + offset for place in places],
                xerr=rows[f"{prefix}_sd"].fillna(0.0),
                fmt=marker,
                color=colour,
                markerfacecolor=fill,
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
    fig.suptitle(f"{words}\ntowers in bold, plain optimizers not", fontsize=8)
    return fig


def own_table(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """`summarize`, with the tower of each row and the start that ours had."""
    table = summarize(runs, reference)
    order = list(reference.index)
    table["tower"] = [order[order.index(row) - 1] for row in table.row]
    table["start"] = [runs.loc[runs.row == row, "stack"].iloc[0] for row in table.row]
    return table.drop(columns=[c for c in table.columns if c == "agrees" or "learned_" in c])


def draw(folder: Path) -> list[Path]:
    """Draw Table 1 from the CSVs of its runs; returns what was written beside them."""
    reference = pd.read_csv(REFERENCE).set_index("stack")
    runs = pd.read_csv(folder / "runs.csv")
    table = summarize(runs, reference)
    words = setting(runs, reference)
    texts = {"table.csv": csv_of(table)}
    own, own_words = None, ""
    if (folder / "own_runs.csv").exists():
        own_runs = pd.read_csv(folder / "own_runs.csv")
        own, own_words = own_table(own_runs, reference), setting(own_runs, reference)
        texts["own.csv"] = csv_of(own)
    texts["README.md"] = markdown(table, own, words, own_words)
    texts["table.tex"] = latex(table, words)
    return write_all(folder, texts) + style.save(figure(table, words), folder / "figure")


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
            error_text(line.published_error, line.published_sd),
            error_text(line.our_error, line.our_sd),
            int(line.n),
            verdict(line),
            " ".join(own.hash),
        )
