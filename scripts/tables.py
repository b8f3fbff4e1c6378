"""Draw every table and figure from the records of the runs, without training.

    python -m scripts.tables
    python -m scripts.tables results=results/quick      # those of a reduced preset

The same records give the same files, byte for byte.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments.command import asked_for_help, split
from experiments.data import label as data_label
from experiments.run import guarded
from experiments.store import write_text
from experiments.table1 import LEARNED, REFERENCE
from scripts import style
from scripts.char_rnn import draw_char_rnn
from scripts.figure2 import draw_figure2
from scripts.figure3 import draw_figure3
from scripts.robustness import draw_robustness
from scripts.surface import draw_surface
from scripts.tables_v1 import draw_tables_v1

BLOCKS = {"a": "SGD", "b": "Adam", "c": "AdaGrad", "d": "RMSProp"}
KINDS = {"baseline": "plain", "tower": "tower", "relearned": "plain, relearned"}


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    results: str = "results"


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


def draw_table1(folder: Path) -> list[Path]:
    """Draw Table 1 from the CSVs in `folder`; returns what was written.

    Raises:
        ValueError: there is no table1_runs.csv.
    """
    source = folder / "table1_runs.csv"
    if not source.exists():
        raise ValueError(f"there is no {source}; python -m experiments.table1 makes it")
    reference = pd.read_csv(REFERENCE).set_index("stack")
    runs = pd.read_csv(source)
    table = summarize(runs, reference)
    words = setting(runs, reference)
    written = {"table1.csv": table.to_csv(index=False, lineterminator="\n", float_format="%.6g")}
    own, own_words = None, ""
    if (folder / "table1_own_runs.csv").exists():
        own_data = pd.read_csv(folder / "table1_own_runs.csv")
        own, own_words = own_table(own_data, reference), setting(own_data, reference)
        written["table1_own.csv"] = own.to_csv(
            index=False, lineterminator="\n", float_format="%.6g"
        )
    written["table1.md"] = markdown(table, own, words, own_words)
    written["table1.tex"] = latex(table, words)
    for name, text in written.items():
        write_text(folder / name, text)
    paths = [folder / name for name in written]
    return paths + style.save(figure(table, words), folder / "table1")


def draw_all(folder: Path) -> list[Path]:
    """Draw all that a folder has the records of; returns what was written.

    Raises:
        ValueError: it has none, or some that cannot be read.
    """
    drawings = {
        "figure2_*.jsonl.gz": draw_figure2,
        "figure3_*_runs.csv": draw_figure3,
        "surface_runs.csv": draw_surface,
        "char_rnn_*.jsonl.gz": draw_char_rnn,
        "robustness_*.jsonl.gz": draw_robustness,
        "tables_v1_runs.csv": draw_tables_v1,
    }
    paths = [
        path
        for pattern, draw in drawings.items()
        for source in sorted(folder.glob(pattern))
        for path in draw(source)
    ]
    if not paths or (folder / "table1_runs.csv").exists():
        paths += draw_table1(folder)
    return paths


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    for path in draw_all(Path(options.results)):
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
