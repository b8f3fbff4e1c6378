"""Draw the robustness benchmark's tables, heat map and curves from the records of the runs."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from experiments.data.catalog import label as data_label
from experiments.files import write_json
from experiments.studies import curves as records
from experiments.studies import pages, style
from experiments.studies.curves import Run, counted, preset_of, read_runs
from experiments.studies.pages import csv_of, write_all
from experiments.studies.robustness.runs import (
    ABLATION,
    FIXED,
    FREE,
    PRESETS,
    TASKS,
    cell_of,
)
from experiments.studies.robustness.softmax_optimum import PATH as OPTIMUM

NEAR = (1.1, 1.5)  # factors of the best fixed lr's error
TIMES = "times.json"
REFERENCE = "torch.optim.Adam"

LABELS = {
    "Auto": "Auto",
    "SGD": "SGD",
    "Momentum": "SGD, momentum 0.9",
    "Adam": "Adam",
    "AdamW": "AdamW",
    "ScheduleFree": "Schedule-Free AdamW",
    "Prodigy": "Prodigy (no lr)",
    "DAdaptAdam": "D-Adapt Adam (no lr)",
    "DAdaptSGD": "D-Adapt SGD (no lr)",
    "SGD-HD": "SGD-HD",
    "Adam-HD": "Adam-HD",
    "Adam/SGD": "Adam / SGD(1e-5)",
    "SGD-5": "tower of SGD, height 5",
    "Adam-2": "tower of Adam, height 2",
    "Adam-5": "tower of Adam, height 5",
    "no-mean": "without the mean, as Adam",
    "no-log": "without the log domain, and so without trust",
    "no-normalize": "without normalize",
    "no-horizon": "without horizon",
    "no-trust": "without trust",
    "no-accumulator": "without an initial accumulator",
}
MAIN = [method for method in LABELS if method not in ABLATION]
PARTS = ["Auto", *ABLATION]


# The numbers.


def run_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A line for each run.

    `error` is the metric of the run's task. A diverged loss is infinite. A diverged run still has
    the test error of its last weights.
    """
    lines = records.run_table(runs, ("data", "test_error", "train_loss"), ("lr",))
    errors = [run.summary[TASKS[run.cell.task].metric] for run in runs]
    place = lines.columns.get_loc("test_error")
    lines.insert(place, "error", [math.inf if value is None else value for value in errors])
    return lines


def points(runs: pd.DataFrame) -> pd.DataFrame:
    """A line for each task, method and start: mean, sample standard deviation and range over seeds.

    `ratio` is the mean divided by the best fixed lr's mean on the task; NaN without a fixed lr.
    """
    groups = runs.groupby(["task", "method", "start"], sort=False, dropna=False)
    table = groups.agg(
        n=("seed", "size"),
        error=("error", "mean"),
        sd=("error", "std"),
        least=("error", "min"),
        most=("error", "max"),
        diverged=("diverged", "sum"),
    ).reset_index()
    best = {task: best_fixed(own) for task, own in table.groupby("task")}
    bars = [math.nan if best[task] is None else best[task].error for task in table.task]
    return table.assign(ratio=table.error / bars)


def best_fixed(own: pd.DataFrame) -> Any:
    """The point of the best fixed lr among one task's points; None if all diverged."""
    fixed = own[own.method.isin(FIXED) & np.isfinite(own.error)]
    return None if fixed.empty else fixed.loc[fixed.error.idxmin()]


def compared(table: pd.DataFrame, preset: str) -> pd.DataFrame:
    """The points to compare: without those that only search for the best fixed lr."""
    kept = (
        point.method in FREE or point.start in PRESETS[preset].tasks[point.task].starts
        for point in table.itertuples()
    )
    return table[np.fromiter(kept, bool, len(table))]


def robustness(table: pd.DataFrame, preset: str) -> pd.DataFrame:
    """A line for each task and method with runs: its decades of robustness.

    They count the powers of ten of starts whose error is within 1.1 and within 1.5 times the best
    fixed lr's: the share of such starts, times the powers of ten from the first to the last start.
    A method without a start is near from all starts or from none. Without a best fixed lr, they
    are NaN.
    """
    lines = []
    for (task, method), mine in compared(table, preset).groupby(["task", "method"]):
        starts = PRESETS[preset].tasks[str(task)].starts
        decades = round(math.log10(starts[-1] / starts[0])) + 1
        weight = len(starts) if method in FREE else 1
        worst = mine.loc[mine.error.idxmax()]
        near = {
            f"decades_{bar}": weight * (mine.ratio <= bar).sum() * (decades / len(starts))
            if mine.ratio.notna().all()
            else math.nan
            for bar in NEAR
        }
        lines.append(
            {
                **{"task": task, "method": method, **near, "worst": worst.error},
                **{"worst_ratio": worst.ratio, "worst_start": worst.start},
                **{"starts": weight * len(mine), "of": len(starts)},
            }
        )
    return pd.DataFrame(lines)


def verdicts(table: pd.DataFrame, preset: str) -> list[str]:
    """Auto's results on each task, in sentences."""
    found = []
    for task in PRESETS[preset].tasks:
        own = table[(table.task == task) & table.ratio.notna()]
        auto, prodigy = (own[own.method == method] for method in ("Auto", "Prodigy"))
        if auto.empty:
            continue
        limit, worst = TASKS[task].limit, auto.loc[auto.ratio.idxmax()]
        text = (
            f"{title(preset, task)}, {counted(auto.n)}: within {limit} times the best fixed lr's "
            f"error from {(auto.ratio <= limit).sum()} of {len(auto)} starts; {worst.ratio:.2f} "
            f"times from the worst start, {worst.start:g}"
        )
        if not prodigy.empty:
            as_good = (auto.error <= prodigy.error.item()).sum()
            text += f"; no worse than Prodigy from {as_good} of {len(auto)} starts"
        found.append(f"{text}.")
    return found


# The words.


def title(preset: str, task: str) -> str:
    """Such as "MLP, 5 epochs", with "(reduced)" if the preset `paper` differs."""
    setting, whole = PRESETS[preset].tasks[task], PRESETS["paper"].tasks[task]
    given = dict(override.split("=") for override in setting.overrides)
    steps, epochs = given.get("trainer.steps", "null"), given["trainer.epochs"]
    length = f"{epochs} epoch{'s' * (epochs != '1')}" if steps == "null" else f"{steps} steps"
    return f"{TASKS[task].label}, {length}{'' if setting == whole else ' (reduced)'}"


def reductions(preset: str) -> str:
    """The reductions of a preset against the preset `paper`, in a sentence."""
    found = []
    for task, setting in PRESETS[preset].tasks.items():
        whole = PRESETS["paper"].tasks[task]
        parts = []
        if setting.overrides != whole.overrides:
            parts.append(f"shorter than {title('paper', task).partition(', ')[2]}")
        if len(setting.starts) < len(whole.starts):
            parts.append(f"{len(setting.starts)} of {len(whole.starts)} starts")
        if setting.grid != whole.grid:
            low, high = setting.grid[0], setting.grid[-1]
            parts.append(f"search for the best fixed lr from {low:g} to {high:g}")
        if setting.seeds:
            parts.append("one seed" if setting.seeds == 1 else f"{setting.seeds} seeds")
        if parts:
            found.append(f"{title(preset, task).removesuffix(' (reduced)')}: {', '.join(parts)}")
    return f"Reduced settings: {'; '.join(found)}." if found else ""


def number(value: float, digits: int = 2) -> str:
    if math.isinf(value):
        return "diverged"
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.0e}".replace("e+", "e")


def overview(robust: pd.DataFrame, preset: str, methods: Sequence[str], times: Any) -> list[str]:
    """The table of methods and tasks, as lines of Markdown.

    Args:
        times: by method, the time of a step relative to the reference; None for no such column.
    """
    tasks = [task for task in PRESETS[preset].tasks if (robust.task == task).any()]
    heads = ["", *(title(preset, task) for task in tasks), *(["Step"] if times else [])]
    lines = {(line.task, line.method): line for _, line in robust.iterrows()}
    rows = [
        [
            LABELS[method],
            *(overview_cell(lines.get((task, method))) for task in tasks),
            *([f"{times[method]:.2f}" if method in times else ""] if times else []),
        ]
        for method in methods
        if (robust.method == method).any()
    ]
    return pages.table(heads, "l" + "r" * (len(heads) - 1), rows)


def overview_cell(line: Any) -> str:
    if line is None:
        return ""
    if math.isnan(line.worst_ratio):
        return "-"
    decades = (f"{line[f'decades_{near}']:.1f}" for near in NEAR)
    missing = f" ({line.starts} of {line.of} starts)" if line.starts < line.of else ""
    return f"{' / '.join(decades)} / {number(line.worst_ratio)}{missing}"


def ablated(robust: pd.DataFrame) -> pd.DataFrame:
    """The lines of `robustness` for the tasks with ablations of Auto."""
    return robust[robust.task.isin(robust.task[robust.method.isin(ABLATION)])]


OVERVIEW = (
    "The first two numbers of a cell: how many powers of ten of starts end within 1.1 times and "
    "within 1.5 times the error of the best fixed lr of SGD, SGD with momentum and Adam. The third "
    "number: the error from the worst start, divided by the same error. All starts count alike; "
    "starts from 1e-8 to 100 count as 11 powers of ten. The search for the best fixed lr also "
    "tries half powers of ten, so its own rule may have no start near it."
)


def markdown(table: pd.DataFrame, runs: pd.DataFrame, preset: str, times: Any) -> str:
    """Everything in words and numbers."""
    robust, said = robustness(table, preset), verdicts(table, preset)
    done = [task for task in PRESETS[preset].tasks if (table.task == task).any()]
    missing = [title(preset, task) for task in PRESETS[preset].tasks if task not in done]
    parts: list[Any] = [
        f"# Start anywhere, preset {preset}",
        reductions(preset),
        f"Not run yet: {'; '.join(missing)}." if missing else "",
        f"![{CAPTION}](figure.png)",
        f"{CAPTION} {counted(drawn(table, preset).n)}.",
        "## Decades of robustness",
        OVERVIEW
        + f" *Step*: the time of a training step of the MLP, relative to {REFERENCE} (foreach)."
        * bool(times)
        + " A dash: no fixed lr to compare with." * bool(robust.worst_ratio.isna().any()),
        overview(robust, preset, MAIN, times),
        "Auto:" if said else "",
        [f"- {verdict}" for verdict in said],
    ]
    if robust.method.isin(ABLATION).any():
        parts.append("## Auto without one of its parts")
        parts.append(overview(ablated(robust), preset, PARTS, None))
    for task in done:
        own, data = table[table.task == task], data_label(runs.data[runs.task == task].iloc[0])
        parts.append(f"## {title(preset, task)}, {data}: {TASKS[task].unit}")
        parts += [remarks(own, preset, task, data), matrix(own, preset, task)]
    return pages.page(*parts)


def captions(folder: Path) -> dict[str, str]:
    short = "Test error of the MLP on MNIST against the initial learning rate, by method"
    return {"figure": CAPTION, "mlp": short}


def remarks(own: pd.DataFrame, preset: str, task: str, data: str) -> str:
    best = best_fixed(own)
    found = []
    if best is not None:
        found.append(
            f"The best fixed lr is {best.start:g}, with {LABELS[best.method]}: {best.error:.4g}."
        )
        if chosen := some_fixed(own, PRESETS[preset].tasks[task].grid):
            found.append(f"Searched so far: {chosen}.")
    if TASKS[task].metric == "objective" and data == "MNIST":
        least = json.loads(OPTIMUM.read_text())["objective"]
        found.append(f"The optimum, by L-BFGS: {least:.6f}.")
    return " ".join(found)


def some_fixed(own: pd.DataFrame, grid: Sequence[float]) -> str:
    """The fixed lrs that one task's search has run; empty if it has run all."""
    run = {method: own.start[own.method == method] for method in FIXED}
    if all(set(grid) <= set(lrs) for lrs in run.values()):
        return ""
    lrs = {method: sorted(set(grid) & set(starts)) for method, starts in run.items()}
    return "; ".join(
        f"{LABELS[method]} {', '.join(f'{lr:g}' for lr in own) or 'none'}"
        for method, own in lrs.items()
    )


def matrix(own: pd.DataFrame, preset: str, task: str) -> list[str]:
    """Errors by method and start, as lines of Markdown: mean ± standard deviation over seeds."""
    starts = PRESETS[preset].tasks[task].starts
    digits = 2 if TASKS[task].metric == "test_error" else 4
    rows = []
    for method in LABELS:
        mine = own[own.method == method]
        mine = mine if method in FREE else mine[mine.start.isin(starts)]
        if not mine.empty:
            texts = {line.start: _text(line, digits) for line in mine.itertuples()}
            free = _text(next(mine.itertuples()), digits) if method in FREE else ""
            label = f"{'Auto ' * (method in ABLATION)}{LABELS[method]}"
            cells = [texts.get(start, free) for start in starts]
            rows.append([label, *cells, counted(mine.n).removeprefix("n = ")])
    heads = ["", *(f"{start:g}" for start in starts), "n"]
    return pages.table(heads, "l" + "r" * (len(heads) - 1), rows)


def _text(line: Any, digits: int) -> str:
    if math.isinf(line.error):
        return f"diverged ({line.diverged} of {line.n})" if line.diverged < line.n else "diverged"
    spread = f"{line.sd:.2g}" if line.sd < 99.5 else number(line.sd, digits=0)
    sd = "" if math.isnan(line.sd) else f" ± {spread}"
    diverged = f" ({line.diverged} of {line.n} diverged)" if line.diverged else ""
    return f"{number(line.error, digits)}{sd}{diverged}"


# The figure.

EDGES = (*NEAR, 2.0, 4.0, 8.0)
CAPTION = (
    "Final error by initial learning rate, relative to the best fixed learning rate of SGD, SGD "
    "with momentum and Adam on the task; mean over seeds. Methods without a learning rate have one "
    "value for all starts. Hatched: not run."
)


def drawn(table: pd.DataFrame, preset: str) -> pd.DataFrame:
    """The points in the heat map."""
    found = compared(table, preset)
    return found[found.method.isin(MAIN)]


def figure(table: pd.DataFrame, preset: str) -> plt.Figure:
    """Draw the heat map: a panel for each task with runs, a row for each method."""
    tasks = [task for task in PRESETS[preset].tasks if (table.task == task).any()]
    methods = [method for method in MAIN if (table.method == method).any()]
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    height = 1.1 + rows * (0.6 + 0.16 * len(methods))
    figure, axes = style.subplots(rows, columns, height, sharey=True, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    shades = plt.get_cmap("cividis_r")(np.linspace(0.02, 1, len(EDGES) + 1))  # light is good
    colours = [tuple(shade) for shade in shades]
    for axis, task in zip(axes.flat, tasks, strict=False):
        draw_task(axis, table[table.task == task], preset, task, methods, colours)
    axes[0, 0].set_yticks(range(len(methods)), [LABELS[method] for method in methods])
    axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    names = [f"≤ {EDGES[0]}", *(f"≤ {edge:g}" for edge in EDGES[1:]), f"> {EDGES[-1]:g}"]
    handles = [Patch(facecolor=c, label=n) for c, n in zip(colours, names, strict=True)]
    if any(bar.get_hatch() for axis in axes.flat for bar in axis.collections):
        missing = Patch(facecolor="white", edgecolor="#999999", hatch="/////", label="not run")
        handles.append(missing)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        title="times the best fixed lr's error",
    )
    seeds = counted(drawn(table, preset).n)
    style.title(figure, f"Start anywhere, preset {preset}; {seeds}")
    return figure


def draw_task(
    axis: plt.Axes,
    own: pd.DataFrame,
    preset: str,
    task: str,
    methods: Sequence[str],
    colours: Sequence[Any],
) -> None:
    setting = PRESETS[preset].tasks[task]
    places = [math.log10(start) for start in setting.starts]
    width = (places[-1] - places[0]) / (len(places) - 1)
    unknown: dict[str, Any] = {"edgecolor": "#bbbbbb", "hatch": "//////", "linewidth": 0}
    for y, method in enumerate(methods):
        mine = own[own.method == method]
        ratios = dict(zip(mine.start, mine.ratio, strict=True))
        free = mine.ratio.iloc[0] if method in FREE and len(mine) else math.nan
        for start, place in zip(setting.starts, places, strict=True):
            where = [(place - width / 2, width)], (y - 0.46, 0.92)
            if math.isnan(ratio := ratios.get(start, free)):
                axis.broken_barh(*where, facecolor="white", **unknown)
            else:
                colour = colours[int(np.searchsorted(EDGES, ratio))]
                axis.broken_barh(*where, facecolor=colour, edgecolor=colour, linewidth=0.2)
    axis.grid(False)
    ticks = range(math.ceil(places[0]), math.floor(places[-1]) + 1, 2)
    axis.set_xticks(list(ticks), [f"1e{tick}" for tick in ticks])
    axis.set_xlim(places[0] - width / 2, places[-1] + width / 2)
    axis.tick_params(axis="y", length=0)
    axis.set(title=title(preset, task), xlabel="initial learning rate")


SHORT = {
    "Adam": ("Adam", style.BLUE),
    "Adam/SGD": ("the paper's tower,\nAdam / SGD(1e-5)", style.ORANGE),
    "Auto": ("Auto", style.VERMILION),
}


def curves(own: pd.DataFrame, preset: str, task: str) -> plt.Figure:
    """Draw the error by start under Adam, the paper's tower, and Auto."""
    own = own[own.method.isin(SHORT)]
    figure, axis = plt.subplots(figsize=(0.75 * style.WIDTH, 2.3))
    for (method, (label, colour)), marker in zip(SHORT.items(), style.MARKERS, strict=False):
        mine = own[own.method == method].sort_values("start")
        axis.fill_between(mine.start, mine.least, mine.most, color=colour, alpha=0.2, linewidth=0)
        axis.plot(mine.start, mine.error, color=colour, marker=marker, label=label)
    axis.set_ylim(0.8 * own.error.min(), 1.2 * own.error.max())
    axis.set(xscale="log", yscale="log", xlabel="initial learning rate", ylabel=TASKS[task].unit)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_title(f"{title(preset, task)}; {counted(own.n)}, mean and range")
    figure.legend(loc="outside right center")
    return figure


def draw(folder: Path) -> list[Path]:
    """Draw the tables and the figures from a folder's records; returns the written files.

    Raises:
        ValueError: the records are damaged, have several settings, or an unknown method.
    """
    preset, tasks, methods = preset_of(folder), list(TASKS), list(LABELS)

    def order(run: Run) -> tuple:
        cell = run.cell
        place = tasks.index(cell.task), methods.index(cell.method)
        return (*place, cell.start or 0.0, run.seed)

    cells = functools.partial(cell_of, preset)
    found = read_runs(folder / "records", cells, lambda cell: cell.task)
    found.sort(key=order)
    runs = run_table(found)
    table = points(runs)
    timed = folder.parent / TIMES
    times = json.loads(timed.read_text())["relative"] if timed.exists() else None
    texts = {
        "runs.csv": csv_of(runs, None),
        "table.csv": csv_of(table),
        "README.md": markdown(table, runs, preset, times),
    }
    paths = write_all(folder, texts)
    made = {
        task: records.made([run for run in found if run.cell.task == task])
        for task in runs.task.unique()
    }
    write_json(folder / "runs.json", made)
    own = table[table.task == "mlp"]
    if set(SHORT) <= set(own.method):
        paths += style.save(curves(own, preset, "mlp"), folder / "mlp")
    return [*paths, folder / "runs.json", *style.save(figure(table, preset), folder / "figure")]


def prose(folder: Path) -> dict[str, str]:
    """The blocks in README and docs/start-anywhere.md."""
    preset, runs = preset_of(folder), pd.read_csv(folder / "runs.csv")
    found = points(runs)
    robust = robustness(found, preset)
    verdict_list = [f"- {verdict}" for verdict in verdicts(found, preset)]
    auto = found[(found.method == "Auto") & found.ratio.notna()]
    worst = (
        f"{own.ratio.max():.2f} times on {title(preset, task)}"
        for task in PRESETS[preset].tasks
        if not (own := auto[auto.task == task]).empty
    )
    line = (
        f"Any start: `Auto`, {auto.task.nunique()} tasks",
        "not in the paper",
        f"from all starts from {auto.start.min():g} to {auto.start.max():g}: at most "
        f"{auto.ratio.max():.2f} times the error of the best fixed lr ({counted(auto.n)})",
    )
    return {
        "line": " | ".join(line),
        "summary": (
            f"Auto starts anywhere between {auto.start.min():g} and {auto.start.max():g} "
            f"({counted(auto.n)}). Its error from the worst start, relative to the best fixed lr "
            f"of SGD, SGD with momentum and Adam: {', '.join(worst)}."
        ),
        "verdicts": "\n".join(verdict_list),
        "overview": "\n".join(overview(robust, preset, MAIN, None)),
        "parts": "\n".join(overview(ablated(robust), preset, PARTS, None)),
        "lower": lower(found, preset),
        "costs": costs(json.loads((folder.parent / TIMES).read_text())),
    }


def lower(found: pd.DataFrame, preset: str) -> str:
    """The methods whose best start has a lower error than Auto's best start."""
    best = found.loc[found.groupby(["task", "method"]).error.idxmin()]
    lines = []
    for task in PRESETS[preset].tasks:
        own = best[best.task == task].set_index("method")
        if "Auto" not in own.index:
            continue
        ratios = own.error / own.error["Auto"]
        names = [method for method in MAIN if ratios.get(method, 1.0) < 1]
        told = ", ".join(f"{LABELS[name]} ({ratios[name]:.3g} times)" for name in names)
        lines.append(f"- {title(preset, task)}: {told or 'none'}.")
    return "\n".join(lines)


def costs(times: Mapping[str, Any]) -> str:
    """The time that Auto adds to a step."""
    relative = times["relative"]
    added = ", ".join(
        f"{100 * shares['Adam']:.1f} % on {model}"
        for model, shares in times["overheads_of_auto"].items()
    )
    return (
        f"A training step of the MLP with Auto takes {relative['Auto']:.2f} times as long as with "
        f"torch's Adam (foreach); with our own Adam, {relative['Adam']:.2f} times. Compared with "
        f"our own Adam, `step()` of Auto adds to a whole training step: {added}."
    )
