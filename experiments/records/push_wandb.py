"""Upload finished runs of the store to Weights & Biases.

    python -m experiments.records.push_wandb
    python -m experiments.records.push_wandb store=runs project=NAME results=results

It logs the finished runs with their original times, and uploads the tables and figures of the
folder `results` as artifacts. It skips runs and rows that the server already has. Without a key,
W&B writes its files to the store, and the command prints how to upload them.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.cli import asked_for_help, guarded, split
from experiments.records.loggers.logger import Row, history
from experiments.records.loggers.wandb import (
    WandbLogger,
    is_there,
    mode,
    offline,
    offline_files,
    push_results,
    say_how_to_sync,
)
from experiments.records.store import RunDirectory, RunStore
from experiments.records.tidy import read_summaries


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    store: str = "runs"
    project: str = ""
    results: str = "results"


def push(directory: RunDirectory, project: str | None) -> bool:
    """Upload a finished run; returns whether W&B now has it and did not before."""
    summary = directory.summary()
    if summary is None or is_there(directory):
        return False
    settings = json.loads((directory.path / "config.json").read_text())
    settings.pop("hash")
    made = summary["provenance"]
    logger = WandbLogger(directory, settings, made.get("made_by", {}), project)
    curves, values, hypergradients = (
        rows(directory.path / f"{name}.csv")
        for name in ("curves", "hyperparameters", "hypergradients")
    )
    times = made.get("times", [])
    logger.log(history(summary["stack"], 0, curves, values, hypergradients, times))
    logger.finish(summary)
    if is_there(directory) and not offline():  # syncing these files would upload the run twice
        for folder in offline_files(directory):
            shutil.rmtree(folder)
    return is_there(directory)


def rows(path: Path) -> list[Row]:
    """The rows of a CSV of numbers; empty if the file does not exist."""
    try:
        with open(path, newline="") as file:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


def push_all(store: RunStore, hashes: Iterable[str], project: str | None) -> int:
    """Upload all runs that W&B lacks, and return how many."""
    pushed = 0
    for name in hashes:
        with store.claim(name) as directory:
            pushed += push(directory, project)
    return pushed


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    store = RunStore(options.store)
    if not store.root.exists() and options.store != Options.store:
        raise ValueError(f"there is no store={options.store}; give the folder of the runs")
    if not Path(options.results).is_dir() and options.results != Options.results:
        raise ValueError(
            f"results={options.results} is not a folder; give the folder of tables and figures"
        )
    if mode() == "disabled":
        raise ValueError("WANDB_MODE=disabled; unset it to push")
    hashes = [summary["hash"] for summary in read_summaries(store.root)]
    pushed = push_all(store, hashes, options.project or None)
    artifacts = push_results(Path(options.results), store.root, options.project or None)
    print(f"pushed {pushed} of {len(hashes)} runs and {len(artifacts)} artifacts")
    if pushed or artifacts:
        say_how_to_sync(store.root)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
