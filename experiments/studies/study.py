"""A study: one table or figure, from its runs to its page.

A study is a folder beside this file. Its `runs.py` defines the runs and a `STUDY`. Its `report.py`
has `draw(folder)`, which draws the tables and figures from a folder of results. The results go to
`results/STUDY/PRESET/`:

    runs.csv, runs.json     a line for each run, and the provenance
    records/*.jsonl.gz      whole runs, for studies that keep them; each command adds a file
    README.md               the page, with the tables and figures beside it
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.cli import asked_for_help, choose, choose_all, seed_list, split
from experiments.config.identity import identity, run_hash
from experiments.config.resolve import resolve_all
from experiments.config.schema import Config, StackConfig
from experiments.data.catalog import find
from experiments.execution.outcome import report_failures
from experiments.execution.pool import run_all
from experiments.files import csv_text, make_folder, write_json, write_text
from experiments.records.archive import (
    archive_name,
    export_runs,
    import_runs,
    read_records,
    setting,
)
from experiments.records.loggers.catalog import find as find_logger
from experiments.records.provenance import provenance
from experiments.records.store import RunStore

Summary = dict[str, Any]

# Config keys that a study's command may set: they do not change the study's setting.
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
# With records, two more keys are safe: `check_setting` compares them with the recorded runs.
SETTABLE_WITH_RECORDS = (*SETTABLE, "precision", "trainer.threads")


@dataclass(frozen=True)
class Preset:
    """The size of a study.

    Attributes:
        overrides: of the runs' config.
        seeds: of each cell.
    """

    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Nothing:
    """The options of a command without options."""


@dataclass(frozen=True)
class Options:
    """The options of a study's command; empty means the preset's value.

    Attributes:
        start: "records" also takes finished runs from the records in the results.
    """

    preset: str = ""
    seeds: str = ""
    start: str = "scratch"
    results: str = "results"


@dataclass(frozen=True)
class CellOptions(Options):
    """Options of a study with several kinds of cells; empty means all."""

    kinds: str = ""


@dataclass(frozen=True)
class MethodOptions(Options):
    """Options of a study of methods on several tasks; empty means all."""

    tasks: str = ""
    methods: str = ""
    lrs: str = ""  # initial lrs


@dataclass
class Request:
    """A parsed command line of a study.

    Attributes:
        name: of the preset.
        overrides: of the runs' config, the preset's first.
        folder: of the results; set when the first part begins.
        archive: the name of the archive that this command adds to the records.
    """

    options: Any
    name: str
    preset: Any
    seeds: Sequence[int]
    overrides: tuple[str, ...]
    folder: Path = Path()
    archive: str = field(default_factory=archive_name)


@dataclass
class Part:
    """Runs that can be done in parallel, in batches; the first batches are most informative.

    Attributes:
        batches: runs as pairs of a cell (of the table or figure) and its config.
        name: of the CSV of the runs.
        configs, summaries: the resolved configs, and the results once the part is done.
    """

    batches: Sequence[Sequence[tuple[Any, Config]]]
    name: str = "runs"
    configs: list[Config] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)

    @property
    def cells(self) -> list[Any]:
        return [cell for batch in self.batches for cell, _ in batch]

    def resolve(self) -> list[list[Config]]:
        """Resolve the configs of all batches; returns them by batch."""
        self.configs = resolve_all([config for batch in self.batches for _, config in batch])
        resolved = iter(self.configs)
        return [[next(resolved) for _ in batch] for batch in self.batches]


def each_seed(
    request: Request, base: Config, cells: Iterable[tuple[Any, str, str]]
) -> list[tuple[Any, Config]]:
    """The runs of cells that differ only in their stack, each with all requested seeds.

    Args:
        base: the shared config, without stack, seed and row.
        cells: each with its stack and the name of its row.
    """
    return [
        (cell, replace(base, stack=StackConfig(stack), seed=seed, row=row))
        for cell, stack, row in cells
        for seed in request.seeds
    ]


def chosen(cells: Sequence[Any], request: Request, known: Sequence[str]) -> list[Any]:
    """The cells of the requested kinds.

    Raises:
        ValueError: an unknown kind.
    """
    kinds = choose_all("kinds", request.options.kinds, known)
    return [cell for cell in cells if cell.kind in kinds]


class Reported:
    """Base class: a study with a module `report` beside its runs."""

    name: str

    @property
    def report(self) -> Any:
        """The module with `draw(folder)` and, optionally, `prose`, `captions` and `claims`."""
        return import_module(f"experiments.studies.{self.name}.report")

    def draw(self, folder: Path) -> list[Path]:
        """Draw a folder of results; returns the written files.

        Raises:
            ValueError: the results cannot be drawn.
        """
        try:
            return self.report.draw(folder)
        except ValueError as error:
            raise ValueError(
                f"{error}; the runs are kept: fix this, then draw them with make tables"
            ) from None

    def prose(self, folder: Path) -> dict[str, str]:
        """The blocks of README and docs about a folder of results, by key."""
        return getattr(self.report, "prose", lambda folder: {})(folder)

    def captions(self, folder: Path) -> dict[str, str]:
        """The captions of the figures in a folder of results, by figure name."""
        return getattr(self.report, "captions", lambda folder: {})(folder)

    def claims(self, folder: Path) -> Iterator[Any]:
        """The paper's claims beside the results of a folder."""
        yield from getattr(self.report, "claims", lambda folder: ())(folder)


@dataclass(frozen=True)
class Study(Reported):
    """One table or figure.

    Attributes:
        name: of its folder here and in results/.
        presets: by name; the first is the default.
        parts: yields the requested runs. A later part may use the results of an earlier one.
        doc: the help of its command.
        line: returns the line of a run in the CSV, from its cell and its summary. None for a
            study that keeps records of its runs; its report makes the CSV from the records.
        part_of: for a study with records, returns the part of the study that a run belongs to,
            from the preset's name and the run's identity or summary. A part has one setting.
        options: the dataclass of the command's options.
        starts: the values of the option `start`.
        place: the position of its figures on the page of all results.
    """

    name: str
    presets: Mapping[str, Any]
    parts: Callable[[Request], Iterator[Part]]
    doc: str | None = None
    line: Callable[[Any, Summary], dict[str, Any]] | None = None
    part_of: Callable[[str, Summary], Any] = lambda preset, run: None
    options: type[Options] = Options
    starts: Sequence[str] = ("scratch",)
    place: int = 100

    @property
    def settable(self) -> Sequence[str]:
        """The config keys that the command may set."""
        return SETTABLE if self.line else SETTABLE_WITH_RECORDS

    def request(self, arguments: Sequence[str]) -> Request:
        """Parse a command line.

        Raises:
            ValueError: an unknown option or value, in one line.
        """
        options, overrides = split(arguments, self.options, self.settable)
        name = options.preset or next(iter(self.presets))
        preset = self.presets[choose("preset", name, list(self.presets))]
        choose("start", options.start, self.starts)
        seeds = seed_list(options.seeds) if options.seeds else preset.seeds
        every = (*preset.overrides, f"preset={name}", *overrides)
        return Request(options, name, preset, seeds, every)

    def main(self, arguments: Sequence[str]) -> int:
        """The study's command: do the missing runs, and draw all of the study."""
        if asked_for_help(self.doc, self.options, self.settable, arguments):
            return 0
        request, good = self.request(arguments), True
        self.say_what_moved(request)
        for part in self.parts(request):
            batches = part.resolve()
            request.folder = self.folder(request, part.configs)
            if self.line is None:
                archive = request.folder / "records" / request.archive
                part_of = functools.partial(self.part_of, request.name)
                good = train_and_archive(batches, archive, request.options.start, part_of)
            else:
                good = train_and_list(part, request.folder / f"{part.name}.csv", self.line)
            if not good:
                break
        if good or self.line is None:
            self.draw(request.folder)
            config = part.configs[0]
            find_logger(config).publish(Path(request.options.results), config)
        return 0 if good else 1

    def say_what_moved(self, request: Request) -> None:
        """Print a hint on standard error if records have the layout of an earlier version."""
        results = Path(request.options.results)
        old = results / f"{self.name}_{request.name}.jsonl.gz"
        new = results / self.name / request.name
        if old.exists():
            print(
                f"{old} has an earlier layout; to use it: "
                f"mkdir -p {new}/records && mv {old} {new}/records/",
                file=sys.stderr,
            )

    def folder(self, request: Request, configs: Sequence[Config]) -> Path:
        """The folder of the results; runs on other data sets get a folder of their own."""
        names = {config.data.name for config in configs}
        others = sorted(name for name in names if not find(name).is_whole(name))
        return Path(request.options.results, self.name, "-".join([request.name, *others]))

    def folders(self, results: Path) -> list[Path]:
        """The folders of `results` with runs of this study, one for each preset."""
        kept = "runs.csv" if self.line else "records"
        return sorted(path.parent for path in (results / self.name).glob(f"*/{kept}"))


@dataclass(frozen=True)
class Measurement(Reported):
    """A study without runs in the store: its command measures and draws.

    Attributes:
        name, doc, place: as in `Study`.
        main: its command.
        kept: the file in its folder from which its report can be drawn again, if any.
        presets: none.
    """

    name: str
    main: Callable[[Sequence[str]], int]
    doc: str | None = None
    kept: str | None = None
    presets: Mapping[str, Any] = field(default_factory=dict)
    place: int = 100

    def folders(self, results: Path) -> list[Path]:
        """Its folder, if its report can be drawn again from there."""
        return [path.parent for path in (results / self.name).glob(self.kept or "no file")]


def do_all(configs: Sequence[Config]) -> list[Summary] | None:
    """Do all runs; returns their summaries, or None after printing the failures."""
    outcomes = run_all(configs, configs[0].workers)
    if report_failures(outcomes):
        return None
    return [outcome.summary for outcome in outcomes if outcome.summary is not None]


def check_setting(
    configs: Sequence[Config], records: Path, part_of: Callable[[Summary], Any]
) -> None:
    """Raise a ValueError if runs differ in their setting from recorded runs of the same part."""

    def told(values: dict[str, Any], keys: Sequence[str]) -> str:
        return " and ".join(
            f"{key}={json.dumps(values[key])}".replace('"', "") if key in values else f"no {key}"
            for key in keys
        )

    recorded = (json.loads(files["config.json"]) for files in read_records(records).values())
    known = {part_of(run): setting(run) for run in recorded}
    for run in map(identity, configs):
        new = setting(run)
        old = known.get(part_of(run), new)
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if differing:
            raise ValueError(
                f"{records} has runs with {told(old, differing)}, but the new runs would have "
                f"{told(new, differing)}; give the same, or another folder as results="
            )


def train_and_archive(
    batches: Sequence[Sequence[Config]],
    archive: Path,
    start: str,
    part_of: Callable[[Summary], Any] = lambda run: None,
) -> bool:
    """Do all runs, one batch after the other; print the failures; return whether none failed.

    New runs go to a new archive in the folder of records, after each batch and on an interrupt.
    Existing archives stay unchanged.

    Args:
        archive: the new archive; a second call with the same one adds to it.
        start: "records" takes finished runs from the folder of records.

    Raises:
        OSError: the folder is not writable.
        ValueError: the folder has runs of another setting.
    """
    records = archive.parent
    make_folder(records)
    check_setting([config for batch in batches for config in batch], records, part_of)
    store, known = RunStore(batches[0][0].store), set(read_records(records))
    if start == "records":
        if not known:
            print(f"there are no runs in {records} yet; all runs will be done", file=sys.stderr)
        import_runs(records, store)
    done, names = True, []
    for configs in batches:
        names += [name for name in map(run_hash, configs) if name not in known]
        try:
            done &= do_all(configs) is not None
        finally:
            export_runs(store, names, archive)
    return done


def train_and_list(part: Part, path: Path, line: Callable[[Any, Summary], dict[str, Any]]) -> bool:
    """Do all runs, and write their CSV and its provenance; return whether none failed.

    Raises:
        OSError: the folder is not writable.
    """
    make_folder(path.parent)
    began = time.monotonic()
    summaries = do_all(part.configs)
    if summaries is None:
        return False
    part.summaries = summaries
    made, where = provenance(summaries), path.with_suffix(".json")
    known = json.loads(where.read_text()) if where.exists() else {}
    # A command that finds all runs finished keeps the time of the command that did them.
    last = known.pop("wall_seconds_of_last_command", None)
    made["wall_seconds_of_last_command"] = last if known == made else time.monotonic() - began
    lines = [line(cell, summary) for cell, summary in zip(part.cells, summaries, strict=True)]
    write_text(path, csv_text([list(lines[0]), *(list(one.values()) for one in lines)]))
    write_json(where, made)
    return True
