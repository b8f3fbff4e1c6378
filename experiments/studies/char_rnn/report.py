"""Draw the character RNN's table and curves from the records of its runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from experiments.data.catalog import label as data_label
from experiments.studies import curves, pages, style
from experiments.studies.char_rnn.runs import (
    BETAS,
    CELLS,
    DECAY,
    FREE,
    KINDS,
    LRS,
    ONCE,
    PRESETS,
    Cell,
    cell_of,
)
from experiments.studies.claim import Claim, scale
from experiments.studies.curves import (
    Run,
    cell_text,
    count,
    mean_of,
    of,
    paired,
    precision,
    preset_of,
    write_drawn,
)

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
PAIRS = {lr: (Cell("plain", lr), Cell("tower", lr)) for lr in LRS}
ORDER = [DECAY, *(cell for pair in PAIRS.values() for cell in pair), FREE, BETAS, *ONCE]
PAPERS_EPOCHS = 50

METRICS = ("test_perplexity", "test_bits_per_character", "test_loss", "train_loss")


def read_runs(folder: Path) -> list[Run]:
    """Read the runs in a folder's records, sorted by cell and seed.

    Raises:
        ValueError: the records are damaged, or have several settings.
    """
    order = list(KINDS)
    runs = curves.read_runs(folder / "records", cell_of)
    return sorted(runs, key=lambda run: (order.index(run.cell.kind), run.cell.lr, run.seed))


def setting(runs: list[Run], preset: str) -> str:
    """The runs' setting in words, for captions; it mentions a reduced setting."""
    summary = runs[0].summary
    epochs = summary["trainer"]["epochs"]
    text = f"Character RNN on {data_label(summary['data'])}, preset {preset}, {epochs} epochs"
    text += precision(runs[0])
    reduced = f"; a reduced setting, the paper's is {PAPERS_EPOCHS} epochs"
    return text + reduced * (not is_papers(runs))


def is_papers(runs: list[Run]) -> bool:
    """Whether the runs are as long as the paper's."""
    return runs[0].summary["trainer"]["epochs"] == PAPERS_EPOCHS


def run_table(runs: list[Run]) -> pd.DataFrame:
    """A line for each run."""
    lines = curves.run_table(runs, METRICS, ("lr", "beta1", "beta2"))
    return lines.assign(lowest_lr=[lowest(run) for run in runs])


def cell_table(lines: pd.DataFrame) -> pd.DataFrame:
    """A line for each cell: means and sample standard deviations over its seeds."""
    return curves.cell_table(lines, ("kind", "lr"), METRICS, lowest_lr=("lowest_lr", "min"))


def compare(runs: list[Run]) -> dict[float, tuple[float, float]]:
    """For each start, the mean test perplexity of the plain runs and of the towers."""
    return curves.compare(runs, PAIRS, "test_perplexity")


def lowest(run: Run) -> float:
    return float(run.values["0.lr"].min())


def verdicts(runs: list[Run]) -> list[str]:
    """The towers' results, in sentences."""
    found = compare(runs)
    better = [lr for lr, (plain, tower) in found.items() if tower <= plain]
    lines = []
    if found:
        lines.append(
            "The tower's final test perplexity is no worse than the plain run's from "
            f"{len(better)} of {len(found)} starts."
        )
    for lr in (lr for lr in found if lr not in better):
        fixed, tuned = (
            {run.seed: run.judged("test_perplexity") for run in of(runs, cell)}
            for cell in PAIRS[lr]
        )
        more = [f"{tuned[seed] - fixed[seed]:+.3f}" for seed in sorted(fixed.keys() & tuned.keys())]
        lines.append(f"From lr {lr:g} it differs, seed by seed, by {', '.join(more)}.")
    if len(found) == len(LRS):
        worst = max(found, key=lambda lr: found[lr][0])
        best = min(plain for plain, _ in found.values())
        plain, tower = found[worst]
        if math.isfinite(plain) and plain > best:
            lines.append(
                f"From the worst start, lr {worst:g}, it closes "
                f"{100 * (plain - tower) / (plain - best):.0f} % of the gap between the plain run "
                "from that start and the best plain run."
            )
    below = [run for run in runs if run.summary["tuned"] and lowest(run) <= 0]
    if below:
        lines.append(f"lr fell to 0 or below in {len(below)} towers.")
    return lines


def missing(runs: list[Run], preset: str) -> list[str]:
    """The names of the cells that have no run yet, as a sentence."""
    known = PRESETS.get(preset.partition("-")[0])
    wanted = (*CELLS, *known.once) if known else ()
    found = {run.cell for run in runs}
    labels = [cell.label for cell in wanted if cell not in found]
    return [f"Not run yet: {'; '.join(labels)}."] if labels else []


def rows(runs: list[Run], cells: pd.DataFrame) -> list[list[str]]:
    """The cells of the table, in words."""
    found = []
    for cell in ORDER:
        if own := of(runs, cell):
            tuned = own[0].summary["tuned"]
            learned = (f"{name} {mean_of([run.learned[name] for run in own])}" for name in tuned)
            metrics = (cell_text(cells, cell, name, 3) for name in METRICS)
            label = KINDS[cell.kind], f"{cell.lr:g}"
            found.append([*label, *metrics, ", ".join(learned), str(len(own))])
    return found


def markdown(runs: list[Run], cells: pd.DataFrame, preset: str) -> str:
    """The page: the table, the figure and the results in words, as Markdown."""
    heads = ["", "From lr", "Test perplexity", "Bits per character", "Test loss", "Training loss"]
    one = {run.cell.kind: run for run in runs if run.summary["tuned"]}  # per kind of tower
    stacks = (f"{KINDS[run.cell.kind]}, `{run.summary['stack']}`" for run in one.values())
    return pages.page(
        f"# {setting(runs, preset)}",
        "Results after the last epoch, losses in nats per character: mean ± standard deviation "
        "over n seeds. The test part is the last twentieth of each of 50 streams; the training "
        "loss is the mean over the last epoch. *Learned*: final values, mean over seeds.",
        pages.table([*heads, "Learned", "n"], "lrrrrrlr", rows(runs, cells)),
        *missing(runs, preset),
        *verdicts(runs),
        f"The stacks: {'; '.join(stacks)}. `configs/experiment/char_rnn_tower.yaml` explains why "
        "most towers stop tuning, and the choice of their hyper-step size.",
        *pages.captioned(captions_of(runs)),
    )


def captions(folder: Path) -> dict[str, str]:
    return captions_of(read_runs(folder))


def captions_of(runs: list[Run]) -> dict[str, str]:
    what = "Training loss, test perplexity and lr over the epochs, from three starts"
    return {"figure": f"{what} ({count(runs)}, a line for each seed)."}


def latex(runs: list[Run], cells: pd.DataFrame, preset: str) -> str:
    """The table as LaTeX."""
    heads = ("", "from lr", "test perplexity", "bits per character")
    body = [row[:4] for row in rows(runs, cells)]
    return pages.latex(f"{setting(runs, preset)}; {count(runs)}", "lrrr", heads, [("", body)])


def nearest(lr: float) -> float:
    """The figure's column for a cell: the nearest start."""
    return min(LRS, key=lambda start: abs(math.log(start / lr)))


def figure(runs: list[Run], preset: str) -> plt.Figure:
    """Draw loss, perplexity and lr, a row each, with a column for each start."""
    panels = (
        ("train_loss", "training loss (nats)"),
        ("test_perplexity", "test perplexity"),
        ("0.lr", "lr"),
    )
    fig, axes = style.subplots(3, len(LRS), 6.0, sharex=True, sharey="row", squeeze=False)
    labels: dict[str, Any] = {}
    for column, (lr, pair) in zip(axes.T, PAIRS.items(), strict=True):
        shown = [DECAY, *pair]
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
        below = name == "0.lr" and any(lowest(run) <= 0 for run in runs)
        if name != "train_loss" and not below:
            row[0].set_yscale("log")
        if name == "test_perplexity":
            row[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            row[0].yaxis.set_major_formatter(ScalarFormatter())
            row[0].yaxis.set_minor_locator(NullLocator())
    fig.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3)
    style.title(fig, f"{setting(runs, preset)}; {count(runs)}")
    return fig


def draw(folder: Path) -> list[Path]:
    """Draw the table and the curves from a folder's records; returns the written files."""
    runs, preset = read_runs(folder), preset_of(folder)
    lines = run_table(runs)
    cells = cell_table(lines)
    texts = {
        "README.md": markdown(runs, cells, preset),
        "table.tex": latex(runs, cells, preset),
    }
    paths = write_drawn(folder, runs, lines, cells, texts)
    return paths + style.save(figure(runs, preset), folder / "figure")


def claims(folder: Path) -> Iterator[Claim]:
    """A claim for each start: the tower's test perplexity is no worse than the plain run's."""
    runs, preset = read_runs(folder), preset_of(folder)
    for lr, (plain, tower) in compare(runs).items():
        seeds, hashes = paired(runs, *PAIRS[lr])
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
    runs = read_runs(folder)
    cells = cell_table(run_table(runs))

    def said(cell: Cell) -> str:
        return cell_text(cells, cell, "test_perplexity", 2) or "not run"

    pairs = (
        f"{said(tower)} from lr {lr:g} (plain Adam {said(plain)})"
        for lr, (plain, tower) in PAIRS.items()
    )
    text = (
        f"{setting(runs, preset_of(folder))} ({count(runs)}). The tower ends at a test perplexity "
        f"of {', '.join(pairs)}. From lr {FREE.lr:g}, a tower that tunes to the end ends at "
        f"{said(FREE)}. char-rnn's own decay ends at {said(DECAY)}."
    )
    epochs = runs[0].summary["trainer"]["epochs"]
    reduced = "" if is_papers(runs) else f"reduced to {epochs} epochs: "
    found = "; ".join(
        f"{said(tower)} (alone {said(plain)}) from lr {lr:g}"
        for lr, (plain, tower) in PAIRS.items()
    )
    line = (
        "Character RNN, War and Peace",
        "Adam under a tower ends at a lower perplexity than alone",
        f"{reduced}{found}",
    )
    return {"summary": text, "line": " | ".join(line)}
