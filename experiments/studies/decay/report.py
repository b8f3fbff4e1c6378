"""Draw the table of Auto with and without a linear decay from the records of the runs."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pandas as pd

from experiments.data.catalog import label
from experiments.files import write_json
from experiments.records.provenance import provenance
from experiments.studies.curves import preset_of, read_runs
from experiments.studies.decay.runs import DECAYS, PRESETS, STARTS, cell_of, task_config
from experiments.studies.pages import csv_of, page, table, with_sd, write_all
from experiments.studies.robustness.runs import TASKS


def draw(folder: Path) -> list[Path]:
    """Draw the table from a folder's records; returns the written files."""
    preset = preset_of(folder)
    found = read_runs(
        folder / "records", functools.partial(cell_of, preset), lambda cell: cell.task
    )
    lines = [
        {
            "task": run.cell.task,
            "decay": run.cell.decay,
            "start": run.cell.start,
            "seed": run.seed,
            "hash": run.summary["hash"],
            "data": run.summary["data"],
            "error": run.summary[TASKS[run.cell.task].metric],
            "diverged": run.summary["diverged"],
        }
        for run in found
    ]
    tasks, decays = list(PRESETS[preset].tasks), list(DECAYS)
    lines.sort(
        key=lambda line: (
            tasks.index(line["task"]),
            line["start"],
            decays.index(line["decay"]),
            line["seed"],
        )
    )
    runs = pd.DataFrame(lines)
    missing = [title(preset, task) for task in tasks if not (runs.task == task).any()]
    text = page(
        f"# Auto under a linear decay, preset {preset}",
        f"Not run yet: {'; '.join(missing)}." if missing else "",
        compared(runs, preset),
        f"Data: {', '.join(label(name) for name in dict.fromkeys(runs.data))}. Mean ± standard "
        "deviation over n seeds; the ratio is that of the means.",
    )
    made = provenance([run.summary for run in found])
    del made["seconds_per_step"]
    write_json(folder / "runs.json", made)
    texts = {"runs.csv": csv_of(runs, None), "README.md": text}
    return [*write_all(folder, texts), folder / "runs.json"]


def compared(runs: pd.DataFrame, preset: str) -> list[str]:
    """The table, with a line for each task and start."""
    rows = []
    for task in PRESETS[preset].tasks:
        for start in STARTS:
            own = runs[(runs.task == task) & (runs.start == start)]
            if own.empty:
                continue
            means = own.groupby("decay").error.agg(["mean", "std"]).reindex(list(DECAYS))
            digits = 2 if TASKS[task].metric == "test_error" else 4
            ratio = means["mean"]["linear"] / means["mean"]["none"]
            counts = own.groupby("decay").size()
            rows.append(
                (
                    f"{title(preset, task)}: {TASKS[task].unit}",
                    f"{start:g}",
                    *(with_sd(row.mean, row.std, digits) for row in means.itertuples()),
                    "" if math.isnan(ratio) else f"{ratio:.3f}",
                    f"{counts.min()}",
                )
            )
    return table(("", "from lr", "Auto", "under linear decay", "ratio", "n"), "lrrrrr", rows)


def title(preset: str, task: str) -> str:
    """Such as "MLP, 5 epochs", with "(reduced)" if the preset `paper` is longer."""
    trainer = task_config(preset, task, "none").trainer
    length = f"{trainer.epochs} epoch{'s' * (trainer.epochs != 1)}"
    if trainer.steps is not None and trainer.epochs == 1:
        length = f"{trainer.steps} steps"
    whole = PRESETS[preset].tasks[task] == PRESETS["paper"].tasks[task]
    return f"{TASKS[task].label}, {length}{'' if whole else ' (reduced)'}"


def prose(folder: Path) -> dict[str, str]:
    """The block in docs/start-anywhere.md."""
    runs = pd.read_csv(folder / "runs.csv")
    return {"table": "\n".join(compared(runs, folder.name))}
