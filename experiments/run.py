"""Command line of the experiments: one training run, or a sweep with -m.

    python -m experiments.run experiment=table1 'stack=SGD(0.01) / SGD(0.01)'
    python -m experiments.run -m stack.rule=SGD stack.height=0,1,2,3 stack.lr=1e-4,1e-3 seed=0,1,2

Hydra composes the configs. Its launchers decide where the runs of a sweep execute. All results go
to the run store.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.cli import guarded
from experiments.config.overrides import check_overrides, protect_notation
from experiments.config.processes import is_first, size
from experiments.config.resolve import check_store, resolve_all
from experiments.config.schema import CONFIGS
from experiments.execution.outcome import describe
from experiments.execution.pool import run_one
from experiments.records.loggers.catalog import find
from experiments.training.distributed import joined


def _check_shared(arguments: Sequence[str]) -> None:
    """Raise a ValueError if a sweep has several values of `store` or `workers`, or no store."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key not in ("store", "workers"):
            continue
        (override,) = OverridesParser.create().parse_overrides([argument])
        if override.is_sweep_override():
            raise ValueError(
                f"{key}={value}, but a sweep has one value of {key}; give a command for each"
            )
        if key == "store":
            check_store(str(override.value()))


def _own_folder(arguments: Sequence[str]) -> str:
    """Name a new folder under `hydra.sweep.dir` for the sweep's notes; the sweep removes it."""
    folder = "${store}/.sweep"
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "hydra.sweep.dir":
            folder = value.strip("'\"")
    return f'"{folder}/{time.time_ns():x}-{os.getpid()}"'


def main() -> int:
    from experiments.execution import sweep

    sweep.single.clear()
    sweep.folders.clear()
    sweep.here.clear()
    sweeps = bool({"-m", "--multirun"} & set(sys.argv))
    if sweeps and size() > 1:
        raise ValueError("torchrun starts one run; give -m without torchrun")
    arguments = protect_notation(sys.argv[1:])
    check_overrides(arguments)
    if sweeps:
        _check_shared(arguments)
        arguments.append(f"hydra.sweep.dir={_own_folder(arguments)}")
    sys.argv[1:] = arguments
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors and does not print them
    try:
        hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(sweep.job)()
    except KeyboardInterrupt:
        if sweep.folders:
            sweep.interrupted(sweep.folders[-1])
        raise
    except Exception as error:
        # After all runs have ended, Hydra raises the error of the first that failed.
        if not sweep.folders:
            raise
        return 0 if sweep.conclude(sweep.folders[-1], error) else 1
    if sweep.folders:
        return 0 if sweep.conclude(sweep.folders[-1]) else 1
    if not sweep.single:  # --help, --cfg and the like
        return 0
    (config,) = resolve_all(sweep.single)
    config = replace(config, progress=config.progress and is_first())
    with joined(config.device):
        outcome = run_one(config)
    if is_first():
        print(describe(outcome))
        find(config).say_where(config)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
