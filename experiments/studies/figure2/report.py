"""Figure 2's curves, learned schedules, table and replay, drawn from the records of its runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from experiments.data.catalog import label as data_label
from experiments.files import write_json
from experiments.records.provenance import provenance
from experiments.studies import pages, style
from experiments.studies.claim import Claim, paired, scale
from experiments.studies.curves import Run, count, mean_of, mean_text, of, precision, read_runs
from experiments.studies.figure2 import cost
from experiments.studies.figure2.runs import (
    HE,
    KINDS,
    LRS,
    MOMENTA,
    REPLAY,
    REPLAYED,
    Cell,
    cell_of,
)
from experiments.studies.pages import csv_of, table, write_all

LOOKS: dict[str, dict[str, Any]] = {
    "plain": {"color": style.ORANGE, "linestyle": "--"},
    "tower": {"color": style.BLUE, "linestyle": "-"},
    "he": {"color": style.BLACK, "linestyle": ":"},
    "replay": {"color": style.GREEN, "linestyle": "-."},
}
PAPERS_STEPS = 64_000
GRID = [(lr, momentum) for lr in sorted(LRS) for momentum in sorted(MOMENTA)]


def read_figure2(folder: Path) -> list[Run]:
    """The runs in a folder's records, by cell and seed, without replays of other schedules.

    Raises:
        ValueError: it holds runs of several settings.
    """
    replayed = folder / "replay.csv"
    checksum = hashlib.sha256(replayed.read_bytes()).hexdigest() if replayed.exists() else None
    runs = [
        run
        for run in read_runs(folder / "records", cell_of)
        if run.cell.kind != "replay" or run.summary["schedule"]["file"] == checksum
    ]
    return sorted(runs, key=lambda run: (run.cell.lr, run.cell.momentum, run.cell.kind, run.seed))


def setting(runs: list[Run]) -> str:
    """The runs' setting in words, for captions; a shorter one than the paper's is named as such."""
    summary = runs[0].summary
    steps = summary["trainer"].get("steps")
    length = f"{steps:,} steps" if steps else f"{summary['trainer']['epochs']} epochs"
    text = f"ResNet-20 on {data_label(summary['data'])}, {length}{precision(runs[0])}"
    reduced = f"{text}; a reduced setting, the paper's is {PAPERS_STEPS:,} steps"
    return text if is_papers(runs) else reduced


def is_papers(runs: list[Run]) -> bool:
    """Whether the runs are as long as the paper's."""
    return runs[0].summary["trainer"].get("steps") == PAPERS_STEPS


# Tables.


def run_table(runs: list[Run]) -> pd.DataFrame:
    """A line for each run."""
    return pd.DataFrame(
        {
            "kind": run.cell.kind,
            "lr": run.cell.lr,
            "momentum": run.cell.momentum,
            "seed": run.seed,
            "hash": run.summary["hash"],
            "test_error": run.summary["test_error"],
            "train_loss": run.summary["train_loss"],
            "diverged": run.summary["diverged"],
            "learned_lr": run.summary["hyperparameters"][0]["lr"],
            "learned_momentum": run.summary["hyperparameters"][0]["momentum"],
        }
        for run in runs
    )


def cell_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A line for each cell: means and sample standard deviations over its seeds."""
    cells = runs.groupby(["kind", "lr", "momentum"])
    return cells.agg(
        n=("seed", "size"),
        test_error=("test_error", "mean"),
        test_error_sd=("test_error", "std"),
        train_loss=("train_loss", "mean"),
        train_loss_sd=("train_loss", "std"),
        diverged=("diverged", "sum"),
        learned_lr=("learned_lr", "mean"),
        learned_momentum=("learned_momentum", "mean"),
    ).reset_index()


def cell_text(cells: pd.DataFrame, cell: Cell, what: str, digits: int) -> str:
    """`mean_text` of a cell; nothing where it has not been run."""
    line = cells[
        (cells.kind == cell.kind) & (cells.lr == cell.lr) & (cells.momentum == cell.momentum)
    ].squeeze()
    return "" if line.empty else mean_text(line, what, digits)


def compare(runs: list[Run]) -> dict[tuple[float, float], tuple[float, float]]:
    """For each lr and momentum, the mean training loss of the plain runs and of the towers.

    Only of seeds that both have; without the starts from which both have diverged.
    """
    found = {}
    for start in GRID:
        plain, tower = (
            {run.seed: run.loss for run in of(runs, Cell(kind, *start))}
            for kind in ("plain", "tower")
        )
        if both := sorted(plain.keys() & tower.keys()):
            means = [sum(part[seed] for seed in both) / len(both) for part in (plain, tower)]
            if math.isfinite(min(means)):
                found[start] = (means[0], means[1])
    return found


HEADS = (
    *("lr", "momentum", "Plain: error", "Tower: error", "Plain: loss", "Tower: loss"),
    *("n, plain", "n, tower", "Learned lr", "Learned momentum", "Tower's loss no worse"),
)


def markdown(runs: list[Run], cells: pd.DataFrame, about: str) -> str:
    """The table with the figures and what is to be said of them, as Markdown."""
    losses = compare(runs)
    grid = []
    for lr, momentum in GRID:
        both = _, tower = Cell("plain", lr, momentum), Cell("tower", lr, momentum)
        before, after = losses.get((lr, momentum), (math.nan, math.nan))
        towers = [run.summary["hyperparameters"][0] for run in of(runs, tower)]
        grid.append(
            [
                *(f"{lr}", f"{momentum}"),
                *(cell_text(cells, cell, "test_error", 2) for cell in both),
                *(cell_text(cells, cell, "train_loss", 3) for cell in both),
                *(str(len(of(runs, cell))) for cell in both),
                *(mean_of([values[key] for values in towers]) for key in ("lr", "momentum")),
                "" if math.isnan(before) else "yes" if after <= before else "no",
            ]
        )
    lines = [
        f"# Figure 2: {setting(runs)}",
        "",
        "Test error in percent after the last epoch and mean training loss in nats of that epoch: "
        "mean ± standard deviation over n seeds. From each start plain SGD with lr and momentum "
        "held fixed, and the tower that tunes both, with the paper's hyper-step sizes. Weight "
        "decay 1e-4 throughout. *Learned* are the tower's final values, mean over seeds.",
        "",
        *table(HEADS, "rrrrrrrrrrl", grid),
    ]
    better = sum(after <= before for before, after in losses.values())
    lines += [
        "",
        f"The tower's training loss is no worse than the plain run's from {better} of "
        f"{len(losses)} starts.",
        "",
        *table(
            ("From lr 0.1, momentum 0.9", "Test error", "Training loss", "n"),
            "lrrr",
            (
                (
                    KINDS[cell.kind],
                    cell_text(cells, cell, "test_error", 2),
                    cell_text(cells, cell, "train_loss", 3),
                    str(len(of(runs, cell))),
                )
                for cell in (Cell("plain", 0.1, 0.9), REPLAYED, REPLAY, HE)
                if of(runs, cell)
            ),
        ),
    ]
    if of(runs, REPLAY):
        first = min(run.seed for run in of(runs, REPLAYED))
        told = (
            "The replay is plain SGD that follows the lr and the momentum that the tower learned "
            f"with seed {first}, step by step."
        )
        once, again = (
            {run.seed: run for run in of(runs, cell)}.get(first) for cell in (REPLAYED, REPLAY)
        )
        if once and again and not (once.summary["diverged"] or again.summary["diverged"]):
            apart = abs(again.loss - once.loss)
            error = abs(again.summary["test_error"] - once.summary["test_error"])
            told += (
                " With that seed these are the tower's own steps, but for rounding and for what "
                "the tower did between two records, and yet it ends with a loss "
                f"{apart:.3f} and an error {error:.2f} points away: smaller differences between "
                "two single runs say nothing."
            )
        lines += ["", told]
    for figure, caption in captions(runs).items():
        lines += ["", f"![{caption}]({figure}.png)", "", caption]
    return "\n".join([*lines, *(["", about] if about else [])]) + "\n"


def captions(runs: list[Run]) -> dict[str, str]:
    """What is drawn, with a line on each."""
    found = {
        "train_loss": "Training loss from nine starts: towers against plain SGD",
        "test_error": "Test error from nine starts: towers against plain SGD",
        "lr": "The lr that towers learned, beside He et al.'s schedule",
        "momentum": "The momentum that towers learned, beside the 0.9 of He et al.",
    }
    if of(runs, REPLAY):
        found["replay"] = "The learned schedule, replayed with plain SGD"
    return {name: f"{text} ({count(runs)}, a line for each seed)." for name, text in found.items()}


def latex(runs: list[Run], cells: pd.DataFrame) -> str:
    """The table for a paper."""
    body = ["\\midrule"]
    for lr, momentum in GRID:
        both = (Cell(kind, lr, momentum) for kind in ("plain", "tower"))
        texts = [cell_text(cells, cell, "test_error", 2) for cell in both]
        body.append(pages.latex_row([f"{lr}", f"{momentum}", *texts]))
    he = f"\\multicolumn{{3}}{{l}}{{{KINDS['he']}}}"
    body += ["\\midrule", pages.latex_row([he, cell_text(cells, HE, "test_error", 2)])]
    caption = f"Test error (\\%) from nine starts, {count(runs)}. {setting(runs)}"
    return pages.latex(caption, "rrrr", ("lr", "momentum", "plain", "tower"), body)


# Figures.


def grid_figure(
    runs: list[Run], title: str, label: str, draw: Callable[[plt.Axes, float, float], None]
) -> plt.Figure:
    """3 x 3 panels, lr by momentum."""
    lrs, momenta = sorted(LRS), sorted(MOMENTA)
    figure, axes = plt.subplots(
        len(lrs), len(momenta), figsize=(style.WIDTH, 6.0), sharex=True, squeeze=False
    )
    for row, lr in zip(axes, lrs, strict=True):
        for axis, momentum in zip(row, momenta, strict=True):
            draw(axis, lr, momentum)
            axis.set_title(f"lr {lr}, momentum {momentum}")
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    handles = {text: line for axis in axes.flat for line, text in zip(*labelled(axis), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    style.title(figure, f"{title}\n{setting(runs)}; {count(runs)}")
    return figure


def labelled(axis: plt.Axes) -> tuple[list[Any], list[str]]:
    return axis.get_legend_handles_labels()


def plot(axis: plt.Axes, runs: list[Run], column: str) -> None:
    """One line for each run, by the epoch."""
    for run in runs:
        axis.plot(*run.columns(column), linewidth=1, **LOOKS[run.cell.kind])
    if runs:
        axis.plot([], [], label=KINDS[runs[0].cell.kind], **LOOKS[runs[0].cell.kind])


def curves_figure(runs: list[Run], column: str, label: str) -> plt.Figure:
    def draw(axis: plt.Axes, lr: float, momentum: float) -> None:
        for cell in (HE, Cell("plain", lr, momentum), Cell("tower", lr, momentum)):
            plot(axis, of(runs, cell), column)

    return grid_figure(runs, "Towers against plain SGD from the same start", label, draw)


def schedules_figure(runs: list[Run], column: str, label: str, log: bool) -> plt.Figure:
    def draw(axis: plt.Axes, lr: float, momentum: float) -> None:
        towers = of(runs, Cell("tower", lr, momentum))
        for cell in (HE, Cell("tower", lr, momentum)):
            plot(axis, of(runs, cell)[: 1 if cell == HE else None], column)
        if log and all((run.values[column] > 0).all() for run in towers):
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", useOffset=False)

    return grid_figure(runs, f"The {label} that towers learned", label, draw)


def replay_figure(runs: list[Run]) -> plt.Figure:
    """Loss, error and lr of the tower, of its schedule replayed, of He et al., and of plain SGD."""
    figure, axes = plt.subplots(1, 3, figsize=(style.WIDTH, 2.8), squeeze=False)
    shown = (Cell("plain", 0.1, 0.9), HE, REPLAYED, REPLAY)
    panels = (
        ("train_loss", "training loss (nats)"),
        ("test_error", "test error (%)"),
        ("0.lr", "lr"),
    )
    for axis, (column, label) in zip(axes[0], panels, strict=True):
        for cell in shown:
            plot(axis, of(runs, cell), column)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
    axes[0, 2].set_yscale("log")
    figure.legend(*labelled(axes[0, 0]), loc="outside lower center", ncols=4)
    chosen = [run for cell in shown for run in of(runs, cell)]
    style.title(figure, f"From lr 0.1, momentum 0.9\n{setting(runs)}; {count(chosen)}")
    return figure


# All of it.


def beside_float32(runs: list[Run], folder: Path) -> str:
    """He et al.'s schedule in bf16 beside the same in float32, where a preset has both."""
    other = folder.with_name(folder.name.replace("_bf16", ""))
    if other == folder or not (other / "records").is_dir():
        return ""
    texts = []
    for name, own in (("bf16", runs), ("float32", read_figure2(other))):
        if found := of(own, HE):
            error, loss = (
                cell_text(cell_table(run_table(own)), HE, what, digits)
                for what, digits in (("test_error", 2), ("train_loss", 3))
            )
            texts.append(f"in {name} {error} % and {loss} nats (n = {len(found)})")
    return f"He et al.'s schedule ends {', '.join(texts)}." if len(texts) == 2 else ""


def draw(folder: Path) -> list[Path]:
    """Draw Figure 2 from a folder's records; returns what was written there.

    Raises:
        ValueError: the records are damaged, or of several settings.
    """
    runs = read_figure2(folder)
    lines = run_table(runs)
    cells = cell_table(lines)
    costs = folder.parent / "cost.json"
    words = cost.words(json.loads(costs.read_text())) if costs.exists() else ""
    words = "\n\n".join(part for part in (beside_float32(runs, folder), words) if part)
    paths = write_all(
        folder,
        {
            "runs.csv": csv_of(lines, None),
            "table.csv": csv_of(cells),
            "README.md": markdown(runs, cells, words),
            "table.tex": latex(runs, cells),
        },
    )
    write_json(folder / "runs.json", provenance([run.summary for run in runs]))
    paths.append(folder / "runs.json")
    figures = {
        "train_loss": lambda: curves_figure(runs, "train_loss", "training loss (nats)"),
        "test_error": lambda: curves_figure(runs, "test_error", "test error (%)"),
        "lr": lambda: schedules_figure(runs, "0.lr", "lr", log=True),
        "momentum": lambda: schedules_figure(runs, "0.momentum", "momentum", log=False),
        "replay": lambda: replay_figure(runs),
    }
    for what in captions(runs):
        paths += style.save(figures[what](), folder / what)
    return paths


def claims(folder: Path) -> Iterator[Claim]:
    return claims_of(read_figure2(folder))


def claims_of(runs: list[Run]) -> Iterator[Claim]:
    """From each start, that the tower's training loss is no worse than without it.

    And that the learned lr decays: at its end it is to be half of the start or less.
    """
    data, words = data_label(runs[0].summary["data"]), setting(runs)
    how_much = scale(is_papers(runs))
    for start, (plain, tower) in compare(runs).items():
        seeds, hashes = paired(runs, *(Cell(kind, *start) for kind in ("plain", "tower")))
        yield Claim(
            data,
            f"Figure 2, lr {start[0]}, momentum {start[1]}, {words}",
            how_much,
            "training loss (nats), tower against plain",
            "lower",
            f"{tower:.3f} against {plain:.3f}",
            seeds,
            "yes" if tower <= plain else "no",
            hashes,
        )
    cell = REPLAYED
    towers = [run for run in of(runs, cell) if not run.summary["diverged"]]
    if towers:
        left = [run.summary["hyperparameters"][0]["lr"] / cell.lr for run in towers]
        mean, sd = fmean(left), f" ± {stdev(left):.2g}" if len(left) > 1 else ""
        yield Claim(
            data,
            f"Figure 2, learned from lr {cell.lr}, momentum {cell.momentum}, {words}",
            how_much,
            "learned lr at the end, as a share of the start",
            "decays",
            f"{mean:.2g}{sd}",
            len(towers),
            "yes" if mean <= 0.5 else "no",
            " ".join(run.summary["hash"] for run in towers),
        )


def prose(folder: Path) -> dict[str, str]:
    """The towers against plain SGD and He et al., in words."""
    runs = read_figure2(folder)
    cells = cell_table(run_table(runs)).set_index(["kind", "lr", "momentum"])
    plain, tower = cells.loc["plain"], cells.loc["tower"]
    both = plain.index.intersection(tower.index)
    plain, tower = plain.loc[both], tower.loc[both]
    lower = (tower.test_error < plain.test_error).sum()
    losses = (tower.train_loss <= plain.train_loss).sum()
    gain = plain.test_error - tower.test_error
    start = gain.idxmax()
    moved = (tower.learned_lr / tower.index.get_level_values("lr")).dropna()
    farthest = moved.idxmin()
    best = tower.test_error.min()
    text = (
        f"{setting(runs)} ({count(runs)}). He et al.'s schedule ends at a test error of "
        f"{cell_text(cells.reset_index(), HE, 'test_error', 2)} %, the best tower at {best:.2f} %. "
        f"The tower ends at a lower test error than the plain run from {lower} of {len(both)} "
        f"starts, and at no higher training loss from {losses}. It gains most from lr {start[0]:g} "
        f"and momentum {start[1]:g}: {tower.test_error[start]:.2f} % in place of "
        f"{plain.test_error[start]:.2f} %. It lowers lr most from lr {farthest[0]:g} and momentum "
        f"{farthest[1]:g}, to {tower.learned_lr[farthest]:.2g}; He et al. lower theirs to a "
        "hundredth of the start."
    )
    stuck = [start for start in both if min(tower.test_error[start], 89) == 89]
    if stuck:
        starts = " and ".join(f"lr {lr:g}, momentum {momentum:g}" for lr, momentum in stuck)
        text += f" The tower never leaves chance from {starts}."
    epochs = runs[0].summary["trainer"]["epochs"]
    reduced = "" if is_papers(runs) else f"reduced to {epochs} epochs: "
    line = (
        "Figure 2: ResNet-20, CIFAR-10",
        "towers end no higher than the same start held fixed; their lr decays like He et al.'s",
        f"{reduced}a lower test error from {lower} of {len(both)} starts, a training loss no "
        f"higher from {losses} ({count(runs)})",
    )
    return {"summary": text, "line": " | ".join(line)}
