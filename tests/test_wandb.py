"""Compare the records on Weights & Biases, read from its offline files, with the store."""

import csv
import hashlib
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_suite
import test_text
import wandb
from gate import Gate
from wandb.proto import wandb_internal_pb2
from wandb_server import KEY, Server, serve

from experiments.cli import guarded
from experiments.config.compose import compose
from experiments.config.identity import identity, run_hash
from experiments.config.resolve import resolve
from experiments.config.schema import Config
from experiments.data import corpus
from experiments.records import push_wandb
from experiments.records.loggers.logger import made_by
from experiments.records.loggers.wandb import (
    describe,
    has_key,
    metric,
    mode,
    push_results,
    read_note,
    say_how_to_sync,
)
from experiments.records.store import RunDirectory, RunStore
from experiments.records.tidy import JUDGED_BY
from experiments.training.trainer import Progress, train

Record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]

STACK = "Adam(0.001) / SGD(1e-5)"
START = {"0.lr": 0.001, "0.beta1": 0.9, "0.beta2": 0.999}


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    has_key.cache_clear()
    yield
    has_key.cache_clear()


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
    """Every number of the store's CSVs is in the history, and beside it only times and step 0."""
    expected = table(folder / "hyperparameters.csv")
    start = {**next(iter(expected.values())), **START, "step": 0.0}  # the others are constant
    for name in ("hypergradients", "curves"):
        for step, row in table(folder / f"{name}.csv").items():
            expected[step] |= row
    expected = {
        step: {metric(name): value for name, value in row.items()}
        for step, row in {0: start, **expected}.items()
    }
    own = ("_step", "_timestamp", "_runtime")
    assert [row["_step"] for row in history] == list(expected)
    found = {row["_step"]: {k: v for k, v in row.items() if k not in own} for row in history}
    assert found == expected


# A run.


def test_every_number_of_a_run_is_logged(tmp_path: Path) -> None:
    summary = train(config(tmp_path, "logger=wandb", "row=the row"))
    (run,) = read(tmp_path)
    compare(run["history"], tmp_path / summary["hash"])
    assert {"hypergradient_level0_lr", "hypergradient_level0_beta1"} <= set(run["history"][1])
    assert all(re.fullmatch(r"[_a-zA-Z]\w*", name, re.ASCII) for name in run["history"][-1])
    assert run["history"][-1]["test_error"] == summary["test_error"]

    record = run["run"]
    assert record.run_id == summary["hash"] and "the row, mlp on mnist" in record.display_name
    assert record.run_group.startswith(f"table1: {STACK}, ") and record.job_type == "seed 0"
    assert set(record.tags) >= {"Adam", "height 1", "mnist-5k", "quick"}
    assert run["config"]["trainer"] == summary["trainer"]
    assert (run["config"]["stack"], run["config"]["height"]) == (STACK, 1)

    told = run["summary"]
    assert told["test_error"] == summary["test_error"] and told["diverged"] is False
    assert told["learned_level0_lr"] == summary["hyperparameters"][0]["lr"]
    assert told["seconds_per_step"] == summary["provenance"]["seconds_per_step"]
    assert run["exit"] == 0


def test_a_diverged_run_is_a_finished_one(tmp_path: Path) -> None:
    train(config(tmp_path, "logger=wandb", "stack=SGD(1e42)"))
    (run,) = read(tmp_path)
    assert run["summary"]["diverged"] is True and math.isnan(run["summary"]["train_loss"])
    assert run["exit"] == 0


class Cut(Exception):
    """Stands for any end of a process."""


def cut_at(step: int) -> Any:
    def report(progress: Progress) -> None:
        if progress.step >= step:
            raise Cut

    return report


def test_offline_an_interrupted_run_is_complete_in_one_file(tmp_path: Path) -> None:
    broken = config(tmp_path, "logger=wandb")
    for step in (20, 40):  # in the second epoch, in the third
        with pytest.raises(Cut):
            train(broken, cut_at(step))
    assert read(tmp_path) == []
    summary = train(broken)
    (run,) = read(tmp_path)
    assert run["exit"] == 0 and run["run"].run_id == summary["hash"]
    compare(run["history"], tmp_path / summary["hash"])


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_errors_of_wandb_fail_no_run(
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


def test_without_a_key_there_is_no_prompt_and_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # which forgets what mode there was
    assert mode() == "offline"
    assert capfd.readouterr() == ("", "")
    wandb.teardown()


# With a server, on the loopback address.


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HYPEROPT_COMMAND", tmp_path.name)
    wandb.teardown()
    with serve() as (known, url):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield known
        wandb.teardown()


def each_once(server: Server, folder: Path) -> None:
    """The server has received each row exactly once."""
    assert server.steps(folder.name) == [0, *table(folder / "hyperparameters.csv")]
    assert len(server.received[folder.name]) == len(server.steps(folder.name))
    compare([json.loads(json.dumps(row)) for row in server.runs[folder.name]["history"]], folder)


def test_the_server_reports_its_rows(tmp_path: Path, server: Server) -> None:
    summary = train(config(tmp_path, "logger=wandb"))
    each_once(server, tmp_path / summary["hash"])
    there = server.runs[summary["hash"]]
    assert there["exit"] == 0 and there["summary"]["test_error"] == summary["test_error"]
    note = read_note(RunStore(tmp_path).run(summary["hash"]))
    assert note == {"state": "finished", "run": f"someone/hyperopt/{summary['hash']}"}


def test_an_interrupted_run_continues_on_the_server(tmp_path: Path, server: Server) -> None:
    wanted = config(tmp_path, "logger=wandb")
    for step in (20, 40):
        with pytest.raises(Cut):
            train(wanted, cut_at(step))
    summary = train(wanted)
    each_once(server, tmp_path / summary["hash"])
    assert server.runs[summary["hash"]]["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL]
)
def test_a_killed_run_has_each_step_once(tmp_path: Path, server: Server, number: int) -> None:
    """Kill it when the server has the rows of one epoch, during the next epoch."""
    gate = Gate(tmp_path / "gate", at=2)
    store = tmp_path / "store"
    fixed = ("data=mnist-5k", "device=cpu", "trainer.record_every=5", "logger=wandb")
    fast = ("trainer.epochs=4", "trainer.compile=false", "trainer.compile_model=false")
    command = [sys.executable, "-m", "experiments.run", *fixed, *fast, f"store={store}"]
    command += [f"stack={STACK}", "progress=false"]
    process = subprocess.Popen(command, env={**os.environ, **gate.environment})
    # The client keeps the last row of an epoch until the next one comes.
    wait_for(lambda: any(len(server.steps(name)) == 4 for name in server.runs))
    (folder,) = (path.parent for path in store.glob("*/config.json"))
    wait_for(lambda: gate.waits(folder.name))
    process.send_signal(number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
    assert not (folder / "summary.json").exists()
    assert server.steps(folder.name)[:4] == [0, 5, 10, 15]
    if number == signal.SIGTERM:
        assert server.runs[folder.name]["state"] in ("preempted", "crashed")
    again = subprocess.run(command, timeout=300)
    assert again.returncode == 0 and read_note(RunDirectory(folder))["state"] == "finished"
    each_once(server, folder)


def test_rows_lost_by_the_server_are_pushed(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run counts as uploaded only if the server confirms it."""
    monkeypatch.setattr("experiments.records.loggers.wandb.ASKING", 0.01)
    server.room = 4
    summary = train(config(tmp_path, "logger=wandb"))
    directory = RunStore(tmp_path).run(summary["hash"])
    assert len(server.steps(summary["hash"])) == 4
    assert read_note(directory)["state"] == "incomplete"
    server.room = None
    push(tmp_path, monkeypatch)
    assert capsys.readouterr().out == "pushed 1 of 1 runs and 0 artifacts\n"
    each_once(server, directory.path)
    push(tmp_path, monkeypatch)
    assert capsys.readouterr().out == "pushed 0 of 1 runs and 0 artifacts\n"


def test_an_unreachable_server_is_tried_once(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Training does not wait; the rows are pushed later."""
    monkeypatch.setattr("experiments.records.loggers.wandb.PROBE", 1.0)
    server.delay = 30.0
    moments: list[float] = []
    began = time.monotonic()
    for seed in range(3):
        wanted = config(tmp_path, "logger=wandb", f"seed={seed}")
        train(wanted, lambda progress: moments.append(time.monotonic()))
    assert server.attempts == ["/"]
    assert moments[0] < began + 5 and time.monotonic() < began + 30
    said = capfd.readouterr().err
    assert said.count("does not answer; the rows are kept; to send them: python -m") == 1
    server.delay = 0.0
    monkeypatch.setenv("HYPEROPT_COMMAND", "another")
    push(tmp_path, monkeypatch)
    assert capfd.readouterr().out == "pushed 3 of 3 runs and 0 artifacts\n"
    for path in tmp_path.glob("*/summary.json"):
        each_once(server, path.parent)


def test_the_environment_variables_of_wandb_work(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"PROJECT": "theirs", "ENTITY": "team", "TAGS": "a,b", "RUN_GROUP": "mine"}
    for name, value in {**given, "DIR": str(tmp_path / "dir")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "dir").mkdir()
    name = train(config(tmp_path / "store", "logger=wandb", "trainer.epochs=1"))["hash"]
    there = server.runs[name]
    assert (there["project"], there["entity"], there["group"]) == ("theirs", "team", "mine")
    assert {"a", "b", "Adam", "mlp"} <= set(there["tags"])
    assert not (tmp_path / "store" / name / "wandb").exists()
    assert any((tmp_path / "dir" / "wandb").iterdir())
    own = config(tmp_path / "store", "logger=wandb", "trainer.epochs=1", "logger.project=own")
    train(replace(own, seed=1))
    assert {run["project"] for run in server.runs.values()} == {"theirs", "own"}


def test_disabled_sends_nothing_and_marks_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    name = train(config(tmp_path, "logger=wandb", "trainer.epochs=1"))["hash"]
    assert server.attempts == [] and not (tmp_path / name / "wandb.json").exists()
    monkeypatch.setenv("WANDB_MODE", "online")
    push(tmp_path, monkeypatch)
    each_once(server, tmp_path / name)


def test_offline_prints_the_reason(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config(tmp_path, "logger=wandb", "trainer.epochs=1"))
    say_how_to_sync(tmp_path)
    assert "WANDB_MODE is offline, so its files are kept here" in capfd.readouterr().err
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()  # which forgets what mode there was
    push(tmp_path, monkeypatch)  # and the file goes, which would bring them a second time
    (path,) = tmp_path.glob("*/summary.json")
    each_once(server, path.parent)
    assert not any(tmp_path.glob("*/wandb/offline-run-*"))


def test_runs_that_differ_are_told_apart() -> None:
    """Runs differ in name, group and tags; runs with different seeds differ in the name only."""
    base = config(Path("runs"))
    others = ["trainer.epochs=4", "trainer.batch_size=8", "model=softmax"]
    others += [
        "stack=Adam(0.001) / SGD(2e-5)",
        "stack=SGD(0.1)",
        "trainer.l2=0.1",
        "data.shuffle=false",
    ]
    runs = [base, *(config(Path("runs"), other) for other in others)]
    told = [describe(run_hash(run), identity(run), made_by(run)) for run in runs]
    for key in ("name", "group", "tags"):
        assert len({str(one[key]) for one in told}) == len(runs)
    again = replace(base, seed=1)
    other = describe(run_hash(again), identity(again), made_by(again))
    assert other["name"] != told[0]["name"]
    assert (other["group"], other["tags"]) == (told[0]["group"], told[0]["tags"])
    assert "row" not in told[0]["config"]  # what is not set is left out
    assert all(len(one["name"]) <= 128 and len(one["group"]) <= 128 for one in told)


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, "it took too long"
        time.sleep(0.1)


# Runs done without it.


def push(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = store.with_name("none")
    results.mkdir(exist_ok=True)
    options = (f"store={store}", f"results={results}")
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
    assert said.out == "pushed 2 of 2 runs and 0 artifacts\n"
    # The pattern of artifacts matches nothing, which wandb sync would refuse.
    assert said.err.endswith(f" wandb sync {tmp_path}/later/*/wandb/offline-run-*\n")
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
    assert capsys.readouterr().out == "pushed 0 of 2 runs and 0 artifacts\n" * 2
    assert len(read(tmp_path / "later")) == len(read(tmp_path / "live")) == 2


def test_tables_and_figures_are_artifacts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, store = tmp_path / "results", tmp_path / "store"
    store.mkdir()
    for name in ("table1/paper/table.csv", "table1/paper/runs.csv", "figure2/cpu/table.csv"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(name)
    assert push_results(results, store, "hyperopt") == ["figure2", "table1"]
    say_how_to_sync(store)
    assert capsys.readouterr().err.endswith(f" wandb sync {store}/wandb/offline-run-*\n")
    (path,) = store.glob("wandb/offline-run-*/*.wandb")
    found = [r.artifact for r in records(path) if r.WhichOneof("record_type") == "artifact"]
    files = {a.name: sorted(entry.path for entry in a.manifest.contents) for a in found}
    assert files == {
        "figure2": ["cpu/table.csv"],
        "table1": ["paper/runs.csv", "paper/table.csv"],
    }
    assert push_results(results, store, "hyperopt") == []
    (results / "table1/paper/table.csv").write_text("new")
    assert push_results(results, store, "hyperopt") == ["table1"]


def test_the_experiment_of_a_run_does_not_change_it(tmp_path: Path) -> None:
    one = config(tmp_path)
    assert run_hash(replace(one, experiment=None, preset="paper", row="x")) == run_hash(one)


# The dashboard.


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, dict[str, Any]]]:
    """W&B's data of a run of each task, and of a run whose momentum moves."""
    monkeypatch.setattr(corpus, "SHA256", hashlib.sha256(test_text.TINY.encode()).hexdigest())
    (tmp_path / corpus.FILE).write_text(test_text.TINY)
    train(config(tmp_path / "images", "logger=wandb"))
    train(test_text.config(tmp_path, tmp_path / "text", test_text.TOWER, "logger=wandb"))
    small = "trainer.steps=4", "trainer.record_every=1", "logger=wandb"
    train(test_suite.config(tmp_path / "problem", "change", "stack=SGD(0.1) / SGD(1e-4)", *small))
    moving = "stack=SGD(0.1, momentum=0.9)[lr, momentum] / SGD(1e-4)"
    train(config(tmp_path / "momentum", "logger=wandb", "trainer.epochs=1", moving))
    runs = [read(tmp_path / folder)[0] for folder in ("images", "text", "problem", "momentum")]
    return [{**run, "history": run["history"][-1]} for run in runs]


def shown(panel: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The data of a panel, as (config, summary or history, key)."""
    chart = panel["config"]
    if "groupBy" in chart:
        yield "config", chart["groupBy"].removesuffix(".value")
    for name in chart.get("metrics", []):
        yield "summary" if panel["viewType"] == "Bar Chart" else "history", name
    for column in chart.get("columns", []):
        section, _, name = column["accessor"].partition(":")
        yield section, name.removesuffix(".value")
    for query in chart.get("userQuery", {}).get("queryFields", []):
        for source in query["fields"]:
            for argument in source.get("args", []):
                for name in argument["value"]:
                    yield source["name"], name


def test_the_dashboard_shows_what_runs_have(known: list[dict[str, dict[str, Any]]]) -> None:
    """Check the specification without a server: a real run has all data of the panels."""
    dashboard = pytest.importorskip("experiments.records.dashboard")
    assert tuple(dashboard.MEASURES) == JUDGED_BY
    view = dashboard.workspace("someone", "hyperopt")._to_model()
    spec = view.model_dump(by_alias=True, exclude_none=True)["spec"]["section"]
    sections = {each["name"]: each["panels"] for each in spec["panelBankConfig"]["sections"]}
    told = {panel["config"]["chartTitle"] for panel in sections["Over training, by height"]}
    assert told >= {"lr by height", "momentum by height", "Training loss by height"}
    told = {panel["config"]["chartTitle"] for panel in sections["Over training, by start"]}
    assert told >= {"lr by start", "momentum by start", "Training loss by start"}
    every = [list(shown(panel)) for panel in itertools.chain(*sections.values())]
    assert all(every) and sum(map(len, every)) >= 24
    for keys in every:
        assert any(all(name in run[section] for section, name in keys) for run in known), keys
    for run, measure in zip(known[:-1], JUDGED_BY, strict=True):  # as the server has all kinds
        own = {name for keys in every for section, name in keys if name in run[section]}
        assert {
            measure,
            "train_loss",
            "level0_lr",
            "hypergradient_level0_lr",
            "learned_level0_lr",
        } <= own


def test_the_heat_map_is_uploaded_and_its_panels_fill_it(
    known: list[dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard = pytest.importorskip("experiments.records.dashboard")
    made: list[dict[str, Any]] = []

    class Server:
        def create_custom_chart(self, **chart: Any) -> None:
            made.append(chart)
            if len(made) > 1:
                raise wandb.Error("it is there\nalready")

    class Saved:
        url = "https://wandb.ai/someone"

    monkeypatch.setattr(wandb, "Api", Server)
    monkeypatch.setattr(dashboard, "offline", lambda: False)
    monkeypatch.setattr(dashboard.workspaces.Workspace, "save", lambda view: Saved)
    monkeypatch.setattr(sys, "argv", ["dashboard", "entity=someone"])
    assert guarded(dashboard.main) == guarded(dashboard.main) == 0

    fields = set(re.findall(r"\$\{field:(\w+)\}", json.dumps(made[0]["spec"])))
    robustness = dashboard.workspace("someone", "hyperopt").sections[-1].panels
    maps = [panel for panel in robustness if hasattr(panel, "chart_fields")]
    for heat_map, run in zip(maps, known[:-1], strict=True):
        assert heat_map.chart_name == f"someone/{made[0]['name']}"
        assert heat_map.chart_fields.keys() == fields
        query = {source: asked["keys"] for source, asked in heat_map.query.items()}
        names = itertools.chain(*query.values())
        assert sorted(heat_map.chart_fields.values()) == sorted(names)
        assert all(name in run[source] for source, keys in query.items() for name in keys)
