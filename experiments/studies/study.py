"""A study: one table or figure of the paper, from its runs to its page.

A study is a folder beside this file. Its `runs.py` says what is trained and has a `STUDY`; its
`report.py` has `draw(folder)`, which draws the table and the figures from what a folder of results
holds. What the runs found goes to `results/STUDY/PRESET/`, and from there the report is drawn:

    runs.csv, runs.json     a line for each run, and where the numbers come from
    records/*.jsonl.gz      whole runs, for the studies that keep them; each command adds a file
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

from experiments.cli import asked_for_help, choose, seed_list, split
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

# The keys of the runs' config that may be set for a whole study: they leave its setting alone.
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
# Where records are kept some more may be set: `check_setting` compares with what is recorded.
SETTABLE_WITH_RECORDS = (*SETTABLE, "precision", "trainer.threads")


@dataclass(frozen=True)
class Preset:
    """How much of a study is done.

    Attributes:
        overrides: of the runs' config.
        seeds: those of each cell.
    """

    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Nothing:
    """No options of a command."""


@dataclass(frozen=True)
class Options:
    """The options of a study's command; empty is the preset's own.

    Attributes:
        start: "records" where finished runs are taken from the results beside the store.
    """

    preset: str = ""
    seeds: str = ""
    start: str = "scratch"
    results: str = "results"


@dataclass(frozen=True)
class CellOptions(Options):
    """The same for a study whose cells are of several kinds; empty is all of them."""

    kinds: str = ""


@dataclass
class Request:
    """What a command line asks of a study.

    Attributes:
        name: of the preset.
        overrides: of the runs' config, those of the preset first.
        folder: where the results go; it is known once a part is under way.
        archive: the name of the file of records that the command adds.
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
    """Runs that can be done side by side, in batches of which the first tell most.

    Attributes:
        batches: runs as pairs of the cell of the table or figure and its config.
        name: of the CSV of the runs.
        configs, summaries: the resolved configs, and what was found, once the part is done.
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
    """The runs of cells that differ in their stack alone, each with all seeds that are asked for.

    Args:
        base: the config of all of them, but for stack, seed and row.
        cells: each with its stack, and the name of its row.
    """
    return [
        (cell, replace(base, stack=StackConfig(stack), seed=seed, row=row))
        for cell, stack, row in cells
        for seed in request.seeds
    ]


def chosen(cells: Sequence[Any], request: Request, known: Sequence[str]) -> list[Any]:
    """The cells of the kinds that are asked for, of those that are known.

    Raises:
        ValueError: there is no such kind.
    """
    asked = request.options.kinds
    kinds = {choose("kinds", kind, known) for kind in asked.split(",")} if asked else known
    return [cell for cell in cells if cell.kind in kinds]


class Reported:
    """A study's report: the module of that name beside its runs."""

    name: str

    @property
    def report(self) -> Any:
        """The module, with `draw(folder)` and, where it has any, `claims(folder)`."""
        return import_module(f"experiments.studies.{self.name}.report")

    def draw(self, folder: Path) -> list[Path]:
        """Draw what a folder of results has the runs of; returns what was written.

        Raises:
            ValueError: what it has cannot be drawn.
        """
        try:
            return self.report.draw(folder)
        except ValueError as error:
            raise ValueError(
                f"{error}; the runs are kept, and when this is mended, make tables draws them"
            ) from None

    def prose(self, folder: Path) -> dict[str, str]:
        """What README and docs say of a folder of results, by the names of the blocks."""
        return getattr(self.report, "prose", lambda folder: {})(folder)

    def captions(self, folder: Path) -> dict[str, str]:
        """What is said of each figure of a folder of results, by the figure's name."""
        return getattr(self.report, "captions", lambda folder: {})(folder)

    def claims(self, folder: Path) -> Iterator[Any]:
        """What the paper claims of it, beside what a folder of results has found."""
        yield from getattr(self.report, "claims", lambda folder: ())(folder)


@dataclass(frozen=True)
class Study(Reported):
    """One table or figure.

    Attributes:
        name: of its folder here and of that in results/.
        presets: by their names; the first is the default.
        parts: the runs that are asked for. A later part may need what an earlier one has found.
        doc: the help of its command.
        line: the line of a run in the CSV, from its cell and its summary. None for a study that
            keeps whole records of its runs, from which its report makes the CSV.
        part_of: for a study that keeps records, the part of it that a run belongs to, given the
            name of the preset and the run's identity or summary. The runs of a part have one
            setting.
        options: the dataclass of the command's options.
        settable: the keys of the runs' config that may be set.
        starts: the values of the option `start`.
        place: of its figures on the page of all results.
    """

    name: str
    presets: Mapping[str, Any]
    parts: Callable[[Request], Iterator[Part]]
    doc: str | None = None
    line: Callable[[Any, Summary], dict[str, Any]] | None = None
    part_of: Callable[[str, Summary], Any] = lambda preset, run: None
    options: type[Options] = Options
    settable: Sequence[str] = SETTABLE
    starts: Sequence[str] = ("scratch",)
    place: int = 100

    def request(self, arguments: Sequence[str]) -> Request:
        """What a command line asks for.

        Raises:
            ValueError: an option or a value that is not known, in one line.
        """
        options, overrides = split(arguments, self.options, self.settable)
        name = options.preset or next(iter(self.presets))
        preset = self.presets[choose("preset", name, list(self.presets))]
        choose("start", options.start, self.starts)
        seeds = seed_list(options.seeds) if options.seeds else preset.seeds
        every = (*preset.overrides, f"preset={name}", *overrides)
        return Request(options, name, preset, seeds, every)

    def main(self, arguments: Sequence[str]) -> int:
        """The study's command: train what is not trained yet, and draw all of it."""
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
        """One line on standard error where records lie as an earlier version kept them."""
        results = Path(request.options.results)
        old = results / f"{self.name}_{request.name}.jsonl.gz"
        new = results / self.name / request.name
        if old.exists():
            print(
                f"{old} is of an earlier layout; to use it: "
                f"mkdir -p {new}/records && mv {old} {new}/records/",
                file=sys.stderr,
            )

    def folder(self, request: Request, configs: Sequence[Config]) -> Path:
        """Where results go. Those of a part of a data set may not replace what is committed."""
        names = {config.data.name for config in configs}
        others = sorted(name for name in names if not find(name).is_whole(name))
        return Path(request.options.results, self.name, "-".join([request.name, *others]))

    def folders(self, results: Path) -> list[Path]:
        """Of the folders of `results` those that have runs of this study, one for each preset."""
        kept = "runs.csv" if self.line else "records"
        return sorted(path.parent for path in (results / self.name).glob(f"*/{kept}"))


@dataclass(frozen=True)
class Measurement(Reported):
    """A study whose numbers come from no runs of the store: its command finds and draws them.

    Attributes:
        name, doc: as a `Study` has them.
        main: its command.
        kept: the file in its folder from which its report can be drawn again, if there is one.
        presets: none, so far.
        place: as a `Study` has it.
    """

    name: str
    main: Callable[[Sequence[str]], int]
    doc: str | None = None
    kept: str | None = None
    presets: Mapping[str, Any] = field(default_factory=dict)
    place: int = 100

    def folders(self, results: Path) -> list[Path]:
        """Its own folder, where it can be drawn again from there."""
        return [path.parent for path in (results / self.name).glob(self.kept or "no file")]


def do_all(configs: Sequence[Config]) -> list[Summary] | None:
    """The summaries of all runs, done where they are not; None if some failed, which are listed."""
    outcomes = run_all(configs, configs[0].workers)
    if report_failures(outcomes):
        return None
    return [outcome.summary for outcome in outcomes if outcome.summary is not None]


def check_setting(
    configs: Sequence[Config], records: Path, part_of: Callable[[Summary], Any]
) -> None:
    """Raise a ValueError for runs of another setting than the recorded ones of the same part."""

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
                f"{records} has runs with {told(old, differing)}, and these would have "
                f"{told(new, differing)}; give the same, or another folder for them as results="
            )


def train_and_archive(
    batches: Sequence[Sequence[Config]],
    archive: Path,
    start: str,
    part_of: Callable[[Summary], Any] = lambda run: None,
) -> bool:
    """Do all runs, one batch after the other; whether none failed. The failed ones are listed.

    What is new is added to a folder of records as a new file, after each batch and also where one
    is stopped. No file that is there already is changed.

    Args:
        archive: the new file; a second call with the same one adds to it.
        start: "records" where the runs in that folder need not be done again.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: it has runs of another setting.
    """
    records = archive.parent
    make_folder(records)
    check_setting([config for batch in batches for config in batch], records, part_of)
    store, known = RunStore(batches[0][0].store), set(read_records(records))
    if start == "records":
        if not known:
            print(f"there are no runs in {records} yet; all are to be done", file=sys.stderr)
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
    """Do all runs and write their CSV, and where it comes from beside it; whether none failed.

    Raises:
        OSError: the folder cannot be written to.
    """
    make_folder(path.parent)
    began = time.monotonic()
    summaries = do_all(part.configs)
    if summaries is None:
        return False
    part.summaries = summaries
    made, where = provenance(summaries), path.with_suffix(".json")
    known = json.loads(where.read_text()) if where.exists() else {}
    # The time is that of the command that did the runs, not of one that found them done.
    last = known.pop("wall_seconds_of_last_command", None)
    made["wall_seconds_of_last_command"] = last if known == made else time.monotonic() - began
    lines = [line(cell, summary) for cell, summary in zip(part.cells, summaries, strict=True)]
    write_text(path, csv_text([list(lines[0]), *(list(one.values()) for one in lines)]))
    write_json(where, made)
    return True
