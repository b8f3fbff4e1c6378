"""A sweep: what Hydra calls for each of its jobs, and what is known of them all afterwards.

The jobs may run anywhere, in this process's pool or on the machines of a cluster. All share the run
store, and each leaves a note of its outcome in the sweep's folder there, `.sweep/` in the store.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
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
from experiments.execution.outcome import Outcome, describe, explain, report_failures
from experiments.execution.pool import run_all, use_gpu
from experiments.files import named, write_json, write_text
from experiments.records.loggers.catalog import find
from experiments.records.store import RunStore
from experiments.records.tidy import tidy_csv
from experiments.training.trainer import train

SEARCHED = "optimization_results.yaml"  # what Optuna's sweeper leaves in the sweep's folder

single: list[Config] = []  # the config of a command line without -m
folders: list[Path] = []  # that of the sweep which this process has started


class Begin(Callback):
    """Keeps in this process where the jobs of its sweep leave their notes."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folders.append(Path(config.hydra.sweep.dir))


def job(composed: DictConfig) -> float | None:
    """What Hydra calls, for each job of a sweep in a process of the launcher's choice.

    Returns:
        What a sweeper that searches is to make small: the training loss of the last epoch.
    """
    config = to_config(composed)
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.RUN:
        single.append(config)
        return None
    folder, number = Path(hydra.sweep.dir), hydra.job.num
    outcome = Outcome(config, error="it did not come to its end")
    _leave_note(folder, number, outcome)
    try:
        (config,) = resolve_all([config])
        use_gpu(number)
        outcome = Outcome(config, train(config))
    except Exception as error:
        outcome = Outcome(config, error=explain(error))
        raise
    finally:
        _leave_note(folder, number, outcome)
    return objective(outcome)


def launch(composed: Sequence[DictConfig], first: int) -> list[JobReturn]:
    """Do the jobs of a sweep through the pool. `first` is the number of the first of them."""
    if not composed:  # as of range(0,0)
        return []
    folder = Path(composed[0].hydra.sweep.dir)
    overrides = [list(config.hydra.overrides.task) for config in composed]
    for config in composed:
        with open_dict(config):
            del config["hydra"]
    configs = resolve_all([to_config(config) for config in composed])
    outcomes = run_all(configs, configs[0].workers)
    done = []
    for number, (outcome, job) in enumerate(zip(outcomes, overrides, strict=True), start=first):
        _leave_note(folder, number, outcome)
        done.append(JobReturn(overrides=job, status=JobStatus.COMPLETED))
        if outcome.summary is None:
            done[-1].status = JobStatus.FAILED
            done[-1].return_value = RuntimeError(outcome.error)
        else:
            done[-1].return_value = objective(outcome)
    return done


def objective(outcome: Outcome) -> float:
    """The training loss of the last epoch; infinite where the run diverged."""
    assert outcome.summary is not None
    loss = outcome.summary["train_loss"]
    return math.inf if outcome.summary["diverged"] or loss is None else loss


def _leave_note(folder: Path, number: int, outcome: Outcome) -> None:
    name = outcome.summary and outcome.summary["hash"]
    note = {"config": asdict(outcome.config), "hash": name, "error": outcome.error}
    write_json(folder / f"job-{number:06d}.json", note)


def outcomes_of(folder: Path) -> list[Outcome]:
    """What became of the jobs of a sweep, in their order, each run once."""
    found: dict[str, Outcome] = {}
    for path in sorted(folder.glob("job-*.json")):
        note = json.loads(path.read_text())
        config = to_config(OmegaConf.merge(OmegaConf.structured(Config), note["config"]))
        if note["error"] is None:
            name = note["hash"]
            summary = RunStore(config.store).summary(name)
            found[name] = Outcome(config, summary, None if summary else "its summary is gone")
        else:
            found[path.name] = Outcome(config, error=note["error"])
    return list(found.values())


def conclude(folder: Path, ended_by: Exception | None = None) -> bool:
    """Say what became of a sweep and write its tidy CSV; whether all went well.

    Args:
        ended_by: what ended Hydra's part of it.
    """
    outcomes = outcomes_of(folder)
    finished = [outcome for outcome in outcomes if outcome.summary is not None]
    if not outcomes:  # nothing was begun
        if isinstance(ended_by, OSError) and not folder.exists():
            raise named(ended_by, folder)
        shutil.rmtree(folder, ignore_errors=True)
        raise ended_by or ValueError("the sweep has no runs")
    for outcome in finished:
        print(describe(outcome))
    if finished:
        summaries = [outcome.summary for outcome in finished if outcome.summary is not None]
        names = json.dumps([summary["hash"] for summary in summaries])
        name = hashlib.sha256(names.encode()).hexdigest()[:16]
        path = Path(finished[0].config.store, "sweeps", f"{name}.csv")
        write_text(path, tidy_csv(summaries))
        print(f"The tidy CSV of {len(finished)} runs is {path}")
        if (folder / SEARCHED).exists():
            best = min(finished, key=objective)
            print(f"The smallest training loss, {objective(best):.4f}, is that of {describe(best)}")
    find(outcomes[0].config).say_where(outcomes[0].config)
    failed = report_failures(outcomes)
    if ended_by is not None and not failed:
        print(f"error: {ended_by}", file=sys.stderr)
    logs = [path for path in folder.iterdir() if path.is_dir()]  # of a launcher that keeps them
    if failed and logs:
        print(f"What the jobs said is in {' and '.join(map(str, logs))}", file=sys.stderr)
        for note in folder.glob("job-*.json"):
            note.unlink()
    else:
        shutil.rmtree(folder)
    return not failed and ended_by is None
