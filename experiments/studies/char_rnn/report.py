"""The character RNN's table and curves, drawn from the records of its runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from experiments.data.catalog import label as data_label
from experiments.files import write_json
from experiments.records.provenance import provenance
from experiments.studies import pages, style
from experiments.studies.char_rnn.runs import BETAS, DECAY, FREE, KINDS, LRS, ONCE, Cell, cell_of
from experiments.studies.claim import Claim, paired, scale
from experiments.studies.curves import Run, count, mean_of, mean_text, of, precision, read_runs
from experiments.studies.pages import csv_of, table, write_all

LOOKS: dict[str, dict[str, Any]] = {
    "plain": {"color": style.ORANGE, "linestyle": "--"},
    "tower": {"color": style.BLUE, "linestyle": "-"},
    "betas": {"color": style.GREEN, "linestyle": "-."},
    "free": {"color": style.GREEN, "linestyle": "-", "alpha": 0.6},
    "decay": {"color": style.BLACK, "linestyle": ":"},
    "adam": {"color": style.VERMILION, "linestyle": "-"},
    "log": {"color": style.VERMILION, "linestyle": "--"},
    "auto": {"color": style.GREEN, "linestyle": ":"},
}
ORDER = [DECAY, *(Cell(kind, lr) for lr in LRS for kind in ("plain", "tower")), FREE, BETAS, *ONCE]
PAPERS_EPOCHS = 50

METRICS = ("test_perplexity", "test_bits_per_character", "test_loss", "train_loss")
LEARNED = ("lr", "beta1", "beta2")


def preset_of(folder: Path) -> str:
    return folder.name.partition("-")[0]


def setting(runs: list[Run], preset: str) -> str:
    """The runs' setting in words, for captions; a shorter one than the paper's is named as such."""
    summary = runs[0].summary
    epochs = summary["trainer"]["epochs"]
    text = f"Character RNN on {data_label(summary['data'])}, preset {preset}, {epochs} epochs"
    text += precision(runs[0])
    reduced = f"{text}; a reduced setting, the paper's is {PAPERS_EPOCHS} epochs"
    return text if is_papers(runs) else reduced


def is_papers(runs: list[Run]) -> bool:
    """Whether the runs are as long as the paper's."""
    return runs[0].summary["trainer"]["epochs"] == PAPERS_EPOCHS


def run_table(runs: list[Run]) -> pd.DataFrame:
    """A line for each run."""
    return pd.DataFrame(
        {
            "kind": run.cell.kind,
            "lr": run.cell.lr,
            "seed": run.seed,
            "hash": run.summary["hash"],
            "test_perplexity": run.summary["test_perplexity"],
            "test_bits_per_character": run.summary["test_bits_per_character"],
            "test_loss": run.summary["test_loss"],
            "train_loss": run.summary["train_loss"],
            "diverged": run.summary["diverged"],
            **{f"learned_{name}": run.summary["hyperparameters"][0][name] for name in LEARNED},
            "lowest_lr": run.values["0.lr"].min(),
        }
        for run in runs
    )


def cell_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A line for each cell: means and sample standard deviations over its seeds."""
    columns: dict[str, Any] = {"n": ("seed", "size")}
    for name in METRICS:
        columns |= {name: (name, "mean"), f"{name}_sd": (name, "std")}
    columns |= {"diverged": ("diverged", "sum"), "lowest_lr": ("lowest_lr", "min")}
    columns |= {f"learned_{name}": (f"learned_{name}", "mean") for name in LEARNED}
    return runs.groupby(["kind", "lr"]).agg(**columns).reset_index()


def perplexities(runs: list[Run], cell: Cell) -> dict[int, float]:
    """By seed; infinite where a run diverged."""
    return {
        run.seed: math.inf if run.summary["diverged"] else run.summary["test_perplexity"]
        for run in of(runs, cell)
    }


def compare(runs: list[Run]) -> dict[float, tuple[float, float]]:
    """For each start, the mean test perplexity of the plain runs and of the towers.

    Only of seeds that all of them have from that start; without those starts from which both have
    diverged.
    """
    found = {}
    for lr in LRS:
        plain, tower = (perplexities(runs, Cell(kind, lr)) for kind in ("plain", "tower"))
        if both := sorted(plain.keys() & tower.keys()):
            means = [sum(part[seed] for seed in both) / len(both) for part in (plain, tower)]
            if math.isfinite(min(means)):
                found[lr] = (means[0], means[1])
    return found


def verdicts(runs: list[Run]) -> list[str]:
    """What is to be said of the towers, in sentences."""
    found = compare(runs)
    better = [lr for lr, (plain, tower) in found.items() if tower <= plain]
    lines = []
    if found:
        lines.append(
            "The tower's final test perplexity is no worse than the plain run's from "
            f"{len(better)} of {len(found)} starts."
        )
    for lr in (lr for lr in found if lr not in better):
        fixed, tuned = (perplexities(runs, Cell(kind, lr)) for kind in ("plain", "tower"))
        more = [f"{tuned[seed] - fixed[seed]:+.3f}" for seed in sorted(fixed.keys() & tuned.keys())]
        lines.append(f"From lr {lr:g} it differs, seed by seed, by {', '.join(more)}.")
    if len(found) == len(LRS):
        worst = max(found, key=lambda lr: found[lr][0])
        best = min(plain for plain, _ in found.values())
        plain, tower = found[worst]
        if math.isfinite(plain) and plain > best:
            lines.append(
                f"From the worst start, lr {worst:g}, it closes "
                f"{100 * (plain - tower) / (plain - best):.0f} % of the distance between the plain "
                "run from there and the best plain run."
            )
    below = [run for run in runs if run.summary["tuned"] and lowest(run) <= 0]
    if below:
        lines.append(f"In {len(below)} towers lr was 0 or below at some time.")
    return lines


def lowest(run: Run) -> float:
    return float(run.values["0.lr"].min())


def rows(runs: list[Run], cells: pd.DataFrame) -> list[list[str]]:
    """The cells of the table, in words."""
    found = []
    for cell in ORDER:
        line = cells[(cells.kind == cell.kind) & (cells.lr == cell.lr)].squeeze()
        if line.empty:
            continue
        learned = [run.summary["hyperparameters"][0] for run in of(runs, cell)]
        tuned = of(runs, cell)[0].summary["tuned"]
        found.append(
            [
                KINDS[cell.kind],
                f"{cell.lr:g}",
                mean_text(line, "test_perplexity", 3),
                mean_text(line, "test_bits_per_character", 3),
                mean_text(line, "test_loss", 3),
                mean_text(line, "train_loss", 3),
                ", ".join(f"{name} {mean_of([h[name] for h in learned])}" for name in tuned),
                str(line.n),
            ]
        )
    return found


HEAD = ("", "From lr", "Test perplexity", "Bits per character", "Test loss", "Training loss")


def markdown(runs: list[Run], cells: pd.DataFrame, preset: str) -> str:
    """The table with the figure and what is to be said of them, as Markdown."""
    head = [*HEAD, "Learned", "n"]
    one = {run.cell.kind: run for run in runs if run.summary["tuned"]}  # of each kind of tower
    lines = [
        f"# {setting(runs, preset)}",
        "",
        "After the last epoch, losses in nats per character: mean ± standard deviation over n "
        "seeds. The test part is the last twentieth of each of 50 streams; the training loss is "
        "the mean over the last epoch. *Learned* are the final values, mean over seeds.",
        "",
        *table(head, "lrrrrrlr", rows(runs, cells)),
        "",
        *(part for verdict in verdicts(runs) for part in (verdict, "")),
        "The stacks: "
        + "; ".join(f"{KINDS[run.cell.kind]}, `{run.summary['stack']}`" for run in one.values())
        + ". Why most towers stop to tune, and how their hyper-step size was chosen, is in "
        "`configs/experiment/char_rnn_tower.yaml`.",
        "",
        f"![{caption(runs)}](figure.png)",
        "",
        caption(runs),
    ]
    return "\n".join(lines) + "\n"


def caption(runs: list[Run]) -> str:
    return (
        "Training loss, test perplexity and lr by the epoch, from three starts "
        f"({count(runs)}, a line for each seed)."
    )


def latex(runs: list[Run], cells: pd.DataFrame, preset: str) -> str:
    """The table for a paper."""
    body = ["\\midrule", *(pages.latex_row(row[:4]) for row in rows(runs, cells))]
    heads = ("", "from lr", "test perplexity", "bits per character")
    return pages.latex(f"{setting(runs, preset)}; {count(runs)}", "lrrr", heads, body)


def nearest(lr: float) -> float:
    """The column in which a cell is shown."""
    return min(LRS, key=lambda start: abs(math.log(start / lr)))


def figure(runs: list[Run], preset: str) -> plt.Figure:
    """Loss, perplexity and lr below each other, a column for each start."""
    panels = (
        ("train_loss", "training loss (nats)"),
        ("test_perplexity", "test perplexity"),
        ("0.lr", "lr"),
    )
    fig, axes = plt.subplots(
        len(panels), len(LRS), figsize=(style.WIDTH, 6.0), sharex=True, sharey="row", squeeze=False
    )
    labels: dict[str, Any] = {}
    for column, lr in zip(axes.T, LRS, strict=True):
        shown = [DECAY, Cell("plain", lr), Cell("tower", lr)]
        shown += [cell for cell in (FREE, BETAS, *ONCE) if nearest(cell.lr) == lr]
        for axis, (name, _) in zip(column, panels, strict=True):
            for cell in shown:
                for run in of(runs, cell):
                    (line,) = axis.plot(*run.columns(name), linewidth=1, **LOOKS[cell.kind])
                    labels[KINDS[cell.kind]] = line
        column[0].set_title(f"from lr {lr:g}")
        column[-1].set_xlabel("epoch")
    for row, (name, text) in zip(axes, panels, strict=True):
        row[0].set_ylabel(text)
        towers = [run for run in runs if lowest(run) <= 0]
        if name != "train_loss" and not (name == "0.lr" and towers):
            row[0].set_yscale("log")
        if name == "test_perplexity":
            row[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            row[0].yaxis.set_major_formatter(ScalarFormatter())
            row[0].yaxis.set_minor_locator(NullLocator())
    fig.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3)
    style.title(fig, f"{setting(runs, preset)}; {count(runs)}")
    return fig


def draw(folder: Path) -> list[Path]:
    """Draw the table and the curves from a folder's records; returns what was written there.

    Raises:
        ValueError: the records are damaged, or of several settings.
    """
    order = list(KINDS)
    runs = sorted(
        read_runs(folder / "records", cell_of),
        key=lambda run: (order.index(run.cell.kind), run.cell.lr, run.seed),
    )
    preset, lines = preset_of(folder), run_table(runs)
    cells = cell_table(lines)
    paths = write_all(
        folder,
        {
            "runs.csv": csv_of(lines, None),
            "table.csv": csv_of(cells),
            "README.md": markdown(runs, cells, preset),
            "table.tex": latex(runs, cells, preset),
        },
    )
    write_json(folder / "runs.json", provenance([run.summary for run in runs]))
    return [*paths, folder / "runs.json", *style.save(figure(runs, preset), folder / "figure")]


def claims(folder: Path) -> Iterator[Claim]:
    """From each start, that the tower's test perplexity is no worse than without it."""
    runs, preset = read_runs(folder / "records", cell_of), preset_of(folder)
    for lr, (plain, tower) in compare(runs).items():
        seeds, hashes = paired(runs, Cell("plain", lr), Cell("tower", lr))
        yield Claim(
            data_label(runs[0].summary["data"]),
            f"character RNN, Adam from lr {lr}, {setting(runs, preset)}",
            scale(is_papers(runs)),
            "test perplexity, tower against plain",
            "lower",
            f"{tower:.3f} against {plain:.3f}",
            seeds,
            "yes" if tower <= plain else "no",
            hashes,
        )


def prose(folder: Path) -> dict[str, str]:
    """The towers against plain Adam, in words."""
    runs = read_runs(folder / "records", cell_of)
    cells = cell_table(run_table(runs))

    def of_cell(kind: str, lr: float) -> str:
        line = cells[(cells.kind == kind) & (cells.lr == lr)].squeeze()
        return mean_text(line, "test_perplexity", 2) if not line.empty else "not run"

    pairs = (
        f"{of_cell('tower', lr)} from lr {lr:g} (plain Adam {of_cell('plain', lr)})" for lr in LRS
    )
    text = (
        f"{setting(runs, preset_of(folder))} ({count(runs)}). The tower ends at a test perplexity "
        f"of {', '.join(pairs)}. From lr {FREE.lr:g}, a tower that tunes to the end ends at "
        f"{of_cell(FREE.kind, FREE.lr)}. char-rnn's own decay ends at "
        f"{of_cell(DECAY.kind, DECAY.lr)}."
    )
    epochs = runs[0].summary["trainer"]["epochs"]
    reduced = "" if is_papers(runs) else f"reduced to {epochs} epochs: "
    found = "; ".join(
        f"{of_cell('tower', lr)} (alone {of_cell('plain', lr)}) from lr {lr:g}" for lr in LRS
    )
    line = (
        "Character RNN, War and Peace",
        "Adam under a tower ends at a lower perplexity than alone",
        f"{reduced}{found}",
    )
    return {"summary": text, "line": " | ".join(line)}
