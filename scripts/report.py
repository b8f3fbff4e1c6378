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
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from experiments.char_rnn import Cell, cell_of
from experiments.command import ROOT, asked_for_help, split
from experiments.data import label
from experiments.records import read_records
from experiments.run import guarded
from experiments.store import write_text
from experiments.summarise import read_summaries
from experiments.table1 import REFERENCE as TABLE1
from experiments.tables_v1 import REFERENCE as TABLES_V1
from scripts import char_rnn, figure2, figure3, tables, tables_v1
from scripts.runs import Run, of, read_runs

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
class Claim:
    """A line of what the paper claims: its value, ours, and whether they agree."""

    dataset: str
    setting: str
    scale: str  # the paper's, or reduced
    metric: str
    published: str
    ours: str
    n: int
    verdict: str  # yes, no, or empty where it is not judged
    runs: str  # their hashes


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


# Of Figure 3, what is not to shrink with height: decades of starts.
FORGIVEN = {
    "below": "decades of starts below the best plain one that end near its error",
    "reach": "decades from the best plain start down to the least that ends near its error",
    "own_reach": "decades from the best plain start down to the least near the height's own best",
}

COLUMNS = [f.name for f in fields(RunEntry) if f.name != "curves"]


# What the paper claims.


def claims(folder: Path) -> list[Claim]:
    """Those for which a folder has runs."""
    found: list[Claim] = []
    if (folder / "table1_runs.csv").exists():
        found += table1_claims(pd.read_csv(folder / "table1_runs.csv"))
    if (folder / "tables_v1_runs.csv").exists():
        found += tables_v1_claims(pd.read_csv(folder / "tables_v1_runs.csv"))
    for source in sorted(folder.glob("figure2_*.jsonl.gz")):
        found += figure2_claims(figure2.read_figure2(source))
    for source in sorted(folder.glob("char_rnn_*.jsonl.gz")):
        found += char_rnn_claims(read_runs(source, cell_of), char_rnn.preset_of(source))
    for source in sorted(folder.glob("figure3_*_runs.csv")):
        found += figure3_claims(pd.read_csv(source))
    if (folder / "benchmark.csv").exists():
        found += time_claims(pd.read_csv(folder / "benchmark.csv"))
    return found


def _scale(papers: bool) -> str:
    return "the paper's" if papers else "reduced"


def table1_claims(runs: pd.DataFrame) -> Iterator[Claim]:
    """A claim for each row of Table 1."""
    reference = pd.read_csv(TABLE1).set_index("stack")
    for _, line in tables.summarize(runs, reference).iterrows():
        own = runs[runs.row == line.row]
        yield Claim(
            label(own.data.iloc[0]),
            f"Table 1, {line.row}, {line.epochs} epochs",
            _scale(bool(tables.verdict(line))),
            "test error (%)",
            tables.error_text(line.published_error, line.published_sd),
            tables.error_text(line.our_error, line.our_sd),
            int(line.n),
            tables.verdict(line),
            " ".join(own.hash),
        )


def tables_v1_claims(runs: pd.DataFrame) -> Iterator[Claim]:
    """A claim for each row of the first version's tables, to the digits that these have."""
    table = tables_v1.summarize(runs, pd.read_csv(TABLES_V1))
    for _, line in table.iterrows():
        own = runs[(runs.table == line.table) & (runs.row == line.row)]
        near = abs(line.accuracy - line.published_accuracy) <= max(2 * line.sd, 0.5)
        yield Claim(
            label(own.data.iloc[0]),
            f"first version, Table {line.table}, {line.row}",
            _scale(own.data.iloc[0] == "mnist"),
            "test accuracy (%)",
            f"{line.published_accuracy:g}",
            tables_v1.accuracy_text(line),
            int(line.n),
            "yes" if near else "no",
            " ".join(own.hash) if "hash" in own else "",
        )


def figure2_claims(runs: Sequence[Run]) -> Iterator[Claim]:
    """From each start, that the tower's training loss is no worse than without it.

    And that the learned lr decays: at its end it is to be half of the start or less.
    """
    data, words = label(runs[0].summary["data"]), figure2.setting(list(runs))
    scale = _scale(figure2.is_papers(list(runs)))
    for start, (plain, tower) in figure2.compare(list(runs)).items():
        seeds, hashes = _of_both(runs, *(figure2.Cell(kind, *start) for kind in ("plain", "tower")))
        yield Claim(
            data,
            f"Figure 2, lr {start[0]}, momentum {start[1]}, {words}",
            scale,
            "training loss (nats), tower against plain",
            "lower",
            f"{tower:.3f} against {plain:.3f}",
            seeds,
            "yes" if tower <= plain else "no",
            hashes,
        )
    cell = figure2.REPLAYED
    towers = [run for run in of(runs, cell) if not run.summary["diverged"]]
    if towers:
        left = [run.summary["hyperparameters"][0]["lr"] / cell.lr for run in towers]
        mean, sd = fmean(left), f" ± {stdev(left):.2g}" if len(left) > 1 else ""
        yield Claim(
            data,
            f"Figure 2, learned from lr {cell.lr}, momentum {cell.momentum}, {words}",
            scale,
            "learned lr at the end, as a share of the start",
            "decays",
            f"{mean:.2g}{sd}",
            len(towers),
            "yes" if mean <= 0.5 else "no",
            " ".join(run.summary["hash"] for run in towers),
        )


def _of_both(runs: Sequence[Run], *cells: Any) -> tuple[int, str]:
    """How many seeds all of some cells have, and the hashes of the runs with these."""
    seeds = set.intersection(*({run.seed for run in of(runs, cell)} for cell in cells))
    found = [run for cell in cells for run in of(runs, cell) if run.seed in seeds]
    return len(seeds), " ".join(run.summary["hash"] for run in found)


def char_rnn_claims(runs: Sequence[Run], preset: str) -> Iterator[Claim]:
    """From each start, that the tower's test perplexity is no worse than without it."""
    for lr, (plain, tower) in char_rnn.compare(list(runs)).items():
        seeds, hashes = _of_both(runs, Cell("plain", lr), Cell("tower", lr))
        yield Claim(
            label(runs[0].summary["data"]),
            f"character RNN, Adam from lr {lr}, {char_rnn.setting(list(runs), preset)}",
            _scale(char_rnn.is_papers(list(runs))),
            "test perplexity, tower against plain",
            "lower",
            f"{tower:.3f} against {plain:.3f}",
            seeds,
            "yes" if tower <= plain else "no",
            hashes,
        )


def figure3_claims(runs: pd.DataFrame) -> Iterator[Claim]:
    """For each rule and measure, that taller towers forgive starts that are too small no less."""
    robust = figure3.robustness(figure3.points(runs))
    for (rule, measure), holds in figure3.claim(robust).items():
        own = robust[robust.rule == rule].sort_values("height")
        yield Claim(
            label(runs.data.iloc[0]),
            f"Figure 3a, towers of {rule}, {figure3.setting(runs)}",
            _scale(figure3.is_papers(runs)),
            f"{FORGIVEN[measure]}, by height",
            "never shrinks",
            ", ".join(f"{decades:.1f}" for decades in own[measure]),
            int(runs.seed.nunique()),
            "yes" if holds else "no",
            " ".join(runs[runs.rule == rule].hash),
        )


def time_claims(times: pd.DataFrame) -> Iterator[Claim]:
    """What each level of a tower adds to a training step of ResNet-20; no run of the store."""
    own = times[(times.model == "resnet20") & (times.optimizer == "compiled")]
    towers = own[own.family == "SGD"].set_index("height").sort_index()
    if len(towers) > 1:
        levels = towers.index[-1] - towers.index[0]
        added = (towers.step_us.iloc[-1] - towers.step_us.iloc[0]) / levels
        yield Claim(
            "random images",
            f"Figure 3b, ResNet-20, towers of SGD up to height {towers.index[-1]}",
            _scale(True),
            "time of a step that each level adds (%)",
            "1 to 2",
            f"{100 * added / towers.whole_us.iloc[0]:.2g}",
            1,
            "yes" if added <= 0.02 * towers.whole_us.iloc[0] else "no",
            "benchmark.csv",
        )


# The runs.


def run_entries(folder: Path, store: Path) -> list[RunEntry]:
    """Every run of a folder's records and lists and of a store, with whatever curves there are."""
    found: dict[str, RunEntry] = {}
    for source in sorted(folder.glob("*_runs.csv")):
        for _, line in pd.read_csv(source).iterrows():
            if isinstance(line.get("hash"), str):
                values = {name: line.get(name) for name in COLUMNS}
                stack = line.get("stack", line.get("row", source.stem))
                found[line["hash"]] = RunEntry(**{**values, "stack": stack}, curves={})
    for source in sorted(folder.glob("*.jsonl.gz")):
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
        judged = [claim for claim in found if claim.verdict and claim.scale == _scale(papers)]
        good = sum(claim.verdict == "yes" for claim in judged)
        told.append(f"{good} of {len(judged)} judged rows in {where}")
    yield (
        f"<p>{' and '.join(told)} agree with the paper. Ours are mean ± standard deviation over n "
        "seeds.</p>"
    )
    heads = [f.name for f in fields(Claim)]
    yield table(heads, [astuple(claim) for claim in found], tall=False)


def _figures(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.png")):
        picture = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.stem)
        yield (
            f'<figure><img alt="{name}" loading="lazy" src="data:image/png;base64,{picture}">'
            f"<figcaption>{name}</figcaption></figure>"
        )


def _tables(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.csv")):
        content = pd.read_csv(path, dtype=str, keep_default_na=False)
        # What other tables are made of, and too wide for paper.
        raw = path.stem.endswith(("_runs", "_curves"))
        yield f"<div{' class=raw' * raw}><h3>{html.escape(path.stem)}</h3>"
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
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            yield f"<h3>{html.escape(path.stem)}</h3>"
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
