"""The paper's Table 1: 32 rows, three seeds each.

    python -m experiments.table1
    python -m experiments.table1 preset=quick workers=4 data.root=data store=runs results=results
    python -m experiments.table1 start=own

`start=own` does, besides, the relearned rows from what *our* towers learned. What comes out is
`table1_runs.csv` (and `table1_own_runs.csv`), a line for each run, from which `scripts.tables`
draws the tables and the figure. Runs that are finished are not done again.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from hyperopt import parse

from .command import ROOT, asked_for_help, choose, do_and_record, draw, publish, split
from .config import CONFIGS, Config, compose
from .run import guarded, resolve_all

REFERENCE = ROOT / "results" / "reference" / "table1_mnist.csv"

Row = dict[str, str]  # a line of the published table

# What may be set for all runs at once. It leaves the paper's setting alone, but for the data, and
# tables made from other data go to a folder of their own.
SETTABLE = (
    "data",
    "data.root",
    "data.download",
    "device",
    "logger",
    "progress",
    "store",
    "trainer.compile",
    "trainer.compile_model",
    "workers",
)


@dataclass(frozen=True)
class Preset:
    """How much of the paper's setting is done.

    Attributes:
        seeds: those of each row.
        epochs: of each run; None leaves them as in the paper.
    """

    seeds: tuple[int, ...]
    epochs: int | None = None


PRESETS = {"paper": Preset(seeds=(0, 1, 2)), "quick": Preset(seeds=(0,), epochs=2)}


@dataclass(frozen=True)
class Options:
    """What the command line sets beside the keys of the runs' config."""

    preset: str = "paper"
    start: str = "paper"  # or own: what the relearned rows start from
    results: str = "results"


LEARNED = ("lr", "beta1", "beta2", "gamma")
COLUMNS = (
    *("block", "row", "kind", "stack", "data", "epochs", "seed", "hash"),
    *("test_error", "train_loss", "diverged", *(f"learned_{name}" for name in LEARNED)),
)


def reference() -> list[Row]:
    """The rows of the published table, in its order."""
    with open(REFERENCE, newline="") as file:
        return list(csv.DictReader(file))


def row_configs(overrides: Sequence[str] = ()) -> dict[str, Config]:
    """The config of each row, by the row's name in the published table."""
    names = sorted(path.stem for path in (CONFIGS / "experiment").glob("table1_*.yaml"))
    configs = [compose([f"experiment={name}", *overrides]) for name in names]
    return {config.row or "": config for config in configs}


def table_runs(configs: dict[str, Config], preset: Preset) -> list[tuple[Row, Config]]:
    """The runs of the table, each with its row."""
    return [
        (row, replace(_shortened(configs[row["stack"]], preset), seed=seed))
        for row in reference()
        for seed in preset.seeds
    ]


def own_runs(
    runs: Sequence[tuple[Row, Config]], summaries: Sequence[dict[str, Any]], preset: Preset
) -> list[tuple[Row, Config]]:
    """The relearned rows, started at the mean of what our towers learned; 4 digits, as the paper.

    A row is left out, with a line that says so, where no plain optimizer can start at that mean.
    """
    configs = {row["stack"]: config for row, config in runs}
    towers: dict[str, list[dict[str, Any]]] = {}
    for (row, _), summary in zip(runs, summaries, strict=True):
        towers.setdefault(row["stack"], []).append(summary)
    own = []
    rows = reference()
    for tower, row in itertools.pairwise(rows):
        if row["kind"] != "relearned":
            continue
        learned = [_learned(summary) for summary in towers[tower["stack"]]]
        try:
            means = {name: fmean(values[name] for values in learned) for name in learned[0]}
            start = {name: float(f"{mean:.4g}") for name, mean in means.items()}
            rule = parse(configs[row["stack"]].stack.notation or "").levels[0].with_values(start)
        except (TypeError, ValueError) as error:
            print(f"{tower['stack']} is left out of the second table: {error}", file=sys.stderr)
            continue
        for seed in preset.seeds:
            config = configs[row["stack"]]
            stack = replace(config.stack, notation=str(parse(rule)))
            own.append((row, replace(config, stack=stack, seed=seed, row=str(rule))))
    return own


def run_lines(
    runs: Sequence[tuple[Row, Config]], summaries: Sequence[dict[str, Any]]
) -> list[list[Any]]:
    """The tidy CSV: what was learned is the lowest level's tuned hyperparameters at the end."""
    lines: list[list[Any]] = [list(COLUMNS)]
    for (row, config), summary in zip(runs, summaries, strict=True):
        learned = _learned(summary)
        lines.append(
            [
                *(row["block"], row["stack"], row["kind"], summary["stack"], summary["data"]),
                *(config.trainer.epochs, config.seed, summary["hash"], summary["test_error"]),
                *(summary["train_loss"], summary["diverged"]),
                *(learned.get(name) for name in LEARNED),
            ]
        )
    return lines


def _learned(summary: dict[str, Any]) -> dict[str, float]:
    return {name: summary["hyperparameters"][0][name] for name in summary["tuned"]}


def _shortened(config: Config, preset: Preset) -> Config:
    return replace(
        config, trainer=replace(config.trainer, epochs=preset.epochs or config.trainer.epochs)
    )


def _do(runs: Sequence[tuple[Row, Config]], path: Path) -> list[dict[str, Any]] | None:
    """Do the runs and write their CSV and its provenance; None if some failed."""
    configs = [config for _, config in runs]
    return do_and_record(configs, path, lambda summaries: run_lines(runs, summaries))


def _arguments(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The command's options, and the overrides of its runs."""
    options, overrides = split(arguments, Options, SETTABLE)
    choose("preset", options.preset, list(PRESETS))
    choose("start", options.start, ("paper", "own"))
    return options, overrides


def main() -> int:
    if asked_for_help(__doc__, Options, SETTABLE):
        return 0
    options, overrides = _arguments(sys.argv[1:])
    preset = PRESETS[options.preset]
    configs = row_configs([*overrides, f"preset={options.preset}"])
    resolved = dict(zip(configs, resolve_all(list(configs.values())), strict=True))
    found = resolved[reference()[0]["stack"]].data.name
    # Only the paper's setting on the full MNIST may replace the results that are committed.
    parts = [found] * (found != "mnist") + [options.preset] * (options.preset != "paper")
    results = Path(options.results, "-".join(parts))

    runs = table_runs(resolved, preset)
    summaries = _do(runs, results / "table1_runs")
    if summaries is None:
        return 1
    draw(results)
    publish(results, runs[0][1])
    if options.start == "own":
        own = own_runs(runs, summaries, preset)
        if _do(own, results / "table1_own_runs") is None:
            return 1
        draw(results)
        publish(results, runs[0][1])
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
