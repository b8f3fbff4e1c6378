"""What Weights & Biases is given, read back from its offline files and compared with the store."""

import csv
import itertools
import json
import math
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from experiments import push_wandb
from experiments.config import Config, compose, resolve, run_hash
from experiments.logger import offline, push_results
from experiments.run import guarded
from experiments.store import RunStore
from experiments.train import Progress, train

Record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]

STACK = "Adam(0.001) / SGD(1e-5)"


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    offline.cache_clear()
    yield
    offline.cache_clear()


def config(store: Path, *overrides: str) -> Config:
    """Three epochs of 16 steps, recorded every 5."""
    fast = ["trainer.epochs=3", "trainer.compile=false", "trainer.compile_model=false"]
    fixed = ["data=mnist-5k", "device=cpu", "trainer.record_every=5", f"stack={STACK}"]
    named = ["experiment=table1", "preset=quick"]
    return resolve(compose([*named, *fixed, *fast, f"store={store}", *overrides]), "mnist-5k")


# Reading the files.


def records(path: Path) -> Iterator[Record]:
    """Those of an offline file: LevelDB's log, https://github.com/google/leveldb's log_format."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def read(store: Path, name: str = "*") -> list[dict[str, Any]]:
    """Each offline run of a store, in their order in time."""
    found = []
    for path in sorted(store.glob(f"{name}/wandb/offline-run-*/*.wandb")):
        run: dict[str, Any] = {"history": [], "summary": {}, "artifacts": [], "exit": None}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run["run"] = record.run
                update = record.run.config.update
                run["config"] = {item.key: json.loads(item.value_json) for item in update}
            elif kind == "history":
                run["history"].append(values(record.history.item))
            elif kind == "summary":
                run["summary"] |= values(record.summary.update)
            elif kind == "artifact":
                run["artifacts"].append(record.artifact)
            elif kind == "exit":
                run["exit"] = record.exit.exit_code
        found.append(run)
    return found


def values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def table(path: Path) -> dict[int, dict[str, float]]:
    with open(path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in rows}


def compare(history: list[dict[str, Any]], folder: Path) -> None:
    """Every number of the store's CSVs is in the history, and nothing else but times is."""
    expected = table(folder / "hyperparameters.csv")
    for name in ("hypergradients", "curves"):
        for step, row in table(folder / f"{name}.csv").items():
            expected[step] |= row
    own = ("_step", "_timestamp", "_runtime")
    assert [row["_step"] for row in history] == list(expected)
    found = {row["_step"]: {k: v for k, v in row.items() if k not in own} for row in history}
    assert found == expected


# A run.


def test_a_run_is_there_number_by_number(tmp_path: Path) -> None:
    summary = train(config(tmp_path, "logger=wandb", "row=the row"))
    (run,) = read(tmp_path)
    compare(run["history"], tmp_path / summary["hash"])
    assert {"hypergradient.0.lr", "hypergradient.0.beta1"} <= set(run["history"][0])
    assert run["history"][-1]["test_error"] == summary["test_error"]

    record = run["run"]
    assert record.run_id == summary["hash"] and record.display_name == "the row, seed 0"
    assert record.run_group == f"table1: {STACK}" and record.job_type == "seed 0"
    assert set(record.tags) == {"Adam", "height 1", "mnist-5k", "quick"}
    assert run["config"]["trainer"] == summary["trainer"]
    assert (run["config"]["stack"], run["config"]["height"]) == (STACK, 1)

    told = run["summary"]
    assert told["test_error"] == summary["test_error"] and told["diverged"] is False
    assert told["learned.0.lr"] == summary["hyperparameters"][0]["lr"]
    assert told["seconds_per_step"] == summary["provenance"]["seconds_per_step"]
    assert run["exit"] == 0


def test_a_diverged_run_is_a_finished_one(tmp_path: Path) -> None:
    train(config(tmp_path, "logger=wandb", "stack=SGD(1e42)"))
    (run,) = read(tmp_path)
    assert run["summary"]["diverged"] is True and math.isnan(run["summary"]["train_loss"])
    assert run["exit"] == 0


class Cut(Exception):
    """Stands for whatever ends a process."""


def cut_at(step: int) -> Any:
    def report(progress: Progress) -> None:
        if progress.step >= step:
            raise Cut

    return report


def test_a_run_that_fails_is_marked_and_goes_on_under_its_id(tmp_path: Path) -> None:
    broken = config(tmp_path, "logger=wandb")
    for step in (20, 40):  # in the second epoch, in the third
        with pytest.raises(Cut):
            train(broken, cut_at(step))
    summary = train(broken)
    first, second, third = sorted(read(tmp_path), key=lambda run: run["history"][0]["_step"])
    assert (first["exit"], second["exit"], third["exit"]) == (1, 1, 0)
    assert {run["run"].run_id for run in (first, second, third)} == {summary["hash"]}
    assert {run["run"].resume for run in (first, second, third)} == {True}
    every = first["history"] + second["history"] + third["history"]
    compare(every, tmp_path / summary["hash"])


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_whatever_fails_there_fails_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: str,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no such server\nand more")

    place = wandb if fails == "init" else wandb.Run
    monkeypatch.setattr(place, fails, fail)
    summary = train(config(tmp_path, "logger=wandb", "trainer.epochs=1"))
    assert summary["steps"] == 16
    said = capsys.readouterr().err
    assert said == "wandb failed and is left out of this run: no such server\n"


# What was done without it.


def push(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (f"store={store}", f"results={store / 'none'}")
    monkeypatch.setattr(sys, "argv", ["push_wandb", *options])
    assert guarded(push_wandb.main) == 0


def test_runs_are_replayed_once_with_their_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for store in ("live", "later"):
        logger = "wandb" if store == "live" else "csv"
        for seed in (0, 1):
            train(config(tmp_path / store, f"logger={logger}", f"seed={seed}"))
    unfinished = config(tmp_path / "later", "seed=2")
    with pytest.raises(Cut):
        train(unfinished, cut_at(20))

    push(tmp_path / "later", monkeypatch)
    said = capsys.readouterr()
    assert said.out == "2 of 2 runs and 0 artifacts are new there\n"
    assert f"wandb sync {tmp_path}/later/*/wandb/offline-run-* " in said.err
    assert said.err.count("\n") == 1
    for seed in (0, 1):
        name = run_hash(config(tmp_path, f"seed={seed}"))
        (live,), (later,) = (read(tmp_path / store, name) for store in ("live", "later"))
        compare(later["history"], tmp_path / "later" / name)
        for key in ("config", "exit"):
            assert later[key] == live[key]
        for field in ("run_id", "display_name", "run_group", "job_type", "tags"):
            assert getattr(later["run"], field) == getattr(live["run"], field)
        summary = RunStore(tmp_path / "later").summary(name) or {}
        ends = [row["_timestamp"] for row in later["history"] if "epoch" in row]
        assert ends == pytest.approx(summary["provenance"]["times"][1:], abs=1e-3)

    push(tmp_path / "later", monkeypatch)
    push(tmp_path / "live", monkeypatch)
    assert capsys.readouterr().out == "0 of 2 runs and 0 artifacts are new there\n" * 2
    assert len(read(tmp_path / "later")) == len(read(tmp_path / "live")) == 2


def test_tables_and_figures_are_artifacts_once(tmp_path: Path) -> None:
    results, store = tmp_path / "results", tmp_path / "store"
    results.mkdir()
    store.mkdir()
    for name in ("table1.csv", "table1_runs.csv", "figure2_cpu.csv"):
        (results / name).write_text(name)
    assert push_results(results, store, "hyperopt") == ["figure2", "table1"]
    (path,) = store.glob("wandb/offline-run-*/*.wandb")
    found = [r.artifact for r in records(path) if r.WhichOneof("record_type") == "artifact"]
    files = {a.name: sorted(entry.path for entry in a.manifest.contents) for a in found}
    assert files == {"figure2": ["figure2_cpu.csv"], "table1": ["table1.csv", "table1_runs.csv"]}
    assert push_results(results, store, "hyperopt") == []
    (results / "table1.csv").write_text("new")
    assert push_results(results, store, "hyperopt") == ["table1"]


def test_what_a_run_was_made_by_changes_it_not(tmp_path: Path) -> None:
    one = config(tmp_path)
    assert run_hash(replace(one, experiment=None, preset="paper", row="x")) == run_hash(one)


# The dashboard.


def test_the_dashboard_shows_what_runs_have(tmp_path: Path) -> None:
    """Its specification, without a server: every axis is a key of a real run."""
    dashboard = pytest.importorskip("experiments.dashboard")
    train(config(tmp_path, "logger=wandb"))
    (run,) = read(tmp_path)
    known = {"config": run["config"], "summary": run["summary"], "history": run["history"][-1]}
    view = dashboard.workspace("someone", "hyperopt")._to_model()
    spec = view.model_dump(by_alias=True, exclude_none=True)["spec"]["section"]
    sections = {each["name"]: each["panels"] for each in spec["panelBankConfig"]["sections"]}
    assert list(sections) == ["Error by height", "Learning rate over time", "Robustness"]
    shown = []
    for panel in itertools.chain(*sections.values()):
        chart = panel["config"]
        shown += [("config", chart["groupBy"].removesuffix(".value"))] if "groupBy" in chart else []
        where = "summary" if panel["viewType"] == "Bar Chart" else "history"
        shown += [(where, metric) for metric in chart.get("metrics", [])]
        axes = [chart[axis] for axis in ("xAxis", "yAxis", "zAxis") if ":" in chart.get(axis, "")]
        for axis in axes + [column["accessor"] for column in chart.get("columns", [])]:
            section, _, name = axis.partition(":")
            shown.append((section, name.removesuffix(".value")))
    assert len(shown) >= 12
    assert [(section, name) for section, name in shown if name not in known[section]] == []
