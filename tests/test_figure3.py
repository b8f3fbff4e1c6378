"""Figure 3: its runs, its whole command with a small preset, its numbers, its drawing."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pytest

from experiments import command, figure3
from experiments.config import Config, resolve, run_hash
from experiments.figure3 import PRESETS, STARTS, Preset, figure_runs
from experiments.pool import Outcome, structure
from experiments.run import guarded
from experiments.store import RunStore
from experiments.train import train
from hyperopt import parse
from scripts import figure3 as drawn
from scripts.tables import draw_all


def test_the_runs_are_those_of_the_issue() -> None:
    """Heights 0 to 5, 21 starts, 3 seeds of each rule; all levels start at the same step size."""
    assert (STARTS[0], STARTS[1], STARTS[-1], len(STARTS)) == (1e-8, 3.162e-8, 1e2, 21)
    runs = figure_runs(PRESETS["cpu"])
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
    assert {config.trainer.epochs for _, config in figure_runs(PRESETS["paper"])} == {30}
    assert len(figure_runs(PRESETS["paper"])) == 756


def test_the_committed_runs_are_those_of_the_presets() -> None:
    for name, preset in PRESETS.items():
        path = command.ROOT / "results" / f"figure3_{name}_runs.csv"
        if path.exists():
            committed = pd.read_csv(path)
            runs = figure_runs(preset, sorted(committed.seed.unique().tolist()))
            configs = [resolve(config, "mnist") for _, config in runs]
            assert list(committed.hash) == list(map(run_hash, configs))


def test_starts_and_seeds_share_compiled_steps() -> None:
    runs = [resolve(config, "mnist") for _, config in figure_runs(PRESETS["cpu"])]
    assert len({structure(config) for config in runs}) == 12


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("preset=short", "preset='short' is not one of paper, cpu, quick"),
        ("seeds=all", "seeds='all' is no list of numbers as in 0,1,2"),
        ("worker=2", "did you mean workers"),
        ("trainer.epochs=1", "is not an option of this command"),
    ],
)
def test_a_bad_option_gets_one_clear_line(argument: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        figure3._arguments([argument])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def execute(folder: Path) -> int:
    """The command in this process on a few towers; returns how many runs it has made."""
    made = 0

    def run_all(configs: Sequence[Config], workers: int | None) -> list[Outcome]:
        nonlocal made
        store = RunStore(configs[0].store)
        made += sum(store.summary(run_hash(config)) is None for config in configs)
        return [Outcome(config, train(config)) for config in configs]

    with pytest.MonkeyPatch.context() as patch:
        small = Preset(1, (1e-2, 1e38), ("device=cpu", "trainer.compile_model=false"))
        patch.setitem(PRESETS, "quick", small)
        patch.setattr(figure3, "HEIGHTS", (0, 1))
        patch.setattr(command, "run_all", run_all)
        patch.setattr(figure3, "draw", draw_all)
        # No data but the 5,000 digits.
        places = [f"data.root={folder}", f"store={folder}/runs", f"results={folder}/results"]
        more = ["data.download=false", "trainer.compile=false"]
        patch.setattr(sys, "argv", ["figure3", "preset=quick", "seeds=0", *places, *more])
        assert figure3.main() == 0
    return made


def test_the_whole_command_trains_once_and_counts_what_diverged(tmp_path: Path) -> None:
    assert execute(tmp_path) == 8
    results = tmp_path / "results" / "mnist-5k"  # not where those of MNIST are
    with open(results / "figure3_quick_runs.csv", newline="") as file:
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
    text = (results / "figure3_quick.md").read_text()
    assert f"{count} of 8 did" in text and "MNIST-5k, batch 256, 1 epoch" in text
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
    (tmp_path / "figure3_quick_runs.csv").write_text(fake_runs(errors, STARTS_BY_HALVES))
    return drawn.points(pd.read_csv(tmp_path / "figure3_quick_runs.csv"))


def test_decades_of_robustness_are_starts_near_the_best_plain_error(tmp_path: Path) -> None:
    robust = drawn.robustness(table(tmp_path, ERRORS)).set_index("height")
    assert list(robust.decades) == [0.5, 1.5, 1.5]  # two starts in a power of ten
    assert list(robust.below) == [0.0, 0.5, 1.0]
    assert list(robust.reach) == [0.0, 0.5, 1.0]
    assert list(robust.own_decades) == [0.5, 1.0, 0.5]  # within 15, 13.5 and 13.5
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


def test_the_check_says_what_it_found(
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
    (tmp_path / "figure3_a_runs.csv").mkdir()  # which cannot be read
    for folder, message in (("", "Is a directory"), ("empty", "make reproduce-figure3")):
        monkeypatch.setattr(sys, "argv", ["figure3", f"results={tmp_path / folder}"])
        assert guarded(drawn.main) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_what_is_committed_is_redrawn_from_its_csv(tmp_path: Path) -> None:
    committed = command.ROOT / "results"
    for source in committed.glob("figure3_*_runs.csv"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
        for path in drawn.draw_figure3(tmp_path / source.name):
            if path.suffix in (".md", ".csv"):  # figures depend on matplotlib's version
                assert path.read_bytes() == (committed / path.name).read_bytes(), path.name
