"""Sweeps from the command line: the pool and other launchers, the final report, means."""

import csv
import importlib
import inspect
import io
import json
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_project import ROOT
from test_readme import SUMMARISE

from experiments import run, summarise
from experiments.cli import guarded
from experiments.config.command import command_of
from experiments.config.compose import compose
from experiments.config.identity import run_hash
from experiments.config.overrides import protect_notation
from experiments.config.resolve import resolve
from experiments.execution.pool import use_gpu
from experiments.execution.sweep import hold
from experiments.records.store import RunDirectory
from experiments.records.tidy import read_summaries, tidy, tidy_csv
from experiments.studies.catalog import find, names
from experiments.studies.study import Part, Study, train_and_archive, train_and_list
from experiments.training.trainer import train
from hyperopt import Adam, parse

EAGER = ("trainer.compile=false", "trainer.compile_model=false", "trainer.epochs=1")
FIXED = (*EAGER, "data=mnist-5k", "device=cpu", "progress=false", "workers=2")

Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """A main function with its command line, in this process."""

    def call(main: Callable[[], int], *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # which the command sets
        return guarded(main)

    return call


def lines(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_failed_run_is_listed_and_the_same_command_repeats_it(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ("-m", "seed=0,1,2", "stack=SGD(0.1) / SGD(0.01)", *FIXED, f"store={tmp_path}")
    config = compose([*FIXED, "seed=1", "stack=SGD(0.1) / SGD(0.01)"])
    in_its_place = tmp_path / run_hash(resolve(config, "mnist-5k"))
    in_its_place.write_text("no folder")

    assert command(run.main, *sweep) == 1
    said = capsys.readouterr()
    alone = command_of(resolve(replace(config, store=str(tmp_path)), "mnist-5k"))
    assert said.err == (
        f"\n1 run failed: [Errno 17] File exists: '{in_its_place}'\n"
        f"To run it alone:\n    {alone}\n\n3 runs: 2 finished, 1 failed, 0 not started.\n"
    )
    *_, last = said.out.splitlines()
    some = Path(last.removeprefix("The tidy CSV of 2 runs is ")).read_text()

    in_its_place.unlink()
    assert command(run.main, *shlex.split(alone)[3:], "progress=false") == 0
    assert f"{tmp_path}/{in_its_place.name}" in capsys.readouterr().out
    assert command(run.main, *sweep) == 0
    said = capsys.readouterr()
    assert said.err == "\n3 runs: 3 finished, 0 failed, 0 not started.\n"
    assert len(said.out.splitlines()) == 4
    whole = Path(said.out.splitlines()[-1].removeprefix("The tidy CSV of 3 runs is ")).read_text()
    assert [line["seed"] for line in lines(whole)] == ["0", "1", "2"]
    assert set(some.splitlines()) < set(whole.splitlines())
    assert not (tmp_path / ".sweep").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.long)]
)
def test_another_launcher_writes_the_same_csv_and_lists_what_fails(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    configs = [
        resolve(compose([*FIXED, f"seed={seed}", f"store={tmp_path / 'here'}"]), "mnist-5k")
        for seed in (0, 1)
    ]
    store = tmp_path / "store"
    sweep = ("-m", "seed=0,1", *FIXED, f"hydra/launcher={launcher}", f"store={store}")
    store.mkdir()
    (store / run_hash(configs[1])).write_text("no folder")
    assert command(run.main, *sweep, "progress=true") == 1
    said = capsys.readouterr()
    assert "1 runs are finished" in said.err or "1 running" in said.err
    assert said.err.count("1 run failed: [Errno 17] File exists") == 1
    assert "2 runs: 1 finished, 1 failed, 0 not started.\n" in said.err
    assert "Error executing" not in said.err
    path = Path(said.out.splitlines()[-1].removeprefix("The tidy CSV of 1 runs is "))
    assert path.read_text() == tidy_csv([train(configs[0])])


@pytest.mark.long
def test_a_search_receives_the_training_loss(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3")
    space = ("stack.rule=Adam", "stack.height=0", "stack.lr=tag(log, interval(1e-4, 1e-1))")
    assert command(run.main, "-m", *search, *space, *FIXED, f"store={tmp_path}") == 0
    found = read_summaries(tmp_path)
    best = min(found, key=lambda summary: summary["train_loss"])
    said = capsys.readouterr().out
    assert f"The smallest training loss, {best['train_loss']:.4f}, is that of" in said
    assert best["hash"] in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stack.rule=SGD,SDG", "error: there is no rule 'SDG'; did you mean 'SGD'?"),
        ("model=mlp,mpl", "error: there is no model 'mpl'; did you mean mlp?"),
        ("trainer.epoch=1,2", "error: there is no config key 'trainer.epoch'; did you mean tra"),
        ("stack.lr=interval(0.1,1)", "INTERVAL_SWEEP; give hydra/sweeper=optuna"),
        (
            "stack=SGD,Adam",
            "no stack 'SGD'; give each rule its learning rate, as in stack='SGD(0.01)'",
        ),
        ("stack=sgd/Adam", "as in stack='SGD(0.01) / Adam(0.0001)', or give all levels one rule"),
        ("stack.height=0,one", "height=one: Value 'one' of type 'str' could not"),
        ("hydra/launcher=jobli", "Could not find 'hydra/launcher/jobli'; did you mean joblib?"),
        ("stack=", "Could not find 'stack/'; known are notation, tower\n"),
        ("hydra/lancher=joblib", "no config key 'hydra/lancher'; did you mean hydra/launcher"),
        ("store=a,b", "error: store=a,b, but a sweep has one value of store; give a command for"),
        ("workers=1,2", "workers=1,2, but a sweep has one value of workers"),
        ("store=''", "error: store= is empty; give the folder of the runs, as in store=runs"),
        ("seed=range(0,0)", "error: the sweep has no runs"),
        ("hydra.sweeper.max_batch_sise=2", "in 'BasicSweeperConf'; did you mean max_batch_size?"),
    ],
)
def test_a_mistyped_sweep_prints_an_error_and_does_nothing(
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    fixed = [one for one in (*FIXED, f"store={tmp_path}") if one[:4] != override[:4]]
    assert command(run.main, "-m", override, *fixed) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""
    assert not list(tmp_path.glob("*/config.json"))


@pytest.mark.parametrize("seeds", ["0,1", "0,-1"], ids=["two runs", "none begun"])
def test_a_sweeps_folder_of_notes_loses_nothing_else(
    tmp_path: Path, command: Command, seeds: str
) -> None:
    (mine := tmp_path / "my folder").mkdir()
    (mine / "thesis.txt").write_text("x")
    notes = f"hydra.sweep.dir='{mine}'"
    expected = 2 if "-1" in seeds else 0
    assert command(run.main, "-m", f"seed={seeds}", *FIXED, f"store={tmp_path}", notes) == expected
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "override", ["seed=0,1,2", "seed=range(0,2)", "stack=SGD(0.1),SGD(0.2)", "model=mlp,softmax"]
)
def test_a_sweep_without_m_says_so(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert command(run.main, override, *FIXED, f"store={tmp_path}") == 2
    said = capsys.readouterr().err
    assert "give -m, as in: experiments.run -m" in said and said.count("\n") == 1


def test_a_batch_larger_than_the_data_is_an_error(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = (*FIXED, f"store={tmp_path}")
    assert command(run.main, "trainer.batch_size=4001", *fixed) == 2
    told = "error: trainer.batch_size=4001 is more than the 4000 training images of mnist-5k"
    assert told in capsys.readouterr().err
    assert command(run.main, "trainer.batch_size=4000", *fixed) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("seed=3", "stack.rule=Adam", "stack.height=2", "stack.lr=1e-5"),
        ("experiment=table1", "stack=SGD(0.01) / SGD(0.01)", """row='a "b", c'""", "store='x y'"),
        ("experiment=figure2", "schedule=cosine", "data.augment=true", "trainer.steps=7"),
        ("experiment=char_rnn_tower", "data.root=/x"),
        ("schedule=replay", "schedule.file=a-b.csv", "stack=SGD(0.1)"),
        ("schedule.name=steps", "schedule.milestones=[0.1,0.3]", "schedule.factor=0.5"),
    ],
)
def test_the_command_of_a_run_asks_for_it(overrides: tuple[str, ...]) -> None:
    config = compose(overrides)
    python, m, module, *words = shlex.split(command_of(config))
    assert (python, m, module) == ("python", "-m", "experiments.run")
    again = compose(words)
    assert replace(again, experiment=None) == replace(config, experiment=None)


def test_the_next_sweep_removes_a_killed_sweep_s_folder(tmp_path: Path, command: Command) -> None:
    """It keeps folders that another sweep holds, and all other folders."""
    notes = tmp_path / ".sweep"
    for name in ("18ed-1", "18ed-2", "mine"):
        hold(notes / name)()
        (notes / name / "job-000000.json").write_text("{}")
    release = hold(notes / "18ed-2")
    assert command(run.main, "-m", "seed=0", *FIXED, f"store={tmp_path}") == 0
    assert {path.name for path in notes.iterdir()} == {"18ed-2", "mine"}
    release()
    assert command(run.main, "-m", "seed=0", *FIXED, f"store={tmp_path}") == 0
    assert {path.name for path in notes.iterdir()} == {"mine"}


def test_each_gpu_has_its_own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for gpus in (0, 1, 3):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        for number in range(5):
            use_gpu(number)
    assert used == [0, 1, 2, 0, 1]


# Reports on finished runs.


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    stacks = ("SGD(0.1)", "SGD(0.1) / SGD(0.01)", "Adam(1e42)")
    configs = [
        resolve(compose([*FIXED, f"stack={stack}", f"seed={seed}", f"store={folder}"]), "mnist-5k")
        for stack in stacks
        for seed in (0, 1)
    ]
    for config in configs:
        train(config)
    return folder


def test_the_tidy_csv_has_a_line_for_each_run(store: Path) -> None:
    summaries = read_summaries(store)
    found = {line["hash"]: line for line in lines(tidy_csv(summaries))}
    assert len(found) == 6
    for summary in summaries:
        line = found[summary["hash"]]
        assert line["stack"] == summary["stack"] and line["seed"] == str(summary["seed"])
        assert float(line["test_error"]) == summary["test_error"]
        assert line["trainer.batch_size"] == "256" and line["device"] == "cpu"
    (tower,) = [line for line in found.values() if "/" in line["stack"] and line["seed"] == "1"]
    assert (tower["stack.rule"], tower["stack.height"]) == ("SGD", "1")
    assert (tower["0.lr"], tower["1.lr"]) == ("0.1", "0.01")
    learned = {name for name, value in tower.items() if name.startswith("learned.") and value}
    assert learned == {"learned.0.lr"} and float(tower["learned.0.lr"]) != 0.1
    (wild, _) = [line for line in found.values() if line["stack.rule"] == "Adam"]
    assert wild["diverged"] == "True" and wild["train_loss"] == wild["1.lr"] == ""


def test_the_tidy_csv_has_the_constants_of_the_run(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if defaults have changed since; a schedule's final values are not initial values."""
    before = tidy_csv(summaries := read_summaries(store))
    for name, default in (("eps", 1e-3), ("weight_decay", 0.5)):
        changed = replace(Adam.hypers[name], default=default)
        monkeypatch.setattr(Adam, name, changed)
        monkeypatch.setattr(Adam, "hypers", {**Adam.hypers, name: changed})
    assert parse("Adam(1.0)").levels[0].values["eps"] == 1e-3
    assert tidy_csv(summaries) == before
    (summary, *_) = (s for s in summaries if s["stack"] == "SGD(0.1)")
    scheduled = {**summary, "schedule": {"name": "cosine"}, "hyperparameters": [{"lr": 0.0}]}
    assert tidy(scheduled)["0.lr"] == 0.1


def test_means_are_over_all_columns_not_named(
    store: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(summarise.main, f"store={store}") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["stack", "n", "diverged", "test_error", "train_loss"]
    assert len(rows) == 3
    for row, stack in zip(rows, ("Adam(1e+42)", "SGD(0.1)", "SGD(0.1) / SGD(0.01)"), strict=True):
        errors = [s["test_error"] for s in read_summaries(store) if s["stack"] == stack]
        mean, sd = statistics.mean(errors), statistics.stdev(errors)
        assert row.strip().startswith(stack + " ") and f"{mean:.4g} ± {sd:.2g}" in row
        assert row.removeprefix(stack).split()[:2] != ["2", "2"] or "Adam" in stack


def test_differing_settings_are_averaged_only_on_request(
    store: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(store, both := tmp_path / "runs")
    longer = compose([*FIXED, "trainer.epochs=2", "stack=SGD(0.1)", f"store={both}"])
    train(resolve(longer, "mnist-5k"))
    asked = (f"store={both}", "stack.rule=SGD", "by=stack.height,0.lr", "show=test_error")
    assert command(summarise.main, *asked) == 2
    assert "differ in trainer.epochs (2 values); name these" in capsys.readouterr().err
    assert command(summarise.main, *asked, "over=trainer.epochs") == 0
    assert [row.split()[2] for row in capsys.readouterr().out.splitlines()[1:]] == ["3", "2"]
    assert command(summarise.main, *asked, "trainer.epochs=1") == 0
    assert [row.split()[2] for row in capsys.readouterr().out.splitlines()[1:]] == ["2", "2"]


def test_empty_columns_say_why(
    store: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(summarise.main, f"store={store}", "show=train_loss,learned.0.lr") == 0
    assert capsys.readouterr().err.splitlines() == [
        "train_loss is empty in 1 of 3 lines, whose runs all diverged",
        "learned.0.lr is empty in 1 of 3 lines, whose runs all diverged",
        "learned.0.lr is empty in 1 of 3 lines, where nothing tunes it",
    ]


def test_runs_are_chosen_by_the_values_of_columns(
    store: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = tmp_path / "chosen.csv"
    options = (f"store={store}", f"csv={chosen}", "by=seed", "over=stack", "show=test_error")
    assert command(summarise.main, "stack.rule=sgd", "0.lr=1e-1,7", "stack.height=0", *options) == 0
    assert [line["stack"] for line in lines(chosen.read_text())] == ["SGD(0.1)"] * 2
    made = json.loads(chosen.with_suffix(".json").read_text())
    assert (made["data"], made["runs"]) == ("MNIST-5k", 2)
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert command(summarise.main, "stack=SGD(1e-1)/SGD(.01)", *options) == 0
    assert [line["stack.height"] for line in lines(chosen.read_text())] == ["1", "1"]
    asked: dict[tuple[str, ...], int] = {
        ("diverged=false",): 4,
        ("diverged=True",): 2,
        ("trainer.compile=false",): 6,
        ("1.lr=null",): 4,
        ("1.lr=null,0.01",): 6,
        ("1.lr=null", "diverged=false"): 2,
        ("seed=0", "seed=1"): 6,
        ("stack=SGD(0.1)", "stack=Adam(1e42)"): 4,
    }
    for question, runs in asked.items():
        assert command(summarise.main, *question, *options) == 0
        assert len(lines(chosen.read_text())) == runs


@pytest.mark.parametrize("line", SUMMARISE)
def test_the_readmes_means(
    store: Path, command: Command, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert command(summarise.main, *shlex.split(line)[3:], f"store={store}") == 0
    assert len(capsys.readouterr().out.splitlines()) in (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stack.hight=1"], "no column 'stack.hight'; did you mean 'stack.height'?"),
        (["by=0.l"], "no column '0.l'; did you mean '0.lr'?"),
        (["stor=runs"], "no column 'stor'; did you mean 'store'?"),
        (["seed=7"], "of 6 runs in {store} none has seed=7"),
        (["seed"], "'seed' does not have the form column=value"),
        (["store=nowhere"], "there is no finished run in store=nowhere"),
        (
            ["by=stack.height"],
            "runs in one group differ in stack (2 values); name these in by=, choo",
        ),
        (["by=seed", "show=test_error"], "or average over them with over=stack"),
        (["by=stack", "over=sed"], "no column 'sed'; did you mean 'seed'?"),
        (["show=stack"], "show=stack has no mean: it has values such as Adam(1e+42); name it in"),
        (["show=diverged"], "show=diverged has no mean: it has values such as True"),
        (["csv=tidy.json"], "csv=tidy.json must not end in .json; give a name such as tidy.csv"),
    ],
)
def test_a_bad_question_gets_one_clear_line(
    store: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert command(summarise.main, f"store={store}", *arguments) == 2
    said = capsys.readouterr().err
    assert message.format(store=store) in said and said.count("\n") == 1


def test_a_run_of_an_unknown_rule_does_not_hide_the_others(
    store: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(store, tmp_path / "runs")
    stray = {"stack": "QHM(1.0)", "seed": 0, "hyperparameters": []}
    RunDirectory(tmp_path / "runs" / "stray").finish(stray)
    assert command(summarise.main, f"store={store}") == 0
    expected = capsys.readouterr().out
    assert command(summarise.main, f"store={tmp_path / 'runs'}") == 0
    said = capsys.readouterr()
    assert said.out == expected
    assert "run stray is ignored: there is no rule 'QHM'" in said.err


def test_a_folder_that_cannot_be_written_to_gets_one_line(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ("data=mnist-5k", "device=cpu", "trainer.epochs=1", "progress=false")
    told = re.compile(
        r"error: /dev/null/\S+ cannot be written: Not a directory; give a writable .*"
    )
    for mode in ((), ("-m", "seed=0,1")):
        assert command(run.main, *mode, "store=/dev/null", *tiny) == 2
        assert told.fullmatch(capsys.readouterr().err.splitlines()[-1])


def test_a_run_without_a_store_gets_one_line(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run.main, *FIXED, "store=") == 2
    assert "error: store= is empty; give the folder of the runs" in capsys.readouterr().err


def test_an_unwritable_results_folder_fails_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.studies.study.run_all", None)
    config, path = resolve(compose([*FIXED, f"store={tmp_path}"]), "mnist-5k"), Path("/dev/null")
    told = "/dev/null/x cannot be written: Not a directory; give a writable folder"
    with pytest.raises(OSError, match=told):
        train_and_archive([[config]], path / "x" / "new.jsonl.gz", "scratch")
    with pytest.raises(OSError, match=told):
        part = Part([[("", config)]], configs=[config])
        train_and_list(part, path / "x" / "runs.csv", lambda cell, summary: {})


def entry_points() -> list[str]:
    found = []
    for folder in ("experiments", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if 'if __name__ == "__main__"' in path.read_text():
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.append(name.removesuffix(".__main__"))
    return found


@pytest.mark.parametrize("name", names())
def test_help_of_a_study_shows_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    study: Any = find(name)
    assert study.main(["--help"]) == 0
    said = capsys.readouterr()
    assert f"python -m experiments.studies {name}" in said.out and said.err == ""
    if isinstance(study, Study):
        assert "data.root, data.download, device, logger, progress, store" in said.out
        for option in fields(study.options):
            assert f" {option.name}=" in said.out


@pytest.mark.parametrize("name", entry_points())
def test_help_shows_commands_and_does_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "experiments.records.dashboard":
        pytest.importorskip("wandb_workspaces")
    if name == "experiments.studies":
        name = "experiments.studies.__main__"
    module: Any = importlib.import_module(name)
    name = name.removesuffix(".__main__")
    main = module.main
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    try:
        assert not (main(["--help"]) if inspect.signature(main).parameters else main())
    except SystemExit as ended:  # Hydra's way
        assert ended.code == 0
    said = capsys.readouterr()
    assert f"python -m {name}" in said.out and len(said.out) > 200 and said.err == ""
    options = getattr(module, "Options", None)
    for option in fields(options) if options else ():
        assert f" {option.name}=" in said.out


PAGE = (ROOT / "docs" / "sweeps.md").read_text()
SHOWN = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", SHOWN)
def test_the_commands_of_the_page_are_known(line: str) -> None:
    """Entry points exist and runs compose; Hydra checks the options of launchers."""
    (name, *_), words = re.findall(r"-m ((?:experiments|scripts)[\w.]+)", line), shlex.split(line)
    assert name in entry_points()
    if name != "experiments.run":
        return
    overrides = protect_notation([word for word in words[words.index(name) + 1 :] if word != "-m"])
    own = [override for override in overrides if not override.startswith("hydra")]
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(own), None)
    sweep = "-m" in words[words.index(name) :] and "experiment=optuna" not in words
    assert (len(jobs) > 1) == sweep
    for job in jobs[:: 1 + len(jobs) // 8]:  # some of a large sweep
        if "experiment=optuna" not in job and compose(job).data.name == "mnist":
            resolve(compose([*job, "data=mnist-5k"]), "mnist-5k")


def test_the_page_compares_what_was_run() -> None:
    """Each of three seeds has its column's budget; a search counts with its best trial."""
    runs = pd.read_csv(ROOT / "results" / "optuna" / "runs.csv")
    (heads,) = re.findall(
        r"^\| Stack \| (\d+) epochs in all \| (\d+) epochs in all \|$", PAGE, re.M
    )
    rows = re.findall(r"^\| `(.+?)`.*? \| (\S+ ± \S+) \| (\S+ ± \S+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for name, *shown in rows:
        searched = name == "Adam(lr)"
        own = runs[runs["stack.height"] == 0] if searched else runs[runs["stack"] == name]
        for budget, trials, text in zip(map(int, heads), (5, 8), shown, strict=True):
            each = budget // trials if searched else budget
            seeds = [seed for _, seed in own[own["trainer.epochs"] == each].groupby("seed")]
            assert [seed.epochs.sum() for seed in seeds] == [budget] * 3
            errors = [seed.sort_values("train_loss").test_error.iloc[0] for seed in seeds]
            assert text == f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}"


def test_a_cluster_receives_the_options_of_the_command_line(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    wanted = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu")
    assert command(run.main, *wanted, "--cfg", "hydra", "-p", "hydra.launcher") == 0
    said = capsys.readouterr().out
    assert "SlurmLauncher" in said and "partition: gpu" in said
