"""Write one offline page with all results: `results/report/index.html`.

    python -m scripts.report
    python -m scripts.report results=results store=runs

The page has the paper's claims beside our results, every table and figure of the folder `results`,
every run of the results and of the store with its stored curves, and the provenance.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import functools
import gzip
import html
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from experiments.cli import ROOT, asked_for_help, guarded, split
from experiments.config.compose import compose
from experiments.files import write_text
from experiments.records.archive import read_records
from experiments.records.tidy import read_summaries
from experiments.studies.catalog import studies
from experiments.studies.claim import Claim, scale

PAGE = Path(__file__).with_name("report.html")
LIMIT = 2_990_000  # maximum bytes of the page
POINTS = 60  # maximum of a curve; the linked files have all points
STRIDES = (1, 2, 3, 4, 6, 10, 20, 60)
WIDE, QUALITY = 1300, 72  # pixels of a figure's longer side, and its quality as WebP
ROWS = 400  # maximum of a table; longer tables are linked
PRINTED = 40  # rows of a table on paper; see report.html
SHOWN, LONGEST = 1, 400  # hashes, or characters, that a cell shows without a click


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    results: str = "results"
    store: str = "runs"


COLUMNS = [
    *("hash", "experiment", "model", "data", "stack", "schedule", "epochs", "seed"),
    *("test_error", "test_perplexity", "train_loss", "diverged"),
]


@dataclass(frozen=True)
class RunEntry:
    """A run: its `COLUMNS`, its curves (by name, steps and values), and the link to its source."""

    values: dict[str, Any]
    curves: dict[str, tuple[list[float], list[float | None]]]
    source: str


# The field's names for the columns of tables.
WORDS = {
    "test_error": "test error (%)",
    "test_accuracy": "test accuracy (%)",
    "test_perplexity": "test perplexity",
    "test_loss": "test loss (nats)",
    "test_bits_per_character": "test loss (bits per character)",
    "train_loss": "training loss (nats)",
    "ours_error": "our test error (%)",
    "lr": "initial lr",
    "n": "seeds",
    "step_us": "optimizer step alone (µs)",
    "inside_us": "optimizer step in training (µs)",
    "whole_us": "training step (µs)",
    "cold_s": "first compilation (s)",
    "warm_s": "from the disk cache (s)",
    "ms_per_step": "time per step (ms)",
    "bytes_per_parameter": "memory per parameter (bytes)",
    "dataset": "data",
}
SUFFIXES = {"_q25": ", lower quartile", "_q75": ", upper quartile", "_sd": ", standard deviation"}


def words(column: str) -> str:
    """A readable name of a column."""
    for end, text in SUFFIXES.items():
        if column.endswith(end):
            return words(column.removesuffix(end)) + text
    return WORDS.get(column, column.replace("_", " "))


def claims(results: Path) -> list[Claim]:
    """The paper's claims for which a folder has runs."""
    return [
        claim
        for study in studies()
        for folder in study.folders(results)
        for claim in study.claims(folder)
    ]


def name_of(path: Path, results: Path) -> str:
    """The name of a file of results, such as figure2/cpu/lr."""
    return path.relative_to(results).with_suffix("").as_posix()


# The runs.


def run_entries(folder: Path, store: Path) -> list[RunEntry]:
    """Every run of a folder's records and lists, and of a store, with its curves if any."""
    found: dict[str, RunEntry] = {}
    for source in sorted(folder.rglob("*runs.csv")):
        study = source.relative_to(folder).parts[0]
        for line in pd.read_csv(source).to_dict("records"):
            if isinstance(line.get("hash"), str):
                values = {name: line.get(name) for name in COLUMNS} | {"experiment": study}
                values["model"] = line.get("model.name") or line.get("task") or _model_of(study)
                stack = line.get("stack") or line.get("method") or line.get("row")
                own = [f"{k} {line[k]}" for k in ("kind", "rule", "height", "lr") if k in line]
                values["stack"] = stack or ", ".join(own).removeprefix("kind ")
                found[line["hash"]] = RunEntry(values, {}, _link(source, folder))
    for source in sorted(folder.rglob("*.jsonl.gz")):
        study = source.relative_to(folder).parts[0]
        for name, files in read_records(source).items():
            summary = json.loads(files["summary.json"])
            found[name] = _entry(summary, files, study, _link(source, folder))
    for summary in read_summaries(store):
        own_folder = store / summary["hash"]
        files = {path.name: path.read_text() for path in sorted(own_folder.glob("*.csv"))}
        study = summary["provenance"].get("made_by", {}).get("experiment")
        link = own_folder.resolve().as_uri()
        found[summary["hash"]] = _entry(summary, files, study, link)
    return sorted(found.values(), key=lambda entry: not entry.curves)


def _link(path: Path, folder: Path) -> str:
    """The link from the page, whose folder is beside the studies' folders."""
    return f"../{path.relative_to(folder).as_posix()}"


@functools.cache
def _model_of(study: str) -> str:
    """The model of a study whose list of runs does not name it."""
    with contextlib.suppress(ValueError):
        return compose([f"experiment={study}"]).model.name
    return ""


def _entry(
    summary: dict[str, Any], files: dict[str, str], study: str | None, source: str
) -> RunEntry:
    values = {name: summary.get(name) for name in COLUMNS} | {"experiment": study}
    values["model"] = summary.get("model", {}).get("name")
    values["schedule"] = summary.get("schedule", {}).get("name", "constant")
    values["epochs"] = summary.get("trainer", {}).get("epochs")
    return RunEntry(values, curves(files), source)


def curves(files: dict[str, str]) -> dict[str, tuple[list[float], list[float | None]]]:
    """The steps and values of each column of a run's CSVs, thinned to `POINTS`."""
    found: dict[str, tuple[list[float], list[float | None]]] = {}
    for name in ("curves.csv", "hyperparameters.csv", "hypergradients.csv"):
        if name in files:
            head, *lines = files[name].splitlines()
            rows = [*csv.DictReader([head, *lines[:: -(-len(lines) // POINTS) or 1]])]
            steps: list[float] = [int(row["step"]) for row in rows]
            for column in head.split(","):
                numbers = [float(row[column] or "nan") for row in rows]
                values = [float(f"{v:.4g}") if math.isfinite(v) else None for v in numbers]
                # The stack has the constant ones.
                if column not in ("step", "epoch") and len({*values}) > 1:
                    found[column] = steps, values
    return found


# The page.


def page(folder: Path, store: Path) -> str:
    """The whole page. The browser unpacks the compressed data of the runs."""
    entries = run_entries(folder, store)
    found = claims(folder)
    parts = [
        "<h1>Gradient Descent: The Ultimate Optimizer</h1>",
        "<p>The claims of the paper by Chandra, Xie, Ragan-Kelley and Meijer (NeurIPS 2022), and "
        "the results of this repository.</p>",
        "<nav>"
        + "".join(f'<a href="#{n}">{n}</a>' for n in ("figures", "claims", "tables", "runs"))
        + '<a href="#provenance">provenance</a></nav>',
        *_section("figures", _figures(folder)),
        *_section("claims", _claims(found)),
        *_section("tables", _tables(folder)),
        *_section("runs", _runs(entries)),
        *_section("provenance", _provenance(folder)),
    ]
    template = PAGE.read_text().replace("<!--CONTENT-->", "\n".join(parts))
    for stride in STRIDES:  # fewer points of each run until the page is small enough
        packed = _packed(entries, stride)
        if len(template) + len(packed) < LIMIT:
            break
    return template.replace("<!--DATA-->", packed)


def _packed(entries: Sequence[RunEntry], stride: int) -> str:
    """All runs, compressed, with every `stride`-th point of their curves."""
    data = {
        "columns": [words(name) for name in COLUMNS],
        "runs": [[_plain(entry.values[name]) for name in COLUMNS] for entry in entries],
        "sources": [entry.source for entry in entries],
        "curves": {
            entry.values["hash"]: {
                k: (x[::stride], y[::stride]) for k, (x, y) in entry.curves.items()
            }
            for entry in entries
            if entry.curves
        },
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1e9 else float(f"{value:.5g}")
    return value if isinstance(value, (str, int)) else str(value)


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
    heads = [f.name for f in fields(Claim) if f.name != "runs"]
    verdicts = {"yes": "agree", "no": "disagree", "": "not judged"}
    options = "".join(
        f'<option value="{value}">{text} ({sum(c.verdict == value for c in found)})</option>'
        for value, text in verdicts.items()
    )
    yield (
        f"<details id=judged><summary>All {len(found)} claims</summary>"
        f'<div class="controls"><label>show <select id="verdict"><option value="all">all</option>'
        f"{options}</select></label></div>"
    )
    rows = [[*(getattr(claim, head) for head in heads), claim.runs] for claim in found]
    kinds = [f'data-verdict="{claim.verdict}"' for claim in found]
    yield table([*heads, "runs"], rows, kinds, tall=False)
    yield "</details>"


def captions(results: Path) -> dict[Path, str]:
    """The captions of the studies' figures, in the studies' order."""
    found: dict[Path, str] = {}
    for study in sorted(studies(), key=lambda study: study.place):
        for folder in study.folders(results) or [results / study.name]:
            if any(folder.glob("*.png")):
                texts = study.captions(folder)
                found |= {folder / f"{name}.png": text for name, text in texts.items()}
    return {path: text for path, text in found.items() if path.exists()}


def _figures(folder: Path) -> Iterator[str]:
    texts = captions(folder)
    others = {path: name_of(path, folder) for path in sorted(folder.rglob("*.png"))}
    for path, text in (texts | {k: v for k, v in others.items() if k not in texts}).items():
        if path.parent.name.endswith("quick"):
            continue
        buffer = io.BytesIO()
        with Image.open(path) as image:
            image.thumbnail((WIDE, WIDE), Image.Resampling.LANCZOS)
            width, height = image.size
            image.convert("RGB").save(buffer, "WEBP", quality=QUALITY, method=6)
        picture = base64.b64encode(buffer.getvalue()).decode()
        name, title = html.escape(name_of(path, folder)), html.escape(text, quote=True)
        yield (
            f'<figure data-name="{name}"><button class="open" aria-label="Enlarge: '
            f'{title}"><img alt="{title}" width="{width}" height="{height}" '
            f'src="data:image/webp;base64,{picture}"></button>'
            f"<figcaption>{html.escape(text)} "
            f'<a href="{html.escape(_link(path, folder))}">{name}</a></figcaption></figure>'
        )
    yield (
        '<dialog id="large" aria-label="A figure, enlarged"><button>close</button><img alt="">'
        "</dialog>"
    )


def _tables(folder: Path) -> Iterator[str]:
    def is_raw(path: Path) -> bool:
        """Whether a CSV is a source of other tables."""
        return path.stem.endswith(("runs", "curves", "replay"))

    for path in sorted(folder.rglob("*.csv"), key=lambda path: (is_raw(path), path)):
        name, link = html.escape(name_of(path, folder)), html.escape(_link(path, folder))
        rows = sum(1 for _ in path.open()) - 1
        if is_raw(path) or rows > ROWS:
            yield f'<p class="raw"><a href="{link}">{name}.csv</a>, {rows} rows</p>'
            continue
        content = pd.read_csv(path, dtype=str, keep_default_na=False)
        if "height" in content:  # -1 is the first compilation on a machine
            content.loc[content.height == "-1", "height"] = "first"
        yield f"<details><summary>{name}</summary>"
        yield table(list(map(words, content.columns)), content.values.tolist())
        yield f'<p><a href="{link}">as CSV</a></p></details>'


def _runs(entries: Sequence[RunEntry]) -> Iterator[str]:
    drawn = sum(bool(entry.curves) for entry in entries)
    yield (
        f"<p>{len(entries)} runs, {drawn} of them with thinned curves. Click on a run to draw it, "
        "and again to remove it. The legend links to all data of a run.</p>"
        '<svg id="chart" viewBox="0 0 800 450" role="img" aria-label="Curves of the chosen runs">'
        '</svg><ul id="legend"></ul><p id="reading" class="faint"></p><div class="controls">'
        '<label>curve <select id="column"></select></label>'
        '<label><input type="checkbox" id="log"> log scale</label>'
        '<label>filter <input id="filter" type="search" placeholder="SGD mnist"></label></div>'
        '<div class="wide tall"><table id="all-runs"><thead></thead><tbody></tbody></table></div>'
        '<div class="controls"><button id="back">back</button><span id="place"></span>'
        '<button id="on">on</button></div>'
    )


def _provenance(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            yield f"<details><summary>{html.escape(name_of(path, folder))}</summary>"
            rows = [(key, _words(value)) for key, value in content.items()]
            yield table(["key", "value"], rows)
            yield "</details>"


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
    """A sortable table. `kinds` are HTML attributes of the rows."""
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
        raise ValueError(
            f"results={options.results} is not a folder; make reproduce-table1 creates it"
        )
    path = folder / "report" / "index.html"
    write_text(path, page(folder, Path(options.store)))
    print(path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
