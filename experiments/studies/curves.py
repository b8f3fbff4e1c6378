"""Read runs from their records, and make tables of them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.files import write_json
from experiments.records.archive import read_records, setting
from experiments.records.provenance import provenance
from experiments.studies.pages import csv_of, diverged, with_sd, write_all


@dataclass(frozen=True)
class Run:
    """A finished run: cell, seed, summary, `curves` by epoch, and `values` every few steps."""

    cell: Any
    seed: int
    summary: dict[str, Any]
    curves: pd.DataFrame
    values: pd.DataFrame

    @property
    def loss(self) -> float:
        """The training loss of the last epoch; infinite if the run diverged."""
        return self.judged("train_loss")

    @property
    def learned(self) -> dict[str, Any]:
        """The final hyperparameters of the lowest level."""
        return self.summary["hyperparameters"][0]

    def judged(self, metric: str) -> float:
        """A metric of the summary; infinite if the run diverged."""
        return math.inf if self.summary["diverged"] else self.summary[metric]

    def columns(self, name: str) -> tuple[pd.Series, pd.Series]:
        """The epochs and the values of a column of `values` or, failing that, of `curves`."""
        per_epoch = self.curves.step.iloc[-1] / self.curves.epoch.iloc[-1]
        table = self.values if name in self.values else self.curves
        return table.step / per_epoch, table[name]


def read_runs(
    records: Path,
    cell_of: Callable[[dict[str, Any]], Any],
    part_of: Callable[[Any], Any] = lambda cell: None,
) -> list[Run]:
    """Read the runs in an archive, or in all archives of a folder.

    Args:
        cell_of: returns the cell of a summary.
        part_of: returns the part of the study that a cell belongs to; a part has one setting.

    Raises:
        ValueError: a part has several settings.
    """
    runs: list[Run] = []
    settings: dict[Any, set[str]] = {}
    for files in read_records(records).values():
        summary = json.loads(files["summary.json"])
        cell = cell_of(summary)
        settings.setdefault(part_of(cell), set()).add(json.dumps(setting(summary), sort_keys=True))
        curves, values = (
            pd.read_csv(io.StringIO(files[name])) for name in ("curves.csv", "hyperparameters.csv")
        )
        runs.append(Run(cell, summary["seed"], summary, curves, values))
    for found in settings.values():
        if len(found) > 1:
            raise ValueError(
                f"{records} has runs of several settings, {' and '.join(sorted(found))}; give "
                "results= another folder for one of them"
            )
    return runs


def of(runs: Iterable[Run], cell: Any) -> list[Run]:
    return [run for run in runs if run.cell == cell]


def precision(run: Run) -> str:
    """The runs' precision for captions; empty for float32."""
    return ", in bf16" if run.summary["trainer"].get("autocast") else ""


def preset_of(folder: Path) -> str:
    """The preset of a folder of results."""
    return folder.name.partition("-")[0]


def counted(numbers: Iterable[int]) -> str:
    """Such as "n = 3", or "n = 1 to 3" if the numbers of seeds differ."""
    least, most = min(numbers, default=0), max(numbers, default=0)
    return f"n = {most}" if least == most else f"n = {least} to {most}"


def count(runs: Iterable[Run]) -> str:
    """`counted` of the seeds of each cell."""
    return counted(list(pd.Series([run.cell.label for run in runs]).value_counts()))


# Tables.


def run_table(runs: Iterable[Run], metrics: Sequence[str], learned: Sequence[str]) -> pd.DataFrame:
    """A line for each run: its cell, metrics, and learned hyperparameters."""
    return pd.DataFrame(
        {
            **asdict(run.cell),
            "seed": run.seed,
            "hash": run.summary["hash"],
            **{name: run.summary.get(name) for name in metrics},
            "diverged": run.summary["diverged"],
            **{f"learned_{name}": run.learned[name] for name in learned},
        }
        for run in runs
    )


def cell_table(
    runs: pd.DataFrame,
    cell: Sequence[str],
    metrics: Sequence[str],
    **more: tuple[str, str],
) -> pd.DataFrame:
    """A line for each cell: means and sample standard deviations over its seeds.

    Args:
        more: further columns, as `agg` of pandas takes them.
    """
    columns: dict[str, Any] = {"n": ("seed", "size")}
    for name in metrics:
        columns |= {name: (name, "mean"), f"{name}_sd": (name, "std")}
    columns |= {"diverged": ("diverged", "sum"), **more}
    columns |= {name: (name, "mean") for name in runs if str(name).startswith("learned_")}
    return runs.groupby(list(cell)).agg(**columns).reset_index()


def cell_text(cells: pd.DataFrame, cell: Any, what: str, digits: int) -> str:
    """Such as "17.20 ± 0.31", from the cell's column `what`; empty if the cell has no run."""
    own = asdict(cell)
    line = cells[(cells[list(own)] == pd.Series(own)).all(axis=1)].squeeze()
    if line.empty:
        return ""
    return with_sd(line[what], line[f"{what}_sd"], digits) + diverged(line)


def mean_of(values: Sequence[float | None]) -> str:
    """The mean; empty if a value is not a number."""
    numbers = [value for value in values if value is not None]
    return f"{sum(numbers) / len(numbers):.4g}" if numbers and len(numbers) == len(values) else ""


def compare(
    runs: Sequence[Run], pairs: Mapping[Any, tuple[Any, Any]], metric: str
) -> dict[Any, tuple[float, float]]:
    """The means of a metric over the seeds that both cells of a pair have.

    A pair is left out if both cells diverged or share no seed.
    """
    found = {}
    for key, pair in pairs.items():
        first, second = ({run.seed: run.judged(metric) for run in of(runs, cell)} for cell in pair)
        if both := sorted(first.keys() & second.keys()):
            means = [sum(part[seed] for seed in both) / len(both) for part in (first, second)]
            if math.isfinite(min(means)):
                found[key] = (means[0], means[1])
    return found


def paired(runs: Sequence[Run], *cells: Any) -> tuple[int, str]:
    """The number of seeds that all cells have, and the hashes of the runs with these seeds."""
    seeds = set.intersection(*({run.seed for run in of(runs, cell)} for cell in cells))
    found = [run for cell in cells for run in of(runs, cell) if run.seed in seeds]
    return len(seeds), " ".join(run.summary["hash"] for run in found)


def made(runs: Sequence[Run]) -> dict[str, Any]:
    """The provenance of runs, with the versions of peer optimizers, without times of steps."""
    peers = {run.summary["provenance"].get("peer") for run in runs} - {None}
    found = {**provenance([run.summary for run in runs]), "peers": sorted(peers)}
    del found["seconds_per_step"]
    return found


def write_drawn(
    folder: Path,
    runs: Sequence[Run],
    lines: pd.DataFrame,
    cells: pd.DataFrame,
    texts: Mapping[str, str],
) -> list[Path]:
    """Write the CSVs of runs and cells, the texts, and their provenance."""
    paths = write_all(
        folder, {"runs.csv": csv_of(lines, None), "table.csv": csv_of(cells), **texts}
    )
    write_json(folder / "runs.json", provenance([run.summary for run in runs]))
    return [*paths, folder / "runs.json"]
