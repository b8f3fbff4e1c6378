"""Sweeps: the function that Hydra calls for each job, and the report at the end.

Jobs run in this process's pool or on a cluster. All share the run store. A job outside the pool
writes a note of its outcome to the sweep's folder, in `.sweep/` in the store. The command and its
jobs lock that folder. A later sweep removes folders that nobody locks: their sweeps were killed.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from experiments.cli import Terminated
from experiments.config.resolve import resolve_all
from experiments.config.schema import Config, to_config
from experiments.execution import cluster
from experiments.execution.outcome import (
    Outcome,
    count,
    describe,
    explain,
    here,
    leave_note,
    note_of,
    objective,
    read_note,
    report_failures,
    returned,
)
from experiments.execution.pool import fill, use_gpu
from experiments.files import named, write_text
from experiments.records.loggers.catalog import find
from experiments.records.tidy import tidy_csv
from experiments.training.trainer import train

LOCK = "lock"
TELL = 1.0  # seconds between two looks at the notes of jobs
OWN = "hydra_plugins.hyperopt_"  # launchers that print their own progress
SEARCHED = "optimization_results.yaml"  # written to the sweep's folder by Optuna's sweeper

single: list[Config] = []  # the config of a command line without -m
folders: list[Path] = []  # the folder of the sweep that this process has started


class Begin(Callback):
    """Stores the sweep's folder in `folders` when a sweep begins, and locks it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        folders.append(folder)
        with suppress(OSError):  # the runs themselves report a full disk
            remove_abandoned(folder.parent)
            atexit.register(hold(folder))
        launcher = str(config.hydra.launcher.get("_target_", ""))
        if config.progress and not launcher.startswith(OWN):
            threading.Thread(target=_tell, args=(folder,), daemon=True).start()


def _tell(folder: Path) -> None:
    """Print the progress of another launcher's jobs from their notes, until the sweep ends."""
    began, told = time.monotonic(), ""
    while folders and folders[-1] == folder:
        with suppress(OSError, ValueError):
            outcomes = outcomes_of(folder)
            finished = sum(outcome.summary is not None for outcome in outcomes)
            failed = sum(outcome.error is not None for outcome in outcomes)
            text = f"{finished} runs are finished, {failed} failed, "
            text += f"{len(outcomes) - finished - failed} running"
            if outcomes and text != told:
                minutes, seconds = divmod(int(time.monotonic() - began), 60)
                print(f"[{minutes}:{seconds:02d}] {text}", file=sys.stderr, flush=True)
                told = text
        time.sleep(TELL)


def hold(folder: Path) -> Callable[[], None]:
    """Take a shared lock on a sweep's folder; returns the function that releases it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return lambda: os.close(descriptor)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of sweeps that nobody locks and that have no queued jobs."""
    for lock in parent.glob(f"*/{LOCK}"):
        if re.fullmatch(r"[0-9a-f]+-\d+", lock.parent.name):
            with suppress(OSError), open(lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not cluster.is_live(lock.parent):
                    shutil.rmtree(lock.parent)


def discard(folder: Path) -> None:
    """Remove a sweep's folder, and the parent folder if it is then empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def job(composed: DictConfig) -> float | None:
    """Do one job; Hydra calls this function, for a sweep in a process of the launcher's choice.

    Returns:
        The objective of a search: the training loss of the last epoch. None for a failed run,
        because Hydra prints too much for an exception; `conclude` reports the error instead.
    """
    config = to_config(composed)
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.RUN:
        single.append(config)
        return None
    folder, number = Path(hydra.sweep.dir), hydra.job.num
    release, note = hold(folder), note_of(folder, number)
    outcome = Outcome(config, started=True)
    leave_note(note, outcome)
    try:
        (config,) = resolve_all([config])
        use_gpu(number)
        outcome = Outcome(config, train(config))
    except Terminated:
        raise SystemExit(143) from None
    except Exception as error:
        outcome = Outcome(config, error=explain(error))
    finally:
        leave_note(note, outcome)
        release()
    return objective(outcome) if outcome.summary else None


def launch(composed: Sequence[DictConfig]) -> list[JobReturn]:
    """Do the jobs of a sweep in the pool."""
    if not composed:  # for example range(0,0)
        return []
    overrides = [list(config.hydra.overrides.task) for config in composed]
    for config in composed:
        with open_dict(config):
            del config["hydra"]
    configs = resolve_all([to_config(config) for config in composed])
    outcomes = [Outcome(config) for config in configs]
    here.extend(outcomes)
    fill(outcomes, configs[0].workers)
    return returned(outcomes, overrides)


def outcomes_of(folder: Path) -> list[Outcome]:
    """The outcomes of a sweep's jobs, in their order, each run once."""
    named = [(str(k), outcome) for k, outcome in enumerate(here)]
    named += [(path.name, read_note(path)) for path in sorted(folder.glob("job-*.json"))]
    found = {str(o.summary["hash"]) if o.summary else name: o for name, o in named}
    return list(found.values())


def conclude(folder: Path, ended_by: Exception | None = None) -> bool:
    """Print the outcome of a sweep and write its tidy CSV; returns whether all went well.

    Args:
        ended_by: the exception that ended Hydra's part.
    """
    outcomes = outcomes_of(folder)
    folders.clear()  # ends `_tell`
    if not outcomes:  # no run was started
        if isinstance(ended_by, OSError) and not folder.exists():
            raise named(ended_by, folder)
        discard(folder)
        raise ended_by or ValueError("the sweep has no runs")
    finished = [outcome for outcome in outcomes if outcome.summary is not None]
    for outcome in finished:
        print(describe(outcome))
    unwritten: OSError | None = None
    if finished:
        try:
            print(f"The tidy CSV of {len(finished)} runs is {_write_csv(finished)}")
        except OSError as error:
            unwritten = error
        if (folder / SEARCHED).exists():
            best = min(finished, key=objective)
            print(f"The smallest training loss, {objective(best):.4f}, is that of {describe(best)}")
    find(outcomes[0].config).say_where(outcomes[0].config)
    sys.stdout.flush()
    failed = report_failures(outcomes)
    if ended_by is not None and not failed:
        print(f"error: {ended_by}", file=sys.stderr)
    if unwritten is not None:
        print(f"error: {unwritten}", file=sys.stderr)
    logs = [path for path in folder.glob("*") if path.is_dir()]  # some launchers write them
    if failed and logs:
        told = " and ".join(map(str, logs))
        print(f"The logs of the jobs are in {told}, until the next sweep", file=sys.stderr)
        for note in folder.glob("job-*.json"):
            note.unlink()
    else:
        discard(folder)
    return not failed and ended_by is None and unwritten is None


def interrupted(folder: Path) -> None:
    """Print the counts of an interrupted sweep, and remove its folder if no jobs are queued."""
    if outcomes := outcomes_of(folder):
        print(f"\n{count(outcomes)}.", file=sys.stderr)
    if not (folder / cluster.JOBS).exists():
        discard(folder)


def _write_csv(finished: Sequence[Outcome]) -> Path:
    summaries = [outcome.summary for outcome in finished if outcome.summary is not None]
    names = json.dumps([summary["hash"] for summary in summaries])
    name = hashlib.sha256(names.encode()).hexdigest()[:16]
    path = Path(finished[0].config.store, "sweeps", f"{name}.csv")
    write_text(path, tidy_csv(summaries))
    return path
