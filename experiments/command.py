"""What the commands of the tables and figures share: options, doing many runs, provenance."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from . import book
from .config import Config, identity, run_hash
from .data import label
from .logger import push_results, say_how_to_sync
from .pool import run_all
from .records import export_runs, import_runs, read_records, setting
from .run import report_failures
from .store import RunStore, csv_text, make_folder, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]

Options = TypeVar("Options")

# What the commands of long experiments let one set for all runs; `check_setting` sees to it that it
# leaves the setting of their records alone.
LONG_RUNS = (
    "data.root",
    "data.download",
    "device",
    "logger",
    "progress",
    "store",
    "trainer.autocast",
    "trainer.compile",
    "trainer.compile_model",
    "trainer.threads",
    "workers",
)


def asked_for_help(doc: str | None, kind: type, settable: Sequence[str] = ()) -> bool:
    """Whether the command line asks for help, which is printed then: `doc` and what may be set.

    Args:
        kind, settable: as `split` has them.
    """
    if not set(sys.argv[1:]) & {"-h", "--help"}:
        return False
    print(doc)
    defaults = vars(kind()).items()
    options = (f"{key}={value if value.isprintable() else repr(value)}" for key, value in defaults)
    told = {"Options, with their defaults": " ".join(options)}
    if settable:
        told["Keys of its runs, as in python -m experiments.run --help"] = ", ".join(settable)
    for head, text in told.items():
        print(f"{head}:")
        print(textwrap.indent(textwrap.fill(text, 90, break_on_hyphens=False), "    "))
    return True


def split(
    arguments: Sequence[str], kind: type[Options], settable: Sequence[str]
) -> tuple[Options, list[str]]:
    """Split a command line into the command's own options and the overrides of its runs.

    Args:
        kind: a dataclass of strings, the options with their defaults.
        settable: the keys of the runs' config that may be set.

    Raises:
        ValueError: anything else, in one line.
    """
    own, overrides = {}, []
    known = [*(f.name for f in fields(kind)), *settable]  # type: ignore[arg-type]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{argument!r} is not an option of this command, as key=value; {hint}")
        if key in settable:
            overrides.append(argument)
        else:
            own[key] = value
    return kind(**own), overrides


def number(options: Any, name: str, kind: type = int) -> Any:
    """The option of a name, as an int or a float.

    Raises:
        ValueError: it is no such number.
    """
    text = getattr(options, name)
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}={text!r} is not {what}") from None


def choose(name: str, value: str, known: Sequence[str]) -> str:
    """`value`, which must be one of those that are known.

    Raises:
        ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    return value


def seed_list(text: str) -> list[int]:
    """The seeds in a text as "0,1,2"."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds={text!r} is no list of numbers as in 0,1,2") from None
    if len({*seeds}) < len(seeds):
        raise ValueError(f"seeds={text!r} has a seed twice, which would be counted as two runs")
    return seeds


@dataclass(frozen=True)
class LongOptions:
    """What the commands of long experiments read beside the keys of their runs' config."""

    preset: str = "cpu"
    seeds: str = "0,1,2"
    start: str = "scratch"  # or records: where finished runs are taken from beside the store
    results: str = "results"


Long = TypeVar("Long", bound=LongOptions)


def long_arguments(
    arguments: Sequence[str],
    presets: Mapping[str, Sequence[str]],
    kind: type[Long],
) -> tuple[Long, list[int], list[str]]:
    """The options of a long experiment's command, its seeds, and the overrides of its runs.

    Args:
        presets: the overrides that each of them stands for.
        kind: what the options are.

    Raises:
        ValueError: an option or a value that is not known, in one line.
    """
    options, overrides = split(arguments, kind, LONG_RUNS)
    choose("preset", options.preset, list(presets))
    choose("start", options.start, ("scratch", "records"))
    named = f"preset={options.preset}"
    return options, seed_list(options.seeds), [*presets[options.preset], named, *overrides]


PartOf = Callable[[dict[str, Any]], Any]


def one_part(run: dict[str, Any]) -> None:
    """For an experiment that has one part."""


def do_all(configs: Sequence[Config]) -> list[dict[str, Any]] | None:
    """The summaries of all runs, done where they are not; None if some failed, which are listed."""
    outcomes = run_all(configs, configs[0].workers)
    if report_failures(outcomes):
        return None
    return [outcome.summary for outcome in outcomes if outcome.summary is not None]


def check_setting(configs: Sequence[Config], records: Path, part_of: PartOf = one_part) -> None:
    """Raise a ValueError for runs of another setting than those of the same part in a file.

    Args:
        part_of: as `do_in_waves` has it.
    """

    def told(values: dict[str, Any], keys: Sequence[str]) -> str:
        return " and ".join(
            f"{key}={json.dumps(values[key])}".replace('"', "") if key in values else f"no {key}"
            for key in keys
        )

    known: dict[Any, dict[str, Any]] = {}
    for files in read_records(records).values():
        run = json.loads(files["config.json"])
        known.setdefault(part_of(run), setting(run))
    for run in map(identity, configs):
        new = setting(run)
        old = known.get(part_of(run), new)
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if differing:
            raise ValueError(
                f"{records} has runs with {told(old, differing)}, and these would have "
                f"{told(new, differing)}; give the same, or another folder for them as results="
            )


def do_in_waves(
    waves: Sequence[Sequence[Config]], records: Path, start: str, part_of: PartOf = one_part
) -> bool:
    """Do all runs, one wave after the other; whether none failed. The failed ones are listed.

    Args:
        records: the file that has the records of all finished runs, after each wave and also where
            one is stopped.
        start: "records" where those of that file need not be done again.
        part_of: the part of the experiment that a run of some identity belongs to; each has one
            setting.

    Raises:
        OSError: the file's folder cannot be written to.
        ValueError: the file has runs of another setting.
    """
    make_folder(records.parent)
    check_setting([config for wave in waves for config in wave], records, part_of)
    store = RunStore(waves[0][0].store)
    if start == "records":
        if not records.exists():
            print(f"there is no {records} yet; all runs are to be done", file=sys.stderr)
        import_runs(records, store)
    done = True
    for configs in waves:
        names = [run_hash(config) for config in configs]
        try:
            done &= do_all(configs) is not None
        finally:
            export_runs(store, names, records)
    return done


def do_and_record(
    configs: Sequence[Config],
    path: Path,
    table: Callable[[Sequence[dict[str, Any]]], Sequence[Sequence[Any]]],
) -> list[dict[str, Any]] | None:
    """Do all runs and write their CSV and its provenance; None if some failed.

    Args:
        path: of both files, without the suffix.
        table: makes the rows of the CSV from the summaries.

    Raises:
        OSError: their folder cannot be written to.
    """
    make_folder(path.parent)
    began = time.monotonic()
    summaries = do_all(configs)
    if summaries is not None:
        made, where = provenance(summaries), path.with_suffix(".json")
        known = json.loads(where.read_text()) if where.exists() else {}
        # The time is that of the command that did the runs, not of one that found them done.
        last = known.pop("wall_seconds_of_last_command", None)
        made["wall_seconds_of_last_command"] = last if known == made else time.monotonic() - began
        write_text(path.with_suffix(".csv"), csv_text(table(summaries)))
        write_json(where, made)
    return summaries


def provenance(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where the numbers of a table come from; differing values of the runs are all listed."""

    def values(key: str) -> list[Any]:
        mades = [summary["provenance"] for summary in summaries]
        mades += [earlier for made in mades for earlier in made.get("earlier", [])]
        return sorted({made[key] for made in mades if key in made}, key=str)

    keys = ("commit", "dirty", "python", "torch", "numpy", "platform", "device", "compiled")
    steps: dict[str, list[float]] = {}
    for summary in summaries:
        steps.setdefault(summary["stack"], []).append(summary["provenance"]["seconds_per_step"])
    return {
        "data": ", ".join(sorted({label(summary["data"]) for summary in summaries})),
        "data_sha256": ", ".join(sorted({summary["data_sha256"] for summary in summaries})),
        "runs": len(summaries),
        "steps": sum(summary["steps"] for summary in summaries),
        **{key: values(key) for key in keys},
        "runs_resumed": sum(summary["provenance"]["resumed"] > 0 for summary in summaries),
        "training_seconds": sum(summary["provenance"]["seconds"] for summary in summaries),
        "seconds_per_step": {stack: fmean(seconds) for stack, seconds in steps.items()},
    }


def results_of(folder: str, configs: Sequence[Config]) -> Path:
    """Where results go: those of other data than asked for may not replace what is committed."""
    asked_for = {"mnist", "cifar10", book.NAME}
    return Path(folder, *sorted({config.data.name for config in configs} - asked_for))


def draw(results: Path) -> None:
    """Draw what there is to draw in a folder of results.

    Raises:
        ValueError: something could not be drawn, of which the drawing has said why.
    """
    # As a command: drawing is above the experiments, which do not import it.
    command = [sys.executable, "-m", "scripts.tables", f"results={results.resolve()}"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError(
            f"not all of results={results} could be drawn; the runs are kept, and when what is "
            f"said above is mended, python -m scripts.tables results={results} draws it"
        )


def publish(results: Path, config: Config) -> None:
    """Bring what was drawn to where the runs are shown; `config` is that of any of them."""
    if config.logger.name == "wandb":
        push_results(results, Path(config.store), config.logger.project)
        say_how_to_sync(config.store)
