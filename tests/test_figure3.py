"""Figure 3: its runs, its whole command with a small preset, its numbers, its drawing."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pytest
import running
from running import planned

from experiments.cli import ROOT, guarded
from experiments.config.identity import run_hash
from experiments.config.resolve import resolve
from experiments.execution.pool import structure
from experiments.studies.figure3 import report as drawn
from experiments.studies.figure3 import runs as figure3
from experiments.studies.figure3.runs import PRESETS, STARTS, STUDY, Figure3Preset
from hyperopt import parse

RESULTS = ROOT / "results" / "figure3"


def test_the_runs_are_all_heights_and_starts() -> None:
    """Heights 0 to 5, 21 starts, 3 seeds of each rule; all levels start at the same step size."""
    assert (STARTS[0], STARTS[1], STARTS[-1], len(STARTS)) == (1e-8, 3.162e-8, 1e2, 21)
    runs = planned(STUDY, "preset=cpu")
    assert len(runs) == 756
    for tower, config in runs:
        stack = parse(config.stack.notation or "")
        assert stack.height == tower.height
        assert {rule.values["lr"] for rule in stack.levels} == {tower.lr}
        assert {type(rule).__name__ for rule in stack.levels} == {tower.rule}
        constants = {"v0": 1e-8} if tower.rule == "Adam" else {}  # the published package's
        assert all(constants.items() <= rule.settings.items() for rule in stack.levels)
        assert (config.trainer.epochs, config.trainer.batch_size) == (5, 256)
        assert (config.model.name, config.data.name, config.device) == ("mlp", "mnist", "cpu")
    assert {config.trainer.epochs for _, config in planned(STUDY, "preset=paper")} == {30}
    assert len(planned(STUDY, "preset=paper")) == 756


@pytest.mark.parametrize("name", ["cpu", "quick"])
def test_the_committed_runs_match_the_presets(name: str) -> None:
    committed = pd.read_csv(RESULTS / name / "runs.csv")
    seeds = ",".join(map(str, sorted(committed.seed.unique())))
    runs = planned(STUDY, f"preset={name}", f"seeds={seeds}")
    configs = [resolve(config, "mnist") for _, config in runs]
    assert list(committed.hash) == list(map(run_hash, configs))


def test_starts_and_seeds_share_compiled_steps() -> None:
    runs = [resolve(config, "mnist") for _, config in planned(STUDY, "preset=cpu")]
    assert len({structure(config) for config in runs}) == 12


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("preset=short", "preset='short' is not one of cpu, paper, quick"),
        ("seeds=all", "seeds='all' is not a list of numbers such as 0,1,2"),
        ("worker=2", "did you mean workers"),
        ("trainer.epochs=1", "is not an option of this command"),
    ],
)
def test_a_bad_option_gets_one_clear_line(argument: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        STUDY.request([argument])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def execute(folder: Path) -> int:
    """The command in this process on a few towers; returns how many runs it has made."""
    with pytest.MonkeyPatch.context() as patch:
        overrides = ("trainer.epochs=1", "device=cpu", "trainer.compile_model=false")
        patch.setitem(PRESETS, "quick", Figure3Preset(overrides, (0,), (1e-2, 1e38)))
        patch.setattr(figure3, "HEIGHTS", (0, 1))
        # No data but the 5,000 digits.
        data = (f"data.root={folder}", "data.download=false", "trainer.compile=false")
        return len(running.execute(STUDY, folder, "preset=quick", *data))


def test_the_whole_command_trains_once_and_counts_diverged_runs(tmp_path: Path) -> None:
    assert execute(tmp_path) == 8
    results = tmp_path / "results" / "figure3" / "quick-mnist-5k"  # not where those of MNIST are
    with open(results / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    for line in lines:
        summary = json.loads((tmp_path / "runs" / line["hash"] / "summary.json").read_text())
        assert float(line["test_error"]) == summary["test_error"]
        assert line["diverged"] == str(summary["diverged"])
        stack = parse(summary["stack"])
        start = stack.levels[0].values["lr"]
        assert (stack.height, start) == (int(line["height"]), float(line["lr"]))
    count = sum(line["diverged"] == "True" for line in lines)
    assert count > 0
    text = (results / "README.md").read_text()
    assert f"{count} of 8 diverged" in text and "MNIST-5k, batch 256, 1 epoch" in text
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    assert execute(tmp_path) == 0
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before
    assert {path.suffix for path in results.iterdir()} == {".csv", ".json", ".md", ".pdf", ".png"}


def fake_runs(errors: Mapping[tuple[str, int], Sequence[float]], starts: Sequence[float]) -> str:
    """A CSV of two seeds, whose errors are 1 point above and below those given."""
    rows = [
        {
            **{"rule": rule, "height": height, "lr": lr, "seed": seed, "data": "mnist"},
            **{"epochs": 2, "device": "a core", "hash": f"{rule}{height}{lr}{seed}"},
            **{"test_error": error + 2 * seed - 1, "train_loss": 1.0, "diverged": error > 89},
        }
        for (rule, height), own in errors.items()
        for lr, error in zip(starts, own, strict=True)
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows).to_csv(index=False)


STARTS_BY_HALVES = [1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1]
ERRORS = {
    ("SGD", 0): [40.0, 20.0, 10.0, 16.0, 90.0],  # best 10: what ends within 15 is near
    ("SGD", 1): [15.1, 15.0, 9.0, 12.0, 90.0],
    ("SGD", 2): [14.0, 14.0, 9.0, 30.0, 90.0],
}


def table(tmp_path: Path, errors: Mapping[tuple[str, int], Sequence[float]]) -> pd.DataFrame:
    path = tmp_path / "figure3" / "quick" / "runs.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(fake_runs(errors, STARTS_BY_HALVES))
    return drawn.points(pd.read_csv(path))


def test_decades_of_robustness_are_starts_near_the_best_plain_error(tmp_path: Path) -> None:
    robust = drawn.robustness(table(tmp_path, ERRORS)).set_index("height")
    assert list(robust.decades) == [0.5, 1.5, 1.5]  # two starts in a power of ten
    assert list(robust.below) == [0.0, 0.5, 1.0]
    assert list(robust.reach) == [0.0, 0.5, 1.0]
    assert list(robust.own_decades) == [0.5, 1.0, 0.5]  # errors within 15, 13.5 and 13.5
    assert list(robust.diverged) == [2, 2, 2] and list(robust.runs) == [10, 10, 10]


@pytest.mark.parametrize(
    ("errors", "shrinking"),
    [
        ([14.0, 14.0, 9.0, 30.0, 90.0], []),
        ([14.0, 16.0, 9.0, 9.0, 9.0], []),  # as many starts that are too small
        ([14.0, 14.0, 14.0, 90.0, 90.0], []),
        ([16.0, 16.0, 9.0, 9.0, 9.0], ["below", "reach"]),
    ],
)
def test_the_claim_is_that_no_measure_shrinks(
    tmp_path: Path, errors: list[float], shrinking: list[str]
) -> None:
    claims = drawn.claim(drawn.robustness(table(tmp_path, {**ERRORS, ("SGD", 2): errors})))
    assert [measure for (_, measure), verdict in claims.items() if not verdict] == shrinking


def test_the_check_prints_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    table(tmp_path, ERRORS)
    published = tmp_path / "published.csv"
    monkeypatch.setattr(drawn, "REFERENCE", published)
    # One is within 15 %, one within three standard deviations of 1.4 points, one is of guessing.
    near = "rule,height,lr,test_error\nSGD,1,1e-3,13.2\nSGD,1,1e-2,5\nSGD,2,1e-1,80\n"
    published.write_text(near)
    monkeypatch.setattr(sys, "argv", ["figure3", f"results={tmp_path}"])
    assert guarded(drawn.main) == 0
    said = capsys.readouterr().out
    assert "3 of 3 agree" in said and "never shrink" in said
    published.write_text(near + "SGD,2,1e-2,4.7\n")
    assert guarded(drawn.main) == 1
    assert "3 of 4 agree" in capsys.readouterr().out
    (tmp_path / "figure3" / "a" / "runs.csv").mkdir(parents=True)  # which cannot be read
    for folder, message in (("", "Is a directory"), ("empty", "make reproduce-figure3")):
        monkeypatch.setattr(sys, "argv", ["figure3", f"results={tmp_path / folder}"])
        assert guarded(drawn.main) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
