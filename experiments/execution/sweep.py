"""A sweep: what Hydra calls for each of its jobs, and what is known of them all afterwards.

The jobs may run anywhere, in this process's pool or on the machines of a cluster. All share the run
store. Those elsewhere than in the pool each leave a note of their outcome in the sweep's folder, in
`.sweep/` in the store. The command and each of its jobs hold that folder, so that a later sweep can
tell the folder of a sweep that was killed, and remove it.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.config.resolve import resolve_all
from experiments.config.schema import Config, to_config
from experiments.execution.outcome import Outcome, count, describe, explain, report_failures
from experiments.execution.pool import fill, use_gpu
from experiments.files import named, write_json, write_text
from experiments.records.loggers.catalog import find
from experiments.records.store import RunStore
from experiments.records.tidy import tidy_csv
from experiments.training.trainer import train

LOCK = "lock"
SEARCHED = "optimization_results.yaml"  # what Optuna's sweeper leaves in the sweep's folder

single: list[Config] = []  # the config of a command line without -m
folders: list[Path] = []  # that of the sweep which this process has started
here: list[Outcome] = []  # of its runs, where this process's pool does them


class Begin(Callback):
    """Keeps in this process where the jobs of its sweep leave their notes."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        folders.append(folder)
        with suppress(OSError):  # of a full disk the runs tell
            remove_abandoned(folder.parent)
            atexit.register(hold(folder))


def hold(folder: Path) -> Callable[[], None]:
    """Hold a sweep's folder, beside others that do; returns what lets it go."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return lambda: os.close(descriptor)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of sweeps that nobody holds any more."""
    for lock in parent.glob(f"*/{LOCK}"):
        if re.fullmatch(r"[0-9a-f]+-\d+", lock.parent.name):
            with suppress(OSError), open(lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)


def discard(folder: Path) -> None:
    """Remove a sweep's folder, and that of all sweeps where it is empty then."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def job(composed: DictConfig) -> float | None:
    """What Hydra calls, for each job of a sweep in a process of the launcher's choice.

    Returns:
        What a sweeper that searches is to make small: the training loss of the last epoch. None
        for a run that failed: of an error Hydra would print more than `conclude` wants to say.
    """
    config = to_config(composed)
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.RUN:
        single.append(config)
        return None
    folder, number = Path(hydra.sweep.dir), hydra.job.num
    release = hold(folder)
    outcome = Outcome(config, started=True)
    _leave_note(folder, number, outcome)
    try:
        (config,) = resolve_all([config])
        use_gpu(number)
        outcome = Outcome(config, train(config))
    except Exception as error:
        outcome = Outcome(config, error=explain(error))
    finally:
        _leave_note(folder, number, outcome)
        release()
    return objective(outcome) if outcome.summary else None


def launch(composed: Sequence[DictConfig]) -> list[JobReturn]:
    """Do the jobs of a sweep through the pool."""
    if not composed:  # as of range(0,0)
        return []
    overrides = [list(config.hydra.overrides.task) for config in composed]
    for config in composed:
        with open_dict(config):
            del config["hydra"]
    configs = resolve_all([to_config(config) for config in composed])
    outcomes = [Outcome(config) for config in configs]
    here.extend(outcomes)
    fill(outcomes, configs[0].workers)
    done = []
    for outcome, job in zip(outcomes, overrides, strict=True):
        found = objective(outcome) if outcome.summary else None
        done.append(JobReturn(overrides=job, status=JobStatus.COMPLETED))
        done[-1].return_value = found
    return done


def objective(outcome: Outcome) -> float:
    """The training loss of the last epoch; infinite where the run diverged."""
    assert outcome.summary is not None
    loss = outcome.summary["train_loss"]
    return math.inf if outcome.summary["diverged"] or loss is None else loss


def _leave_note(folder: Path, number: int, outcome: Outcome) -> None:
    name = outcome.summary and outcome.summary["hash"]
    note = {"config": asdict(outcome.config), "hash": name, "error": outcome.error}
    note["started"] = outcome.started
    write_json(folder / f"job-{number:06d}.json", note)


def outcomes_of(folder: Path) -> list[Outcome]:
    """What became of the jobs of a sweep, in their order, each run once."""
    found = {str(o.summary["hash"] if o.summary else k): o for k, o in enumerate(here)}
    for path in sorted(folder.glob("job-*.json")):
        note = json.loads(path.read_text())
        config = to_config(OmegaConf.merge(OmegaConf.structured(Config), note["config"]))
        if note["error"] is not None:
            found[path.name] = Outcome(config, error=note["error"])
        elif note["hash"] is None:
            found[path.name] = Outcome(config, started=note["started"])
        else:
            name = note["hash"]
            summary = RunStore(config.store).summary(name)
            found[name] = Outcome(config, summary, None if summary else "its summary is gone")
    return list(found.values())


def conclude(folder: Path, ended_by: Exception | None = None) -> bool:
    """Say what became of a sweep and write its tidy CSV; whether all went well.

    Args:
        ended_by: what ended Hydra's part of it.
    """
    outcomes = outcomes_of(folder)
    if not outcomes:  # nothing was begun
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
    logs = [path for path in folder.glob("*") if path.is_dir()]  # of a launcher that keeps them
    if failed and logs:
        told = " and ".join(map(str, logs))
        print(f"What the jobs said is in {told}, until the next sweep", file=sys.stderr)
        for note in folder.glob("job-*.json"):
            note.unlink()
    else:
        discard(folder)
    return not failed and ended_by is None and unwritten is None


def interrupted(folder: Path) -> None:
    """Say how far a sweep is that is stopped."""
    if outcomes := outcomes_of(folder):
        print(f"\n{count(outcomes)}.", file=sys.stderr)
    discard(folder)


def _write_csv(finished: Sequence[Outcome]) -> Path:
    summaries = [outcome.summary for outcome in finished if outcome.summary is not None]
    names = json.dumps([summary["hash"] for summary in summaries])
    name = hashlib.sha256(names.encode()).hexdigest()[:16]
    path = Path(finished[0].config.store, "sweeps", f"{name}.csv")
    write_text(path, tidy_csv(summaries))
    return path
