"""Draw the suite's tables and performance profile from the records of the runs.

The profile of a method (Dolan and Moré 2002) is the share of tasks on which its final value is
within a factor of the best method's, as a function of the factor.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.files import write_json
from experiments.studies import style
from experiments.studies.curves import Run, made, preset_of, read_runs
from experiments.studies.pages import csv_of, page, table, write_all
from experiments.studies.suite.runs import (
    CHOOSING,
    METHODS,
    OLD,
    PRESETS,
    REPORTING,
    TASKS,
    TUNED,
    cell_of,
    starts,
)

HALVES = {"for choosing": CHOOSING, "for reporting": REPORTING, "old": OLD}
REFERENCE = "Adam"
MOST = 10.0  # the largest factor of the profile


def line(run: Run) -> dict[str, Any]:
    """A run in the CSV: its final value, and its values at a quarter and half if tested there."""
    metric, curves = TASKS[run.cell.task].metric, run.curves
    steps = run.summary["steps"]

    def at(share: float) -> float:
        found = curves[metric][curves.step == round(share * steps)]
        return found.item() if len(found) else math.nan

    value = run.summary[metric]
    return {
        "task": run.cell.task,
        "method": run.cell.method,
        "start": run.cell.start,
        "seed": run.seed,
        "hash": run.summary["hash"],
        "steps": steps,
        "quarter": at(0.25),
        "half": at(0.5),
        "final": math.inf if value is None or run.summary["diverged"] else value,
        "learned_lr": run.summary["hyperparameters"][0]["lr"],
    }


def judged(runs: pd.DataFrame) -> pd.DataFrame:
    """A line for each task and method: the mean over seeds of one start.

    It is the best start of a tuned method, and the worst start of any other method.
    """
    keys = ["task", "method", "start"]
    means = runs.groupby(keys, dropna=False, sort=False)[["quarter", "half", "final"]].mean()
    means["n"] = runs.groupby(keys, dropna=False, sort=False).size()
    means = means.reset_index()
    lines = []
    for (_, method), own in means.groupby(["task", "method"], sort=False):
        places = own.final.argmin() if method in TUNED else own.final.argmax()
        chosen = own.iloc[places]
        lines.append({**chosen.to_dict(), "best": own.final.min(), "starts": len(own)})
    found = pd.DataFrame(lines)
    least = found.groupby("task").final.transform("min")
    adam = found[found.method == REFERENCE].set_index("task").final
    return found.assign(factor=found.final / least, ratio=found.final / found.task.map(adam))


def compared(found: pd.DataFrame) -> pd.DataFrame:
    """The lines of the tasks with runs of the reference."""
    return found[found.task.isin(found.task[found.method == REFERENCE])]


def ratios(found: pd.DataFrame, preset: str, tasks: tuple[str, ...]) -> list[str]:
    """The table of final values relative to the best fixed lr of Adam."""
    shown = [task for task in tasks if (compared(found).task == task).any()]
    rows = []
    for method in METHODS:
        own = found[found.method == method].set_index("task")
        if own.empty:
            continue
        most = len(starts(method, PRESETS[preset]))
        texts = ("" if task not in own.index else cell_text(own.loc[task], most) for task in shown)
        rows.append((method, *texts))
    heads = ("", *(TASKS[task].label for task in shown))
    return table(heads, "l" + "r" * len(shown), rows)


def cell_text(one: pd.Series, most: int) -> str:
    text = f"{one.ratio:.3g}" if math.isfinite(one.final) else "diverged"
    return text if one.starts == most else f"{text} ({one.starts} of {most} starts)"


def captions(folder: Path) -> dict[str, str]:
    return {"profile": "The share of tasks within a factor of the best"}


def profile(found: pd.DataFrame, preset: str) -> plt.Figure:
    """Draw the performance profiles of all methods."""
    figure, axis = plt.subplots(figsize=(style.WIDTH, 3.2))
    factors = np.geomspace(1, MOST, 400)
    count = found.task.nunique()
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for k, method in enumerate(METHODS):
        own = found[found.method == method]
        if own.task.nunique() == count:
            shares = [(own.factor <= factor).sum() / count for factor in factors]
            axis.step(
                factors,
                shares,
                where="post",
                label=method,
                color=style.VERMILION if method == "Auto" else colours[k],
                linewidth=2 if method in ("Auto", *TUNED) else 1,
            )
    axis.set_xscale("log")
    axis.set_xticks([1, 1.1, 1.5, 2, 5, 10], ["1", "1.1", "1.5", "2", "5", "10"])
    axis.set(xlim=(1, MOST), ylim=(0, 1.02), xlabel="factor of the best", ylabel="share of tasks")
    text = f"The suite, preset {preset}, {count} tasks"
    style.title(figure, "\n".join([text, reduced(preset)] if reduced(preset) else [text]))
    figure.legend(loc="outside right center")
    return figure


def within(found: pd.DataFrame) -> list[str]:
    """The table of the profile at some factors."""
    count = found.task.nunique()
    rows = []
    for method in METHODS:
        own = found[found.method == method]
        if own.task.nunique() == count:
            shares = (f"{(own.factor <= f).sum()} of {count}" for f in (1.05, 1.1, 1.5, 2))
            rows.append((method, *shares))
    return table(("", "1.05", "1.1", "1.5", "2"), "lrrrr", rows)


def on_the_way(found: pd.DataFrame) -> list[str]:
    """The table of Auto's and the tuned methods' values at a quarter, half and the end."""
    rows = [
        (
            f"{TASKS[one.task].label}, {one.method}",
            "" if one.start is None or math.isnan(one.start) else f"{one.start:g}",
            *(f"{value:.4g}" for value in (one.quarter, one.half, one.final)),
            f"{one.n}",
        )
        for one in found.itertuples()
        if one.method in ("Auto", "Auto-linear", *TUNED)
    ]
    heads = ("", "from lr", "a quarter", "half", "the end", "n")
    return table(heads, "lrrrrr", rows)


SAID = (
    "Final held-out loss (on cart-pole, 500 divided by the mean return), relative to the best "
    "fixed lr of Adam, mean over seeds; less is better. A tuned method (Adam, AdamW-cosine, "
    "ScheduleFree) counts with its best lr of the grid, any other method with its worst start."
)


def reduced(preset: str) -> str:
    """The reductions of a preset against the preset `paper`, in a sentence."""
    own, whole = PRESETS[preset], PRESETS["paper"]
    if own == whole:
        return ""
    left = [TASKS[task].label for task in whole.tasks if task not in own.tasks]
    return (
        f"Reduced: {len(own.seeds)} of {len(whole.seeds)} seeds; "
        f"{len(own.grid)} of {len(whole.grid)} lrs for the tuned methods, "
        f"from {own.grid[0]:.1g} to {own.grid[-1]:.1g}"
        + (f"; without {'; '.join(left)}" if left else "")
        + "."
    )


def draw(folder: Path) -> list[Path]:
    """Draw the page and the profile from a folder's records; returns the written files."""
    preset = preset_of(folder)
    read = read_runs(folder / "records", functools.partial(cell_of, preset), lambda c: c.task)
    tasks, methods = list(TASKS), list(METHODS)
    read.sort(
        key=lambda run: (
            tasks.index(run.cell.task),
            methods.index(run.cell.method),
            run.cell.start or 0.0,
            run.seed,
        )
    )
    runs = pd.DataFrame(map(line, read))
    found = judged(runs)
    tables = (
        part
        for name, half in HALVES.items()
        if (found.method.eq(REFERENCE) & found.task.isin(half)).any()
        for part in (f"## Tasks {name}", ratios(found, preset, half))
    )
    text = page(
        f"# The suite, preset {preset}",
        reduced(preset),
        SAID,
        *tables,
        "## Performance profile",
        "On how many tasks a method's final value is within a factor of the best method's.",
        f"![{captions(Path())['profile']}](profile.png)",
        within(compared(found)),
        "## On the way",
        on_the_way(found),
    )
    write_json(folder / "runs.json", made(read))
    texts = {"runs.csv": csv_of(runs, None), "table.csv": csv_of(found), "README.md": text}
    paths = [*write_all(folder, texts), folder / "runs.json"]
    return [*paths, *style.save(profile(compared(found), preset), folder / "profile")]


def prose(folder: Path) -> dict[str, str]:
    """The blocks in docs/start-anywhere.md."""
    preset, found = folder.name, judged(pd.read_csv(folder / "runs.csv"))
    return {
        "choosing": "\n".join(ratios(found, preset, CHOOSING)),
        "reporting": "\n".join(ratios(found, preset, REPORTING)),
        "profile": "\n".join(within(compared(found))),
        "reduced": reduced(preset),
    }
