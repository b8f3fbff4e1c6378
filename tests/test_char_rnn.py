"""The character RNN: its grid, its whole command on a tiny text, its drawings, its samples."""

import csv
import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import running

from experiments import sample
from experiments.config.identity import run_hash
from experiments.config.resolve import resolve
from experiments.data import corpus
from experiments.records.archive import import_runs, read_records
from experiments.records.store import RunStore
from experiments.sample import Options
from experiments.studies import style
from experiments.studies.char_rnn.report import read_runs, verdicts
from experiments.studies.char_rnn.runs import (
    CELLS,
    LRS,
    ONCE,
    PRESETS,
    STUDY,
    WAVES,
    Cell,
    CharRnnPreset,
    cell_config,
    cell_of,
)
from experiments.training.trainer import train
from hyperopt import parse
from scripts import report

LINES = "to be or not to be, that is the question: whether 'tis nobler in the mind. " * 8


# The grid.


def test_the_grid_is_the_papers() -> None:
    """Plain Adam and the tower from three lrs, char-rnn's decay, a tower of lr and betas, and one
    that never stops."""
    assert LRS == (1e-4, 2e-3, 1e-2) and len(CELLS) == 9
    for kind in ("plain", "tower"):
        assert {cell.lr for cell in CELLS if cell.kind == kind} == set(LRS)
    assert {Cell("decay", 2e-3), Cell("betas", 2e-3), Cell("free", 1e-4)} < set(CELLS)
    tuned = {"decay": (), "plain": (), "tower": ("lr",), "betas": ("lr", "beta1", "beta2")}
    tuned["free"] = ("lr",)
    above = set()
    for cell in CELLS:
        config = cell_config(cell, 0, ())
        stack = parse(config.stack.notation or "")
        assert stack.levels[0].name == "Adam" and stack.levels[0].values["lr"] == cell.lr
        assert tuple(stack.levels[0].tuned) == tuned[cell.kind] or not stack.height
        assert stack.height == (1 if tuned[cell.kind] else 0)
        assert config.schedule.name == ("exponential" if cell.kind == "decay" else "constant")
        if cell.kind == "tower":
            above.add(str(stack.levels[1]))
    assert len(above) == 1, "the hyper-step size is the same from every start"


def test_the_paper_s_preset_has_one_seed_of_more_rows() -> None:
    """Adam above with a hundredth of the lr, from each of three; the log domain; Auto."""
    runs = running.planned(STUDY, "preset=paper")
    assert len(runs) == 3 * len(CELLS) + 5
    once = [(cell, config) for cell, config in runs if cell in ONCE]
    assert [(cell.kind, config.seed) for cell, config in once] == [
        *[("adam", 0)] * 3,
        *[("log", 0), ("auto", 0)],
    ]
    stacks = [config.stack.notation or "" for _, config in once]
    assert stacks[:3] == [str(parse(f"Adam({lr})[lr] / Adam({lr / 100:.4g})")) for lr in LRS]
    assert parse(stacks[3]).levels[0].tuned["lr"].domain.name == "log"
    assert parse(stacks[4]).levels[0].name == "ScheduleFreeAdam"
    for cell, config in runs:
        schedule: dict[str, Any] = {"schedule": {}} if cell.kind == "decay" else {}
        assert cell_of({"stack": config.stack.notation, **schedule}) == cell
    few = running.planned(STUDY, "preset=paper", "kinds=auto,log", "seeds=0")
    assert [cell.kind for cell, _ in few] == ["log", "auto"]


def test_the_setting_is_char_rnns() -> None:
    config = cell_config(CELLS[0], 0, PRESETS["paper"].overrides)
    model, trainer, schedule = config.model, config.trainer, config.schedule
    assert (model.name, model.hidden, model.layers) == ("char_rnn", 128, 2)
    assert (config.data.name, config.data.validation) == ("war_and_peace", False)
    assert (trainer.batch_size, trainer.sequence_length, trainer.epochs) == (50, 50, 50)
    assert trainer.clip_value == 5
    assert (schedule.factor, schedule.after, schedule.epochs) == (0.97, 10, 50)


def test_the_hashes_of_a_preset_are_stable() -> None:
    """Otherwise, the committed records would belong to other runs."""
    configs = [resolve(cell_config(c, 0, PRESETS["cpu"].overrides), "war_and_peace") for c in CELLS]
    assert run_hash(configs[0]) == "07f0c1c134852d1a"
    assert run_hash(configs[CELLS.index(Cell("plain", 1e-4))]) == "cd7f96c13469b221"
    assert len({run_hash(config) for config in configs}) == len(CELLS)


# The whole command, on a tiny text.


def results_of(folder: Path) -> Path:
    return folder / "results" / "char_rnn" / "cpu"


SHORT = (
    *("model.hidden=4", "trainer.batch_size=3", "trainer.sequence_length=9", "trainer.epochs=2"),
    *("trainer.record_every=5", "trainer.compile=false", "device=cpu", "progress=false"),
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A data root with 600 characters under the book's name."""
    root = tmp_path_factory.mktemp("data")
    (root / corpus.FILE).write_text(LINES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHA256", hashlib.sha256(LINES.encode()).hexdigest())
        yield root


def execute(folder: Path, lines: Path, *more: str, **how: Any) -> list[Cell]:
    """The command in this process, on a preset of 40 steps; returns the cells it has made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "cpu", CharRnnPreset(SHORT))
        arguments = ("preset=cpu", "seeds=0,1", f"data.root={lines}", *more)
        return [cell_of(run) for run in running.execute(STUDY, folder, *arguments, **how)]


@pytest.fixture(scope="module")
def done(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    assert execute(folder, lines) == [*CELLS, *CELLS]  # seed by seed
    return folder


def test_towers_change_only_what_they_tune(done: Path) -> None:
    moving = {"plain": [], "decay": ["0.lr"], "tower": ["0.lr"], "free": ["0.lr"]}
    for run in read_runs(results_of(done)):
        moved = [name for name in run.values.columns[1:] if run.values[name].nunique() > 1]
        assert moved == moving.get(run.cell.kind, ["0.lr", "0.beta1", "0.beta2"]), run.cell


def test_tables_are_drawn_from_the_records_alone(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(results_of(done) / "records", tmp_path / "cpu" / "records")
    saved = list[str]()

    def save(figure: Any, path: Path) -> list[Path]:
        saved.append(path.name)
        return []

    monkeypatch.setattr(style, "save", save)
    drawn = STUDY.draw(tmp_path / "cpu")
    assert {path.suffix for path in drawn} == {".csv", ".md", ".tex", ".json"}
    for path in drawn:
        assert path.read_bytes() == (results_of(done) / path.name).read_bytes(), path.name
    assert saved == ["figure"]
    assert all((results_of(done) / f"figure{suffix}").exists() for suffix in (".png", ".pdf"))


def test_the_table_states_its_setting_and_provenance(done: Path) -> None:
    text = (results_of(done) / "README.md").read_text()
    assert text.startswith("# Character RNN on War and Peace, preset cpu, 2 epochs; a reduced")
    with open(results_of(done) / "runs.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 18
    for line in table:
        summary = json.loads((done / "runs" / line["hash"] / "summary.json").read_text())
        assert float(line["test_perplexity"]) == summary["test_perplexity"]
        assert float(line["learned_lr"]) == summary["hyperparameters"][0]["lr"]
    decay = [float(line["test_perplexity"]) for line in table if line["kind"] == "decay"]
    mean, sd = pd.Series(decay).mean(), pd.Series(decay).std()
    assert f"| Adam, char-rnn's decay | 0.002 | {mean:.3f} ± {sd:.3f} |" in text
    assert text.count("| 2 |\n") == 9


def test_the_page_has_a_claim_for_each_start_and_every_run(done: Path) -> None:
    found = report.claims(done / "results")
    assert [claim.verdict in ("yes", "no") for claim in found] == [True] * 3
    assert {(claim.n, len(claim.runs.split())) for claim in found} == {(2, 4)}
    entries = report.run_entries(done / "results", done / "no-store")
    assert len(entries) == 18
    assert all("test_perplexity" in entry.curves for entry in entries)
    towers = [entry for entry in entries if "/" in entry.values["stack"]]  # not constant
    assert towers and all("0.lr" in entry.curves for entry in towers)


def test_the_sentences_on_towers_follow_from_the_runs(done: Path) -> None:
    """Made-up perplexities: the tower helps from two of three starts, most from the worst."""
    by_hand = {
        ("plain", 1e-4): 9.0,
        ("tower", 1e-4): 5.0,
        ("plain", 2e-3): 4.0,
        ("tower", 2e-3): 4.1,
        ("plain", 1e-2): 6.0,
        ("tower", 1e-2): 5.5,
    }
    runs = [
        replace(run, summary={**run.summary, "test_perplexity": perplexity})
        for run in read_runs(results_of(done))
        if (perplexity := by_hand.get((run.cell.kind, run.cell.lr)))
    ]
    said = verdicts(runs)
    assert "no worse than the plain run's from 2 of 3 starts" in said[0]
    assert said[1] == "From lr 0.002 it differs, seed by seed, by +0.100, +0.100."
    assert "From the worst start, lr 0.0001, it closes 80 % of the gap" in said[2]
    (place, tower) = next((i, run) for i, run in enumerate(runs) if run.cell == Cell("tower", 1e-2))
    negative = replace(tower, values=tower.values.assign(**{"0.lr": -1e-9}))
    runs[place] = negative
    assert len(said) == 3 and "lr fell to 0 or below in 1 towers" in verdicts(runs)[3]
    runs[place] = replace(tower, summary={**tower.summary, "diverged": True})
    assert "from 1 of 3 starts" in verdicts(runs)[0]
    runs = [replace(run, summary={**run.summary, "diverged": run.cell.lr == 1e-2}) for run in runs]
    assert "from 1 of 2 starts" in verdicts(runs)[0]  # from the third both have diverged


def test_finished_runs_are_recorded_and_not_repeated(
    done: Path, lines: Path, tmp_path: Path
) -> None:
    """Stop in the second wave, and continue elsewhere from the records only."""
    (here := tmp_path / "here").mkdir()
    n = len(WAVES[0]) + 2
    assert execute(here, lines, stop_after=n, draw=False) == list(CELLS[:n])
    assert len(read_records(results_of(here) / "records")) == n
    (there := tmp_path / "there").mkdir()
    (here / "results").rename(there / "results")
    assert execute(there, lines, "start=records", draw=False) == [*CELLS[n:], *CELLS]
    texts = [
        {
            name: files["curves.csv"]
            for name, files in read_records(results_of(folder) / "records").items()
        }
        for folder in (there, done)
    ]
    assert texts[0] == texts[1]


def test_runs_on_another_edition_are_kept_apart(done: Path, lines: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "results", tmp_path / "results")
    before = running.written(results_of(tmp_path))
    (tmp_path / corpus.FILE).write_text(LINES + LINES)
    assert execute(tmp_path, tmp_path, stop_after=1, draw=False) == [CELLS[0]]
    assert running.written(results_of(tmp_path)) == before
    (other,) = (tmp_path / "results" / "char_rnn").glob("cpu-war_and_peace-*/records")
    assert len(read_records(other)) == 1


# Samples.


def run_of(done: Path, kind: str = "plain", lr: float = 1e-2) -> Options:
    for path in (done / "runs").glob("*/summary.json"):
        if cell_of(json.loads(path.read_text())) == Cell(kind, lr):
            return Options(run=path.parent.name, store=str(done / "runs"), start="to ")
    raise AssertionError


def test_a_sample_continues_its_start(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = replace(run_of(done), length="40")
    text = sample.sample(options)
    assert text.startswith("to ") and len(text) == 43 and set(text) <= set(LINES)
    assert sample.sample(options) == text
    assert sample.sample(replace(options, seed="1")) != text
    with pytest.MonkeyPatch.context() as patch:
        words = [f"{name}={getattr(options, name)}" for name in ("run", "store", "start", "length")]
        patch.setattr(sys, "argv", ["sample", *words])
        assert sample.main() == 0
    assert capsys.readouterr().out == text + "\n"


def test_a_trained_model_writes_its_text(lines: Path, tmp_path: Path) -> None:
    """After training on one repeated line, samples at a low temperature are that line."""
    small = ("model.hidden=64", "model.layers=1", "trainer.epochs=15")
    places = (f"data.root={lines}", f"store={tmp_path}")
    config = cell_config(Cell("plain", 1e-2), 0, (*SHORT, *small, *places))
    summary = train(resolve(config, "war_and_peace"))
    assert summary["train_loss"] < 0.1
    options = Options(run=summary["hash"], store=str(tmp_path), start="to be or ", length="60")
    text = sample.sample(replace(options, temperature="0.1"))
    assert text in LINES
    assert sample.sample(replace(options, temperature="100")) not in LINES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": ""}, "run= is not set; give the hash"),
        ({"run": "0" * 16}, "run 0000000000000000 is not finished in"),
        ({"temperature": "0"}, "temperature=0 must be above 0"),
        ({"temperature": "warm"}, "temperature='warm' is not a number"),
        ({"length": "1.5"}, "length='1.5' is not a whole number"),
        ({"seed": "-1"}, "seed=-1 must be 0 or more"),
        ({"start": "to é"}, "start='to é' has 'é'; give one or more of the characters"),
        ({"start": ""}, "start='' is empty; give one or more"),
    ],
)
def test_a_bad_option_of_a_sample_gets_one_clear_line(
    done: Path, change: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        sample.sample(replace(run_of(done), **change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_from_records_has_no_weights(done: Path, tmp_path: Path) -> None:
    options = run_of(done)
    import_runs(results_of(done) / "records", RunStore(tmp_path))
    with pytest.raises(ValueError, match="has no weights in"):
        sample.sample(replace(options, store=str(tmp_path)))
