"""One page with all results, to look at without a network: `results/report/index.html`.

    python -m scripts.report
    python -m scripts.report results=results store=runs

It has what the paper claims beside what was found, every table and figure of the folder `results`,
every run of these and of the store, with its curves where they are kept, and where all came from.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.cli import ROOT, asked_for_help, guarded, split
from experiments.files import write_text
from experiments.records.archive import read_records
from experiments.records.tidy import read_summaries
from experiments.studies.catalog import studies
from experiments.studies.claim import Claim, scale

PAGE = Path(__file__).with_name("report.html")
POINTS = 240  # at most, of a curve
ROWS = 2000  # at most, of a table; what has more is the curves of runs
PRINTED = 40  # of them, on paper; see report.html
SHOWN, LONGEST = 6, 400  # hashes, or characters, of a cell that are shown without a click


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    results: str = "results"
    store: str = "runs"


@dataclass(frozen=True)
class RunEntry:
    """A run, with its curves by their names: steps and values of each."""

    hash: Any
    stack: Any
    data: Any
    seed: Any
    epochs: Any
    test_error: Any
    test_perplexity: Any
    train_loss: Any
    diverged: Any
    curves: dict[str, tuple[list[float], list[float | None]]]


COLUMNS = [f.name for f in fields(RunEntry) if f.name != "curves"]


def found_in(results: Path) -> Iterator[tuple[Any, Path]]:
    """Each study that a folder has results of, with its own folder there."""
    for study in studies():
        for folder in study.folders(results):
            yield study, folder


def claims(results: Path) -> list[Claim]:
    """What the paper claims, as far as a folder has runs for it."""
    return [claim for study, folder in found_in(results) for claim in study.claims(folder)]


def name_of(path: Path, results: Path) -> str:
    """A file of results, by what it shows: figure2/cpu/lr."""
    return path.relative_to(results).with_suffix("").as_posix()


# The runs.


def run_entries(folder: Path, store: Path) -> list[RunEntry]:
    """Every run of a folder's records and lists and of a store, with whatever curves there are."""
    found: dict[str, RunEntry] = {}
    for source in sorted(folder.rglob("*runs.csv")):
        for _, line in pd.read_csv(source).iterrows():
            if isinstance(line.get("hash"), str):
                values = {name: line.get(name) for name in COLUMNS}
                stack = line.get("stack", line.get("row", name_of(source, folder)))
                found[line["hash"]] = RunEntry(**{**values, "stack": stack}, curves={})
    for source in sorted(folder.rglob("*.jsonl.gz")):
        for files in read_records(source).values():
            _add(found, json.loads(files["summary.json"]), files)
    for summary in read_summaries(store):
        own = store / summary["hash"]
        _add(found, summary, {path.name: path.read_text() for path in sorted(own.glob("*.csv"))})
    return sorted(found.values(), key=lambda entry: not entry.curves)


def _add(found: dict[str, RunEntry], summary: dict[str, Any], files: dict[str, str]) -> None:
    values = {name: summary.get(name) for name in COLUMNS}
    found[summary["hash"]] = RunEntry(**values, curves=curves(files))


def curves(files: dict[str, str]) -> dict[str, tuple[list[float], list[float | None]]]:
    """Of each column of a run's CSVs the steps and values, thinned to `POINTS`."""
    found: dict[str, tuple[list[float], list[float | None]]] = {}
    for name in ("curves.csv", "hyperparameters.csv", "hypergradients.csv"):
        if name in files:
            table = pd.read_csv(io.StringIO(files[name]))
            thin = table.iloc[:: -(-len(table) // POINTS) or 1]
            for column in thin.columns.drop(["step", "epoch"], errors="ignore"):
                values = [float(f"{v:.5g}") if math.isfinite(v) else None for v in thin[column]]
                found[column] = thin.step.tolist(), values
    return found


# The page.


def page(folder: Path, store: Path) -> str:
    """The whole page."""
    entries = run_entries(folder, store)
    parts = [
        "<h1>Gradient Descent: The Ultimate Optimizer</h1>",
        "<p>What the paper of Chandra, Xie, Ragan-Kelley and Meijer (NeurIPS 2022) claims, and "
        "what this repository found. A click on a heading sorts a table.</p>",
        "<nav>"
        + "".join(f'<a href="#{n}">{n}</a>' for n in ("claims", "figures", "tables", "runs"))
        + '<a href="#provenance">provenance</a></nav>',
        *_section("claims", _claims(claims(folder))),
        *_section("figures", _figures(folder)),
        *_section("tables", _tables(folder)),
        *_section("runs", _runs(entries)),
        *_section("provenance", _provenance(folder)),
    ]
    data = {
        entry.hash: {"label": f"{entry.stack}, seed {entry.seed}", "columns": entry.curves}
        for entry in entries
        if entry.curves
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = PAGE.read_text()
    return template.replace("<!--CONTENT-->", "\n".join(parts)).replace("<!--DATA-->", text)


def _section(name: str, parts: Iterator[str]) -> Iterator[str]:
    yield f'<section id="{name}"><h2>{name.capitalize()}</h2>'
    yield from parts
    yield "</section>"


def _claims(found: Sequence[Claim]) -> Iterator[str]:
    told = []
    for papers, where in ((True, "the paper's setting"), (False, "a reduced one")):
        judged = [claim for claim in found if claim.verdict and claim.scale == scale(papers)]
        good = sum(claim.verdict == "yes" for claim in judged)
        told.append(f"{good} of {len(judged)} judged rows in {where}")
    yield (
        f"<p>{' and '.join(told)} agree with the paper. Ours are mean ± standard deviation over n "
        "seeds.</p>"
    )
    heads = [f.name for f in fields(Claim)]
    yield table(heads, [astuple(claim) for claim in found], tall=False)


def _figures(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.png")):
        picture = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(name_of(path, folder))
        yield (
            f'<figure><img alt="{name}" loading="lazy" src="data:image/png;base64,{picture}">'
            f"<figcaption>{name}</figcaption></figure>"
        )


def _tables(folder: Path) -> Iterator[str]:
    def is_raw(path: Path) -> bool:
        """What other tables are made of, and too wide for paper."""
        return path.stem.endswith(("runs", "curves"))

    for path in sorted(folder.rglob("*.csv"), key=lambda path: (is_raw(path), path)):
        content = pd.read_csv(path, dtype=str, keep_default_na=False)
        yield f"<div{' class=raw' * is_raw(path)}><h3>{html.escape(name_of(path, folder))}</h3>"
        if len(content) > ROWS:
            yield f'<p class="faint">{len(content)} rows, in {html.escape(path.name)} alone</p>'
        else:
            yield table(list(content.columns), content.values.tolist())
        yield "</div>"


def _runs(entries: Sequence[RunEntry]) -> Iterator[str]:
    drawn = sum(bool(entry.curves) for entry in entries)
    yield (
        f"<p>{len(entries)} runs, {drawn} of them with their curves: a click on a run draws it, "
        "another one takes it away.</p>"
        '<svg id="chart" viewBox="0 0 800 450" role="img" aria-label="Curves of the chosen runs">'
        '</svg><ul id="legend"></ul><p id="reading" class="faint"></p><div class="controls">'
        '<label>curve <select id="column"></select></label>'
        '<label><input type="checkbox" id="log"> log scale</label>'
        '<label>filter <input id="filter" type="search" placeholder="SGD mnist"></label></div>'
    )
    rows = [[getattr(entry, name) for name in COLUMNS] for entry in entries]
    kinds = [f'class="run{" has-curves" * bool(e.curves)}" data-hash="{e.hash}"' for e in entries]
    yield table(COLUMNS, rows, kinds)


def _provenance(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            yield f"<h3>{html.escape(name_of(path, folder))}</h3>"
            rows = [(key, _words(value)) for key, value in content.items()]
            yield table(["key", "value"], rows)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_words(each)}" for key, each in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Any]],
    kinds: Sequence[str] = (),
    tall: bool = True,
) -> str:
    """A table that can be sorted. `kinds` are attributes of the rows."""
    size = f'tall" data-rows="{len(rows)}' if len(rows) > PRINTED else "tall"
    lines = [f'<div class="wide{f" {size}" * tall}"><table class="sortable"><thead><tr>']
    lines += [f"<th>{html.escape(head)}</th>" for head in heads]
    lines.append("</tr></thead><tbody>")
    for row, kind in zip(rows, kinds or [""] * len(rows), strict=True):
        lines.append(f"<tr {kind}>" if kind else "<tr>")
        lines += [_cell(head, value) for head, value in zip(heads, row, strict=True)]
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def _cell(head: str, value: Any) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    text = "" if missing else f"{value:.6g}" if isinstance(value, float) else str(value)
    kind = ""
    try:
        float(text)
        kind = ' class="number"'
    except ValueError:
        if head in ("verdict", "agrees") and text.lower() in ("yes", "no", "true", "false"):
            kind = ' class="yes"' if text.lower() in ("yes", "true") else ' class="no"'
        elif head == "runs":
            kind = ' class="long hash"'
        elif len(text) > 40:
            kind = ' class="long"'
    shown = html.escape(text)
    if head == "runs" and (count := len(text.split())) > SHOWN:
        shown = f"<details><summary>{count} runs</summary>{shown}</details>"
    elif len(text) > LONGEST:
        shown = f"<details><summary>{html.escape(text[:40])} ...</summary>{shown}</details>"
    return f'<td{kind} data-head="{html.escape(head)}">{shown}</td>'


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    folder = Path(options.results)
    if not folder.is_dir():
        raise ValueError(f"results={options.results} is no folder; make reproduce-table1 makes it")
    path = folder / "report" / "index.html"
    write_text(path, page(folder, Path(options.store)))
    print(path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
