"""The page with all results: its content, and that it is self-contained."""

import base64
import gzip
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from test_project import ROOT

from experiments.cli import guarded
from experiments.config.compose import compose
from experiments.config.resolve import resolve
from experiments.studies.curves import Run
from experiments.studies.figure2 import report as figure2
from experiments.studies.step_time import report as step_time
from experiments.training.trainer import train
from scripts import report

OWN = Path("table1", "paper")
TABLE1 = ROOT / "results" / OWN / "runs.csv"


class Page(HTMLParser):
    """The tables of a page by the section or heading above them, its pictures and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.sources: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.name = self.cell = ""
        self.data: dict[str, Any] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attributes}
        self.sources += [found["src"]] if "src" in found else []
        self.links += [found["href"]] if "href" in found else []
        if tag in ("h2", "summary") and "td" not in self.open:
            self.name = ""
        if tag == "tr":
            self.tables.setdefault(self.name, []).append([])
        if tag in ("td", "th"):
            self.cell = ""
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.tables[self.name][-1].append(self.cell)
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        if where in ("h2", "summary") and "td" not in self.open:
            self.name += data
        elif where in ("td", "th") or (where == "details" and "td" in self.open):
            self.cell += data
        elif where == "script" and data.startswith("H4sI"):
            self.data = json.loads(gzip.decompress(base64.b64decode(data)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Committed results, and a store with a run of its own."""
    if not TABLE1.exists():
        pytest.skip("Table 1 is not there")
    folder = tmp_path_factory.mktemp("report")
    (folder / "results" / OWN).mkdir(parents=True)
    for name in ("runs.csv", "runs.json", "table.csv", "figure.png"):
        shutil.copy(ROOT / "results" / OWN / name, folder / "results" / OWN)
    fast = ["trainer.epochs=2", "trainer.compile=false", "trainer.compile_model=false"]
    fixed = ["data=mnist-5k", "device=cpu", "stack=SGD(0.1) / SGD(1e-3)"]
    train(resolve(compose([*fast, *fixed, f"store={folder / 'runs'}"]), "mnist-5k"))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(report.page(folder / "results", folder / "runs"))


def test_each_claim_has_its_runs_and_a_verdict(page: Page) -> None:
    (claims,) = (rows for name, rows in page.tables.items() if name.endswith(" claims"))
    heads, *rows = claims
    expected = [
        "dataset",
        "setting",
        "scale",
        "metric",
        "published",
        "ours",
        "n",
        "verdict",
        "runs",
    ]
    assert heads == expected
    table = pd.read_csv(ROOT / "results" / OWN / "table.csv")
    runs = pd.read_csv(TABLE1)
    assert len(rows) == len(table)
    for row, (_, line) in zip(rows, table.iterrows(), strict=True):
        claim = dict(zip(heads, row, strict=True))
        assert claim["setting"] == f"Table 1, {line.row}, {line.epochs} epochs"
        assert claim["published"] == f"{line.published_error:.2f} ± {line.published_sd:.2f}"
        assert claim["ours"] == f"{line.our_error:.2f} ± {line.our_sd:.2f}"
        assert claim["verdict"] == ("yes" if line.agrees else "no")
        assert claim["scale"] == "the paper's"
        assert claim["runs"].split() == list(runs[runs.row == line.row].hash)
        assert int(claim["n"]) == len(claim["runs"].split())


def test_every_table_figure_and_run_is_there(page: Page, folder: Path) -> None:
    content = pd.read_csv(folder / "results" / OWN / "table.csv")
    assert page.tables["table1/paper/table"][0] == list(map(report.words, content.columns))
    assert len(page.tables["table1/paper/table"]) == 1 + len(content)
    assert {"../table1/paper/runs.csv", "../table1/paper/table.csv"} <= set(page.links)
    (picture,) = page.sources
    kind, _, data = picture.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert max(shown.size) == report.WIDE
    (own,) = (path.parent for path in (folder / "runs").glob("*/summary.json"))
    runs = [dict(zip(report.COLUMNS, run, strict=True)) for run in page.data["runs"]]
    assert {run["hash"] for run in runs} == {own.name, *pd.read_csv(TABLE1).hash}
    assert runs[0]["hash"] == own.name
    assert (runs[0]["model"], runs[0]["schedule"], runs[0]["epochs"]) == ("mlp", "constant", 2)
    assert {(run["model"], run["experiment"]) for run in runs[1:]} == {("mlp", "table1")}
    assert page.data["sources"][0] == own.as_uri()

    curves = page.data["curves"][own.name]
    for name in ("hyperparameters", "hypergradients"):
        for column, values in pd.read_csv(own / f"{name}.csv").items():
            if column != "step" and values.nunique() > 1:
                assert curves[str(column)][1] == pytest.approx(list(values), rel=1e-3)
    assert curves["train_loss"][0] == [16, 32]


def test_all_results_fit_into_three_megabytes() -> None:
    """The committed results, with each run distinct."""
    text = report.page(ROOT / "results", Path("no store"))
    assert len(text.encode()) <= 3_000_000
    page = Page(text)
    heads = re.findall(r"<h2>(\w+)</h2>", text)
    assert heads == ["Figures", "Claims", "Tables", "Runs", "Provenance"]
    told = [tuple(run[1:]) for run in page.data["runs"]]
    assert len(told) > 4000 and len({*told}) > 0.95 * len(told)
    assert all(run[1] and run[2] for run in page.data["runs"])  # the experiment and the model
    captions = re.findall(r"<figcaption>(.*?) <a", text)
    assert all(len(caption.split()) > 3 for caption in captions)
    assert not re.findall(r"<img alt=\"\"[^>]*src", text)
    assert "_q25" not in re.sub(r"<script.*", "", text, flags=re.S)


def test_the_page_of_the_committed_results_can_be_made(tmp_path: Path) -> None:
    found = report.claims(ROOT / "results")
    assert {claim.verdict for claim in found} <= {"yes", "no", ""}
    assert all(claim.runs.split() for claim in found if "first version" not in claim.setting)
    assert all(claim.scale == "reduced" for claim in found if "reduced" in claim.setting)
    figure3 = [claim for claim in found if "Figure 3a" in claim.setting]
    assert {claim.scale for claim in figure3} == {"reduced"}  # of 2 and of 5 epochs, not 30


def run(kind: str, seed: int, train_loss: float, lr: float) -> Run:
    """One of Figure 2, from lr 0.1, momentum 0.9."""
    summary = {
        "hash": f"{kind}-{seed}",
        "data": "cifar10",
        "diverged": math.isinf(train_loss),
        "train_loss": train_loss,
        "trainer": {"epochs": 10},
        "test_error": 10.0,
        "hyperparameters": [{"lr": lr, "momentum": 0.9}],
    }
    return Run(figure2.Cell(kind, 0.1, 0.9), seed, summary, pd.DataFrame(), pd.DataFrame())


def test_claims_of_figure_2_use_the_common_seeds() -> None:
    runs = [run("plain", 0, 0.5, 0.1), run("plain", 1, 0.7, 0.1), run("tower", 0, 0.4, 0.05)]
    better, falls = figure2.claims_of(runs)
    assert (better.ours, better.n, better.verdict) == ("0.400 against 0.500", 1, "yes")
    assert better.runs == "plain-0 tower-0"
    assert (falls.ours, falls.n, falls.verdict, falls.runs) == ("0.5", 1, "yes", "tower-0")
    runs += [run("tower", 1, 0.9, 0.45), run("tower", 2, math.inf, math.nan)]
    better, falls = figure2.claims_of(runs)
    assert (better.ours, better.n, better.verdict) == ("0.650 against 0.600", 2, "no")
    assert (falls.ours, falls.n, falls.verdict) == ("2.5 ± 2.8", 2, "no")


def test_runs_that_both_diverged_are_no_claim() -> None:
    runs = [run("plain", 0, math.inf, 0.1), run("tower", 0, math.inf, 0.1)]
    assert not [*figure2.claims_of(runs)]
    cells = figure2.cell_table(figure2.run_table(runs))
    assert "no worse than the plain run's from 0 of 0" in figure2.markdown(runs, cells, "")
    (better, _) = figure2.claims_of([runs[0], run("tower", 0, 0.4, 0.05)])
    assert (better.ours, better.verdict) == ("0.400 against inf", "yes")


def test_rows_in_the_papers_setting_and_in_a_reduced_one_are_counted_apart() -> None:
    runs = [run("plain", 0, 0.5, 0.1), run("tower", 0, 0.4, 0.09)]
    for each in runs:
        each.summary["trainer"]["steps"] = figure2.PAPERS_STEPS
    whole = [*figure2.claims_of(runs)]
    short = [*figure2.claims_of([run("plain", 0, 0.5, 0.1), run("tower", 0, 0.6, 0.09)])]
    said, *_ = report._claims([*whole, *short])
    assert "1 of 2 judged rows in the paper's setting" in said
    assert "0 of 2 judged rows in a reduced one agree" in said


def test_the_claim_of_a_levels_time_is_a_share_of_the_step() -> None:
    columns = ("model", "optimizer", "family", "height", "step_us", "whole_us")
    lines = [
        ("resnet20", "compiled", "SGD", 0, 100.0, 10_000.0),
        ("resnet20", "compiled", "SGD", 10, 600.0, 10_500.0),
        ("resnet20", "published", "SGD", 20, 9e9, 9e9),
        ("mlp", "compiled", "SGD", 20, 9e9, 9e9),
    ]
    (claim,) = step_time.claims_of(pd.DataFrame(lines, columns=columns))
    assert (claim.published, claim.ours, claim.verdict) == ("1 to 2", "0.5", "yes")
    slow = [(*line[:4], 10 * line[4], line[5]) for line in lines]
    (claim,) = step_time.claims_of(pd.DataFrame(slow, columns=columns))
    assert (claim.ours, claim.verdict) == ("5", "no")


def test_the_page_is_self_contained(folder: Path) -> None:
    text = report.page(folder / "results", folder / "runs")
    assert text == report.page(folder / "results", folder / "runs")
    page = Page(text)
    assert all(link.startswith(("#", "../")) for link in page.links)
    assert all(source.startswith("data:") for source in page.sources)
    without = re.sub(r"data:image/webp;base64,[^\"]*", "", text)
    outside = re.findall(r"https?://[\w.]+|url\(|@import|<link|fetch\(", without)
    assert set(outside) == {"http://www.w3.org"}  # the name of SVG
    assert "<!--" not in text


def test_table_cells_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text('a,b\n"<script>alert(1)</script>",</td>\n')
    text = report.page(tmp_path, tmp_path)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_the_command_writes_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (f"results={folder / 'results'}", f"store={folder / 'runs'}")
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    assert guarded(report.main) == 0
    written = folder / "results" / "report" / "index.html"
    assert capsys.readouterr().out.strip() == str(written) and written.stat().st_size > 100_000
    monkeypatch.setattr(sys, "argv", ["report", "results=nowhere"])
    assert guarded(report.main) == 2
    assert "results=nowhere is not a folder" in capsys.readouterr().err


# In a browser, if one is installed.

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTHS = (1200, 390)  # of a desk and of a phone

ERRORS = """<script>
const said = {errors: []};
addEventListener("error", event => said.errors.push(event.message));
addEventListener("unhandledrejection", event => said.errors.push(String(event.reason)));
console.error = (...words) => said.errors.push(words.join(" "));
</script>"""
CLICKS = """<script type="module">
const every = selector => [...document.querySelectorAll(selector)];
const click = selector => document.querySelector(selector).click();
const pause = () => new Promise(done => setTimeout(done, 50));
while (!document.documentElement.dataset.ready) await pause();
every("details").forEach(each => { each.open = true; });
const [table] = every("#tables table"), heads = [...table.tHead.rows[0].cells];
const place = heads.findIndex(head => head.textContent === "epochs");
const sort = () => heads[place].querySelector("button").click();
const epochs = () => [...table.tBodies[0].rows].map(row => Number(row.cells[place].textContent));
sort();
said.up = epochs();
sort();
said.down = epochs();
said.lines = [every("#chart polyline").length];
for (let k = 0; k < 2; k++) {
  const row = document.querySelector("tr.has-curves");
  row.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
  said.lines.push(every("#chart polyline").length);
}
said.names = every("#column option").map(option => option.value);
said.listed = every("tr.run").length;
click("#on");
said.second = every("tr.run").length;
const seed = every("#all-runs th").findIndex(head => head.textContent === "seed");
every("#all-runs th button")[seed].click();
every("#all-runs th button")[seed].click();
said.seeds = every("tr.run").map(row => Number(row.cells[seed].textContent));
const search = document.getElementById("filter");
search.value = document.querySelector("tr.run").dataset.hash;
search.dispatchEvent(new Event("input"));
said.found = every("tr.run").length;
const verdict = document.getElementById("verdict");
verdict.value = "no";
verdict.dispatchEvent(new Event("change"));
const judged = every("#claims tr[data-verdict]").filter(row => row.checkVisibility());
said.claims = judged.map(row => row.dataset.verdict);
click("button.open");
const large = document.getElementById("large");
said.large = large.open && large.querySelector("img").naturalWidth;
click("#large");
said.closed = !large.open;
const edge = selector => document.querySelector(selector).getBoundingClientRect().top;
said.first = edge("figure") < edge("#claims");
said.width = document.documentElement.scrollWidth;
said.of = innerWidth;
document.title = JSON.stringify(said);
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_in_a_browser_tables_sort_and_runs_open(folder: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    text = report.page(folder / "results", folder / "runs")
    text = text.replace("<head>", f"<head>{ERRORS}").replace("</body>", f"{CLICKS}</body>")
    frames = [f'<iframe width="{w}" height="844" srcdoc="{html.escape(text)}">' for w in WIDTHS]
    titles = "[...document.querySelectorAll('iframe')].map(frame => frame.contentDocument.title)"
    page = tmp_path / "page.html"
    page.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><title></title>{"</iframe>".join(frames)}</iframe>
        <script>setInterval(() => document.title = {titles}.join(), 100);</script>"""
    )
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user")
    done = subprocess.run(
        [BROWSER, *options, "--virtual-time-budget=30000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)[:1]
    epochs = sorted(pd.read_csv(folder / "results" / OWN / "table.csv").epochs)
    for width, said in zip(WIDTHS, json.loads(f"[{html.unescape(title)}]"), strict=True):
        assert said["errors"] == []
        assert said["up"] == epochs and said["down"] == epochs[::-1]  # 5 before 30, and after
        assert said["lines"] == [1, 0, 1]  # the first run is open from the beginning
        assert {"train_loss", "test_error", "0.lr", "hypergradient.0.lr"} <= set(said["names"])
        assert said["listed"] == 50 and 0 < said["second"] <= 50
        assert said["seeds"] == sorted(said["seeds"], reverse=True) and said["seeds"][0] > 0
        assert said["found"] == 1
        assert {*said["claims"]} == {"no"}
        assert said["large"] > 1000 and said["closed"] and said["first"]
        assert said["width"] <= said["of"] == width  # there is nothing to the right
