"""Draw Figure 2's curves, learned schedules, table and replay from the records of its runs."""

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
from experiments.studies import curves, pages, style
from experiments.studies.claim import Claim, scale
from experiments.studies.curves import (
    Run,
    cell_text,
    count,
    mean_of,
    of,
    paired,
    precision,
    read_runs,
    write_drawn,
)
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

LOOKS: dict[str, dict[str, Any]] = {
    "plain": {"color": style.ORANGE, "linestyle": "--"},
    "tower": {"color": style.BLUE, "linestyle": "-"},
    "he": {"color": style.BLACK, "linestyle": ":"},
    "replay": {"color": style.GREEN, "linestyle": "-."},
}
PAPERS_STEPS = 64_000
PAIRS = {
    (lr, momentum): (Cell("plain", lr, momentum), Cell("tower", lr, momentum))
    for lr in sorted(LRS)
    for momentum in sorted(MOMENTA)
}


def read_figure2(folder: Path) -> list[Run]:
    """Read the runs in a folder's records, sorted by cell and seed, without old replays.

    Raises:
        ValueError: the records have several settings.
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
    """The runs' setting in words, for captions; it mentions a reduced setting."""
    summary = runs[0].summary
    steps = summary["trainer"].get("steps")
    length = f"{steps:,} steps" if steps else f"{summary['trainer']['epochs']} epochs"
    text = f"ResNet-20 on {data_label(summary['data'])}, {length}{precision(runs[0])}"
    reduced = f"; a reduced setting, the paper's is {PAPERS_STEPS:,} steps"
    return text + reduced * (not is_papers(runs))


def is_papers(runs: list[Run]) -> bool:
    """Whether the runs are as long as the paper's."""
    return runs[0].summary["trainer"].get("steps") == PAPERS_STEPS


# Tables.

METRICS = ("test_error", "train_loss")


def run_table(runs: list[Run]) -> pd.DataFrame:
    """A line for each run."""
    return curves.run_table(runs, METRICS, ("lr", "momentum"))


def cell_table(lines: pd.DataFrame) -> pd.DataFrame:
    """A line for each cell: means and sample standard deviations over its seeds."""
    return curves.cell_table(lines, ("kind", "lr", "momentum"), METRICS)


def compare(runs: list[Run]) -> dict[tuple[float, float], tuple[float, float]]:
    """For each lr and momentum, the mean training loss of the plain runs and of the towers."""
    return curves.compare(runs, PAIRS, "train_loss")


HEADS = (
    *("lr", "momentum", "Plain: error", "Tower: error", "Plain: loss", "Tower: loss"),
    *("n, plain", "n, tower", "Learned lr", "Learned momentum", "Tower's loss no worse"),
)


def grid_row(runs: list[Run], cells: pd.DataFrame, start: tuple[float, float]) -> list[str]:
    """The results of the plain runs and the towers from one start."""
    both = PAIRS[start]
    towers = of(runs, both[1])
    before, after = compare(runs).get(start, (math.nan, math.nan))
    return [
        *map(str, start),
        *(cell_text(cells, cell, "test_error", 2) for cell in both),
        *(cell_text(cells, cell, "train_loss", 3) for cell in both),
        *(str(len(of(runs, cell))) for cell in both),
        *(mean_of([run.learned[name] for run in towers]) for name in ("lr", "momentum")),
        "" if math.isnan(before) else "yes" if after <= before else "no",
    ]


def markdown(runs: list[Run], cells: pd.DataFrame, about: str) -> str:
    """The page: the tables, the figures and the results in words, as Markdown."""
    losses = compare(runs)
    better = sum(after <= before for before, after in losses.values())
    rows = (
        (
            KINDS[cell.kind],
            cell_text(cells, cell, "test_error", 2),
            cell_text(cells, cell, "train_loss", 3),
            str(len(of(runs, cell))),
        )
        for cell in (PAIRS[0.1, 0.9][0], REPLAYED, REPLAY, HE)
        if of(runs, cell)
    )
    return pages.page(
        f"# Figure 2: {setting(runs)}",
        "Test error in percent after the last epoch and mean training loss in nats of that epoch: "
        "mean ± standard deviation over n seeds. *Plain*: SGD with fixed lr and momentum. *Tower*: "
        "tunes both from the same start, with the paper's hyper-step sizes. Weight decay is 1e-4. "
        "*Learned*: the tower's final values, mean over seeds.",
        pages.table(HEADS, "rrrrrrrrrrl", (grid_row(runs, cells, start) for start in PAIRS)),
        f"The tower's training loss is no worse than the plain run's from {better} of "
        f"{len(losses)} starts.",
        pages.table(
            ("From lr 0.1, momentum 0.9", "Test error", "Training loss", "n"), "lrrr", rows
        ),
        about_replay(runs),
        *pages.captioned(captions_of(runs)),
        about,
    )


def about_replay(runs: list[Run]) -> str:
    """Explain the replay, and how far it ends from the tower that it follows."""
    if not of(runs, REPLAY):
        return ""
    first = min(run.seed for run in of(runs, REPLAYED))
    told = (
        "The replay is plain SGD that follows the lr and the momentum that the tower learned "
        f"with seed {first}, step by step."
    )
    once, again = (
        {run.seed: run for run in of(runs, cell)}.get(first) for cell in (REPLAYED, REPLAY)
    )
    if once and again and math.isfinite(apart := abs(again.loss - once.loss)):
        error = abs(again.summary["test_error"] - once.summary["test_error"])
        told += (
            " With that seed, its steps differ from the tower's only by rounding and by the "
            f"tower's changes between two records. Still, its final loss differs by {apart:.3f} "
            f"and its error by {error:.2f} points: smaller differences between two single runs "
            "mean nothing."
        )
    return told


def captions(folder: Path) -> dict[str, str]:
    return captions_of(read_figure2(folder))


def captions_of(runs: list[Run]) -> dict[str, str]:
    """The captions of all figures, by name."""
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
    """The table as LaTeX."""
    grid = [
        [*map(str, start), *(cell_text(cells, cell, "test_error", 2) for cell in both)]
        for start, both in PAIRS.items()
    ]
    he = f"\\multicolumn{{3}}{{l}}{{{KINDS['he']}}}"
    groups = [("", grid), ("", [[he, cell_text(cells, HE, "test_error", 2)]])]
    caption = f"Test error (\\%) from nine starts, {count(runs)}. {setting(runs)}"
    return pages.latex(caption, "rrrr", ("lr", "momentum", "plain", "tower"), groups)


# Figures.


def grid_figure(
    runs: list[Run], title: str, label: str, draw: Callable[[plt.Axes, Any], None]
) -> plt.Figure:
    """Draw 3 x 3 panels, lr by momentum."""
    figure, axes = style.subplots(3, 3, 6.0, sharex=True, squeeze=False)
    for axis, start in zip(axes.flat, PAIRS, strict=True):
        draw(axis, start)
        axis.set_title("lr {}, momentum {}".format(*start))
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    pairs = (zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes.flat)
    handles = {text: line for own in pairs for line, text in own}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    style.title(figure, f"{title}\n{setting(runs)}; {count(runs)}")
    return figure


def plot(axis: plt.Axes, runs: list[Run], column: str) -> None:
    """Plot a line for each run over the epochs."""
    for run in runs:
        axis.plot(*run.columns(column), linewidth=1, **LOOKS[run.cell.kind])
    if runs:
        axis.plot([], [], label=KINDS[runs[0].cell.kind], **LOOKS[runs[0].cell.kind])


def curves_figure(runs: list[Run], column: str, label: str) -> plt.Figure:
    def draw(axis: plt.Axes, start: Any) -> None:
        for cell in (HE, *PAIRS[start]):
            plot(axis, of(runs, cell), column)

    return grid_figure(runs, "Towers against plain SGD from the same start", label, draw)


def schedules_figure(runs: list[Run], column: str, label: str, log: bool) -> plt.Figure:
    def draw(axis: plt.Axes, start: Any) -> None:
        towers = of(runs, PAIRS[start][1])
        plot(axis, of(runs, HE)[:1], column)
        plot(axis, towers, column)
        if log and all((run.values[column] > 0).all() for run in towers):
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", useOffset=False)

    return grid_figure(runs, f"The {label} that towers learned", label, draw)


def replay_figure(runs: list[Run]) -> plt.Figure:
    """Draw loss, error and lr of the tower, its replay, He et al.'s schedule, and plain SGD."""
    figure, axes = style.subplots(1, 3, 2.8)
    chosen = [own for cell in (PAIRS[0.1, 0.9][0], HE, REPLAYED, REPLAY) if (own := of(runs, cell))]
    panels = (
        ("train_loss", "training loss (nats)"),
        ("test_error", "test error (%)"),
        ("0.lr", "lr"),
    )
    for axis, (column, label) in zip(axes, panels, strict=True):
        for own in chosen:
            plot(axis, own, column)
        axis.set(xlabel="epoch", ylabel=label)
    axes[2].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    seeds = count(run for own in chosen for run in own)
    style.title(figure, f"From lr 0.1, momentum 0.9\n{setting(runs)}; {seeds}")
    return figure


# All of it.


def beside_float32(runs: list[Run], folder: Path) -> str:
    """He et al.'s schedule in bf16 beside float32, if the results have both."""
    other = folder.with_name(folder.name.replace("_bf16", ""))
    if other == folder or not (other / "records").is_dir():
        return ""
    texts = []
    for name, own in (("bf16", runs), ("float32", read_figure2(other))):
        if found := of(own, HE):
            cells = cell_table(run_table(own))
            error, loss = (
                cell_text(cells, HE, *how) for how in (("test_error", 2), ("train_loss", 3))
            )
            texts.append(f"in {name} {error} % and {loss} nats (n = {len(found)})")
    return f"He et al.'s schedule ends {', '.join(texts)}." if len(texts) == 2 else ""


def draw(folder: Path) -> list[Path]:
    """Draw Figure 2 from a folder's records; returns the written files.

    Raises:
        ValueError: the records are damaged, or have several settings.
    """
    runs = read_figure2(folder)
    lines = run_table(runs)
    cells = cell_table(lines)
    costs = folder.parent / "cost.json"
    words = cost.words(json.loads(costs.read_text())) if costs.exists() else ""
    about = "\n\n".join(filter(None, (beside_float32(runs, folder), words)))
    texts = {"README.md": markdown(runs, cells, about), "table.tex": latex(runs, cells)}
    paths = write_drawn(folder, runs, lines, cells, texts)
    figures = {
        "train_loss": lambda: curves_figure(runs, "train_loss", "training loss (nats)"),
        "test_error": lambda: curves_figure(runs, "test_error", "test error (%)"),
        "lr": lambda: schedules_figure(runs, "0.lr", "lr", log=True),
        "momentum": lambda: schedules_figure(runs, "0.momentum", "momentum", log=False),
        "replay": lambda: replay_figure(runs),
    }
    for what in captions_of(runs):
        paths += style.save(figures[what](), folder / what)
    return paths


def claims(folder: Path) -> Iterator[Claim]:
    return claims_of(read_figure2(folder))


def claims_of(runs: list[Run]) -> Iterator[Claim]:
    """A claim for each start: the tower's training loss is no worse than the plain run's.

    One more: the learned lr decays, to half of the start or less.
    """
    data, words = data_label(runs[0].summary["data"]), setting(runs)
    how_much = scale(is_papers(runs))
    for start, (plain, tower) in compare(runs).items():
        seeds, hashes = paired(runs, *PAIRS[start])
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
        left = [run.learned["lr"] / cell.lr for run in towers]
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
    """The blocks in README and docs: the towers against plain SGD and He et al."""
    runs = read_figure2(folder)
    every = cell_table(run_table(runs))
    cells = every.set_index(["kind", "lr", "momentum"])
    plain, tower = cells.loc["plain"].align(cells.loc["tower"], join="inner", axis=0)
    gain = plain.test_error - tower.test_error
    lower, losses = (gain > 0).sum(), (tower.train_loss <= plain.train_loss).sum()
    start = gain.idxmax()
    farthest = (tower.learned_lr / tower.index.get_level_values("lr")).dropna().idxmin()
    text = (
        f"{setting(runs)} ({count(runs)}). He et al.'s schedule ends at a test error of "
        f"{cell_text(every, HE, 'test_error', 2)} %, the best tower at "
        f"{tower.test_error.min():.2f} %. The tower ends at a lower test error than the plain run "
        f"from {lower} of {len(tower)} starts, and at no higher training loss from {losses}. It "
        f"gains most from lr {start[0]:g} and momentum {start[1]:g}: "
        f"{tower.test_error[start]:.2f} % instead of "
        f"{plain.test_error[start]:.2f} %. It lowers lr most from lr {farthest[0]:g} and momentum "
        f"{farthest[1]:g}, to {tower.learned_lr[farthest]:.2g}; He et al. lower theirs to a "
        "hundredth of the start."
    )
    stuck = tower.index[tower.test_error >= 89]
    if len(stuck):
        starts = " and ".join(f"lr {lr:g}, momentum {momentum:g}" for lr, momentum in stuck)
        text += f" The tower never leaves chance from {starts}."
    epochs = runs[0].summary["trainer"]["epochs"]
    reduced = "" if is_papers(runs) else f"reduced to {epochs} epochs: "
    line = (
        "Figure 2: ResNet-20, CIFAR-10",
        "towers end no higher than the same start held fixed; their lr decays like He et al.'s",
        f"{reduced}a lower test error from {lower} of {len(tower)} starts, a training loss no "
        f"higher from {losses} ({count(runs)})",
    )
    return {"summary": text, "line": " | ".join(line)}
