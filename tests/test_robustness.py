"""The benchmark of robustness: its runs, its whole command on a slice, its numbers, its drawing."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import running
import torch

from experiments.cli import ROOT
from experiments.config.baselines import parse
from experiments.config.identity import identity, run_hash
from experiments.config.resolve import resolve
from experiments.config.schema import Config
from experiments.records.archive import read_records
from experiments.studies import curves as records
from experiments.studies import study
from experiments.studies.robustness import report as drawn
from experiments.studies.robustness import runs as robustness
from experiments.studies.robustness import times
from experiments.studies.robustness.runs import (
    ABLATION,
    FIXED,
    FREE,
    METHODS,
    PRESETS,
    STUDY,
    TASKS,
    Cell,
    RobustnessPreset,
    Setting,
    cell_config,
    cell_of,
    cells,
    starts,
)
from hyperopt import Auto

RESULTS = ROOT / "results" / "robustness"
DATA = {"char_rnn": "war_and_peace", "resnet": "cifar10"}


def resolved(preset: str, cell: Cell, seed: int = 0) -> Config:
    return resolve(cell_config(preset, cell, seed), DATA.get(cell.task, "mnist"))


# The runs.


def test_the_benchmark_has_all_methods_and_starts() -> None:
    for task, setting in PRESETS["paper"].tasks.items():
        assert len(setting.starts) == (21 if task.startswith("mlp") or task == "softmax" else 11)
        assert (setting.starts[0], setting.starts[-1]) == (1e-8, 1e2)
    epochs = {"mlp": 5, "softmax": 5, "mlp30": 30, "char_rnn": 3, "resnet": 2}
    models = {"char_rnn": "char_rnn", "resnet": "resnet20", "softmax": "softmax"}
    for task in TASKS:
        config = resolved("paper", Cell(task, "Adam", 1e-3))
        assert (config.trainer.epochs, config.trainer.steps) == (epochs[task], None)
        assert config.model.name == models.get(task, "mlp")
    assert FREE == ("Prodigy", "DAdaptAdam", "DAdaptSGD")
    assert METHODS[0] == "Auto" and set(FIXED) | set(FREE) | set(ABLATION) < set(METHODS)
    assert set(drawn.LABELS) == set(METHODS)


def test_a_method_has_one_setting_and_its_own_start() -> None:
    for method in METHODS:
        if method in FREE:
            assert starts(method, PRESETS["cpu"].tasks["mlp"]) == [None]
            continue
        for lr in (1e-8, 1e-3, 1e2):
            cell = Cell("mlp", method, lr)
            levels = parse(cell.stack).levels
            assert levels[0].values["lr"] == lr
            if method in ("SGD-5", "Adam-2", "Adam-5"):
                assert {level.values["lr"] for level in levels} == {lr}
            elif len(levels) > 1:
                assert str(levels[1]) == str(parse(Cell("mlp", method, 0.5).stack).levels[1])
    assert parse(Cell("mlp", "Adam-HD", 0.1).stack).levels[1].values["lr"] == 1e-7
    assert parse(Cell("resnet", "Adam-HD", 0.1).stack).levels[1].values["lr"] == 1e-8


def test_auto_is_the_library_s_and_lacks_one_part_at_a_time() -> None:
    whole = Auto([torch.zeros(1)], 0.1, compile=False).stack
    assert Cell("mlp", "Auto", 0.1).stack == str(whole)
    options = {name: whole.levels[1].argument(name) for name in whole.levels[1].arguments}
    for method in ABLATION:
        lowest, above = parse(Cell("mlp", method, 0.1).stack).levels
        changed = {name for name in options if above.argument(name) != options[name]}
        if method == "no-mean":
            assert not changed and lowest.name == "Adam"
            assert lowest.tuned["lr"].domain.name == "log" and [*lowest.tuned] == ["lr"]
        elif method == "no-log":
            assert changed == {"trust"} and lowest.tuned["lr"].domain.name == "real"
        else:
            assert len(changed) == 1 and lowest == whole.levels[0]


def test_every_run_is_known_by_its_summary() -> None:
    for preset in PRESETS:
        every = cells(preset)
        assert len({(cell.task, cell.stack) for cell in every}) == len(every)
        assert all(
            cell.stack == str(parse(cell.stack)) for cell in every if cell.method in drawn.PARTS
        )
        for cell in every[::23]:
            summary = {**identity(resolved(preset, cell)), "hash": "0"}
            assert cell_of(preset, summary) == cell
    summary["stack"] = "SGD(0.12345)"
    with pytest.raises(ValueError, match="no method has this stack any more"):
        cell_of(preset, summary)


def plan(*arguments: str) -> list[list[Config]]:
    """The batches of configs that a command line asks for."""
    part = next(STUDY.parts(STUDY.request(["preset=cpu", *arguments])))
    return [[config for _, config in batch] for batch in part.batches]


def test_the_most_informative_runs_come_first() -> None:
    waves = plan("seeds=0,1")
    assert len(waves) == 8
    first = waves[0]
    assert {config.seed for config in first} == {0}
    bars = {config.row for config in first}
    assert {"Auto from 1e-08, mlp", "Adam from 0.003162, mlp", "Prodigy, softmax"} < bars
    assert {config.row for config in waves[1]}.isdisjoint(bars)
    # The long tasks have one seed.
    seeds = {config.seed for wave in waves for config in wave if config.model.name == "resnet20"}
    assert seeds == {0}
    few = plan("seeds=0", "tasks=mlp", "methods=Auto,Prodigy")
    assert [len(wave) for wave in few] == [12]
    from_two = plan("seeds=0", "methods=Auto,Adam,Prodigy", "lrs=1e-3,0.003162")
    rows = ["Auto from 0.001", "Adam from 0.001", "Adam from 0.003162"]
    assert [c.row for c in from_two[0] if c.model.name == "resnet20"] == [
        f"{row}, resnet" for row in rows
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("preset=short", "preset='short' is not one of cpu, paper"),
        ("tasks=mpl", "tasks='mpl' is not one of mlp, softmax"),
        ("methods=Auto,adam", "methods='adam' is not one of Auto, Adam"),
        ("method=Auto", "did you mean methods"),
        ("lrs=1e-3,4e-3", "lrs='0.004' is not one of 1e-08, "),
        ("lrs=1e-3;1", "lrs='1e-3;1' is not one of 1e-08, "),
    ],
)
def test_a_bad_option_gets_one_clear_line(argument: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan(argument)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_runs_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="methods=no-log has no runs for tasks=resnet"):
        plan("tasks=resnet", "methods=no-log")


# The command.

SLICE = {
    "mlp": Setting(("trainer.epochs=1", "trainer.steps=3"), (1e-3, 1e-1, 1e1), grid=(1e-2,)),
    "softmax": Setting(("trainer.epochs=1", "trainer.steps=2"), (1e-3, 1e-1, 1e38), grid=(1e-2,)),
}


def execute(folder: Path, *arguments: str) -> int:
    """The command in this process on the embedded digits; returns how many runs it has made."""
    fixed = ["preset=cpu", "seeds=0", f"data.root={folder}", "data.download=false"]
    fast = ["trainer.compile=false", "trainer.compile_model=false", "progress=false"]
    return len(running.execute(STUDY, folder, *fixed, *fast, *arguments))


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "cpu", RobustnessPreset(("device=cpu",), tasks=SLICE))
    caches = robustness._setting, robustness._by_run
    for cache in caches:
        monkeypatch.setattr(robustness, cache.__name__, functools.lru_cache(cache.__wrapped__))


@pytest.mark.usefixtures("sliced")
def test_the_command_continues_earlier_parts(tmp_path: Path) -> None:
    results = f"results={tmp_path}/results"
    first = [results, f"store={tmp_path}/one", "tasks=mlp", "methods=Auto,Adam,Prodigy"]
    assert execute(tmp_path, *first) == 3 + 4 + 1
    assert execute(tmp_path, *first) == 0
    # Another machine, which has only the records.
    more = [results, f"store={tmp_path}/two", "start=records", "methods=Auto,Adam,DAdaptSGD"]
    assert execute(tmp_path, *more) == 1 + 3 + 4 + 1
    folder = tmp_path / "results" / "robustness" / "cpu-mnist-5k"  # not where those of MNIST are
    differs = "compile=false, but the new runs would have trainer.compile=true; give the same, or"
    with pytest.raises(ValueError, match=differs):
        execute(tmp_path, *first, "trainer.compile=true")
    others = [resolved("paper", Cell(task, "Adam", 1e-3)) for task in ("mlp", "char_rnn", "resnet")]
    where = STUDY.folder(STUDY.request(["preset=paper"]), others)
    assert where == Path("results", "robustness", "paper")
    assert len(read_records(folder / "records")) == 17
    lines = pd.read_csv(folder / "runs.csv")
    for line in lines.itertuples():
        store = "one" if (tmp_path / "one" / line.hash).exists() else "two"
        summary = json.loads((tmp_path / store / line.hash / "summary.json").read_text())
        value = summary[TASKS[line.task].metric]
        assert line.error == (math.inf if value is None else value)
    assert set(lines.task) == {"mlp", "softmax"} and len(lines) == 17
    diverged = lines[lines.diverged]
    assert set(diverged.start) == {1e38} and diverged.error.map(math.isinf).any()
    text = (folder / "README.md").read_text()
    assert "Reduced settings: " in text and "MNIST-5k" in text and "diverged" in text
    made = json.loads((folder / "runs.json").read_text())
    assert made["mlp"]["runs"] == 9 and made["softmax"]["peers"] == [command_version()]
    for name in ("figure.png", "figure.pdf", "table.csv"):
        assert (folder / name).stat().st_size > 0


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_new_runs_of_a_preset_must_match_its_records(preset: str) -> None:
    records = RESULTS / preset / "records"
    one_of_each = {cell.task: resolved(preset, cell) for cell in cells(preset)}
    configs = [replace(config, device="cpu") for config in one_of_each.values()]

    def task_of(run: dict[str, Any]) -> str:
        return cell_of(preset, run).task

    study.check_setting(configs, records, task_of)
    on_a_gpu = [replace(config, device="cuda") for config in configs]
    with pytest.raises(ValueError, match="device=cpu, but the new runs would have device=cuda"):
        study.check_setting(on_a_gpu, records, task_of)
    study.check_setting(on_a_gpu, records.with_name("none"), task_of)


def command_version() -> str:
    from importlib.metadata import version

    return f"dadaptation {version('dadaptation')}"


# The numbers.


def table(errors: Mapping[str, Mapping[Any, float]]) -> pd.DataFrame:
    """One run for each error."""
    lines = [
        {"task": "mlp", "method": method, "start": start, "seed": 0, "error": error}
        for method, own in errors.items()
        for start, error in own.items()
    ]
    return drawn.points(pd.DataFrame(lines).assign(diverged=False))


def test_decades_are_counted_by_the_best_fixed_lr() -> None:
    there = PRESETS["cpu"].tasks["mlp"].starts  # one in each power of ten
    adam = dict.fromkeys(there, 50.0) | {1e-3: 4.0, 3.162e-3: 2.0}  # the best is between them
    auto = dict.fromkeys(there, 2.2) | {1e-8: 2.9, 1e-7: 3.1}
    momentum = dict.fromkeys(there[:6], 2.0)  # of 11
    found = drawn.robustness(
        table(
            {
                **{"Adam": adam, "Auto": auto, "Momentum": momentum},
                **{"AdamW": {1e-3: 1.0}, "Prodigy": {None: 2.5}},
            }
        ),
        "cpu",
    ).set_index("method")
    assert list(found.loc["Auto", ["decades_1.1", "decades_1.5"]]) == [9, 10]
    assert list(found.loc["Adam", ["decades_1.1", "decades_1.5"]]) == [0, 0]
    assert list(found.loc["Prodigy", ["decades_1.1", "decades_1.5"]]) == [0, 11]
    assert list(found.loc["Momentum", ["decades_1.1", "starts", "of"]]) == [6, 6, 11]
    worst = found.loc["Auto", ["worst", "worst_ratio", "worst_start"]]
    assert list(worst) == [3.1, 1.55, 1e-7]


@pytest.mark.parametrize(
    ("preset", "task", "whole"), [("paper", "mlp", 11), ("cpu", "mlp30", 11), ("cpu", "resnet", 9)]
)
def test_decades_do_not_depend_on_the_number_of_starts(preset, task, whole) -> None:
    there = PRESETS[preset].tasks[task].starts
    runs = table({"Adam": dict.fromkeys(there, 2.0)}).assign(task=task)
    found = drawn.robustness(runs, preset)
    assert found["decades_1.1"].item() == pytest.approx(whole)
    half = drawn.robustness(runs[: len(there) // 2], preset)
    assert half["decades_1.1"].item() == pytest.approx(whole * (len(there) // 2) / len(there))


def test_verdicts_name_limit_and_peer() -> None:
    there = PRESETS["cpu"].tasks["mlp"].starts
    errors: dict[str, dict[Any, float]] = {"Adam": {1e-3: 2.0}, "Prodigy": {None: 2.1}}
    auto = dict.fromkeys(there, 2.2) | {1e2: 2.05, 1e-8: 3.0}
    (said,) = drawn.verdicts(table({**errors, "Auto": auto}), "cpu")
    assert said.startswith("MLP, 5 epochs (reduced), n = 1: ")
    assert "within 1.15 times the best fixed lr's error from 10 of 11 starts" in said
    assert "1.50 times from the worst start, 1e-08; no worse than Prodigy from 1 of 11" in said


@pytest.mark.parametrize("fixed", [{}, {"SGD": {1e-2: math.inf}}])
def test_without_a_converged_fixed_lr_there_are_no_decades(fixed) -> None:
    points = table({"Auto": {1e-2: 2.0}, "Prodigy": {None: 2.0}, **fixed})
    robust = drawn.robustness(points, "cpu")
    assert robust[["decades_1.1", "decades_1.5", "worst_ratio"]].isna().all(axis=None)
    runs = pd.DataFrame({"task": ["mlp"], "data": ["mnist"]})
    text = drawn.markdown(points, runs, "cpu", None)
    assert "| Auto | - |" in text and "A dash: no fixed lr to compare with." in text
    assert "nan" not in text and "\nAuto:\n" not in text


def test_an_incomplete_search_lists_its_fixed_lrs() -> None:
    grid = PRESETS["cpu"].tasks["mlp"].grid
    some = table({"Adam": {1e-8: 9.0, 0.03162: 2.0, 1e-2: 3.0}, "SGD": dict.fromkeys(grid, 4.0)})
    said = drawn.remarks(some, "cpu", "mlp", "MNIST")
    lrs = ", ".join(f"{lr:g}" for lr in grid)
    assert said == (
        "The best fixed lr is 0.03162, with Adam: 2. Searched so far: "
        f"SGD {lrs}; SGD, momentum 0.9 none; Adam 0.01, 0.03162."
    )
    whole = {method: dict.fromkeys(grid, 2.0) for method in FIXED}
    said = drawn.remarks(table(whole), "cpu", "mlp", "MNIST")
    assert said == "The best fixed lr is 0.0001, with SGD: 2."


def test_missing_runs_are_hatched() -> None:
    there = PRESETS["cpu"].tasks["mlp"].starts
    own = table({"Adam": dict.fromkeys(there[:4], 2.0), "Prodigy": {None: 2.0}})
    fig = drawn.figure(own, "cpu")
    shown = [bar for axis in fig.axes for bar in axis.collections]
    assert len(shown) == 22 and sum(bool(bar.get_hatch()) for bar in shown) == 7
    whole = drawn.figure(table({"Adam": dict.fromkeys(there, 2.0)}), "cpu")
    legends = [[text.get_text() for text in one.legends[0].get_texts()] for one in (fig, whole)]
    assert legends == [[*legends[1], "not run"], legends[1]]


def test_the_number_of_seeds_is_of_the_shown_points() -> None:
    assert 0.03162 not in PRESETS["cpu"].tasks["mlp"].starts  # only a fixed lr is searched there
    fixed, free = {0.03162: 1.0, 1e-2: 2.0}, {None: 3.0}
    for numbers, said in (([1, 3, 1, 3], "n = 3"), ([1, 3, 1, 2], "n = 2 to 3")):
        own = table({"SGD": fixed, "no-log": {1e-2: 9.0}, "Prodigy": free}).assign(n=numbers)
        assert drawn.figure(own, "cpu").get_suptitle() == f"Start anywhere, preset cpu; {said}"
        text = drawn.markdown(own, own.assign(data="mnist"), "cpu", None)
        assert f"{drawn.CAPTION} {said}.\n" in text
    assert records.counted(own[:0].n) == "n = 0"


def test_the_curves_have_three_methods_sorted_by_start() -> None:
    errors = {"Auto": {1e-8: 3.0, 1e2: 3.5}, "Adam": {1e-2: 4.0, 1e-4: 9.0}, "SGD": {1e-2: 1.0}}
    fig = drawn.curves(table({**errors, "Adam/SGD": {1e-8: 5.0}}), "cpu", "mlp")
    lines = [np.column_stack(line.get_data()).tolist() for line in fig.axes[0].lines]
    assert lines == [[[1e-4, 9.0], [1e-2, 4.0]], [[1e-8, 5.0]], [[1e-8, 3.0], [1e2, 3.5]]]


def test_means_are_over_seeds_including_diverged_ones() -> None:
    runs = pd.DataFrame(
        {
            "task": "softmax",
            "method": "Adam",
            "start": np.repeat([1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0], 2),
            "seed": [0, 1] * 6,
            "error": [0.5, 0.7, 0.4, math.inf, 900, 700, 2e4, 4e4, math.inf, math.inf, 89, 91],
            "diverged": [False, False, False, True, *[False] * 4, True, True, False, True],
        }
    )
    found = drawn.points(runs).set_index("start")
    assert list(found.error) == [0.6, math.inf, 800, 3e4, math.inf, 90]
    assert list(found.diverged) == [0, 1, 0, 0, 2, 1]
    assert found.ratio[1e-3] == 1 and found.sd[1e-3] == pytest.approx(0.1 * 2**0.5)
    table = drawn.markdown(drawn.points(runs), runs.assign(data="mnist"), "cpu", {"Adam": 1.0})
    loss = "0.6000 ± 0.14 | diverged (1 of 2) | 800.0000 ± 141 | 3e04 ± 1e04 | diverged |"
    assert f"{loss} 90.0000 ± 1.4 (1 of 2 diverged) |" in table


def test_all_methods_are_timed_beside_torch_s_adam() -> None:
    measured = times.measure(count=1, at_least=0.0, compile=False)
    assert set(measured["relative"]) == {drawn.REFERENCE, *drawn.MAIN}
    assert measured["relative"][drawn.REFERENCE] == 1.0


def test_the_time_that_auto_adds_is_relative_to_both_adams() -> None:
    (shares,) = times.overheads({"mlp": 2}, compile=False).values()
    assert set(shares) == {drawn.REFERENCE, "Adam"}
    assert 0 < shares["Adam"] < 10  # eager, Auto takes many times as long


# What is committed.


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_the_committed_records_match_the_preset_and_are_drawn(preset: str) -> None:
    source = RESULTS / preset / "records"
    summaries: list[dict[str, Any]] = [
        json.loads(files["summary.json"]) for files in read_records(source).values()
    ]
    for summary in summaries[::37]:
        config = resolved(preset, cell_of(preset, summary), summary["seed"])
        assert run_hash(replace(config, device=summary["device"])) == summary["hash"]
        assert summary["provenance"]["dirty"] is False
    lines = pd.read_csv(RESULTS / preset / "runs.csv")
    assert sorted(lines.hash) == sorted(summary["hash"] for summary in summaries)
    shown = drawn.points(lines).to_csv(index=False, lineterminator="\n", float_format="%.6g")
    assert (RESULTS / preset / "table.csv").read_text() == shown
