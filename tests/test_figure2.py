"""Figure 2: its grid and presets, its whole command on a few synthetic images, its drawings."""

import csv
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import running
import torch

from experiments.config.identity import run_hash
from experiments.config.resolve import resolve
from experiments.config.schema import Config
from experiments.data import catalog
from experiments.data import images as data
from experiments.records.archive import export_runs, import_runs, read_records
from experiments.records.store import RunStore
from experiments.studies import style
from experiments.studies.figure2.report import beside_float32, read_figure2
from experiments.studies.figure2.runs import (
    CELLS,
    HE,
    PRESETS,
    REPLAY,
    REPLAYED,
    STUDY,
    Cell,
    cell_config,
    cell_of,
)
from experiments.studies.study import Preset
from experiments.training.trainer import Progress, train
from hyperopt import parse
from scripts import report

CIFAR10 = Path(os.environ.get("HYPEROPT_DATA", "data"), "cifar10.npz")


# The grid.


def test_the_grid_is_the_papers() -> None:
    """Three lrs by three momenta, plain and tower, with lr^2 1e-3 and 1e-6 / (1 - momentum)."""
    starts = {(lr, momentum) for lr in (0.01, 0.1, 1.0) for momentum in (0.09, 0.9, 0.99)}
    for kind in ("plain", "tower"):
        assert {(c.lr, c.momentum) for c in CELLS if c.kind == kind} == starts
    assert len(CELLS) == 19 and CELLS[0] == HE == Cell("he", 0.1, 0.9)
    for cell in CELLS:
        lowest, *above = parse(cell.stack).levels
        assert lowest.values == {"lr": cell.lr, "momentum": cell.momentum, "weight_decay": 1e-4}
        if cell.kind != "tower":
            assert above == []
            continue
        assert set(lowest.tuned) == {"lr", "momentum"}
        sizes: Any = above[0].values["lr"]
        assert sizes["lr"] == pytest.approx(cell.lr**2 * 1e-3, rel=1e-5)
        assert sizes["momentum"] == pytest.approx(1e-6 / (1 - cell.momentum), rel=1e-5)


def test_the_setting_is_he_et_al_s() -> None:
    config = cell_config(HE, 0, PRESETS["paper"].overrides)
    assert (config.model.name, config.data.name, config.data.augment) == (
        *("resnet20", "cifar10"),
        True,
    )
    trainer = config.trainer
    assert (trainer.steps, trainer.batch_size) == (64_000, 128)
    assert 163 * 391 < 64_000 < trainer.epochs * 391  # of 50,000 images
    assert config.precision == "float32" and not trainer.compile_model
    assert (config.schedule.name, config.schedule.factor) == ("steps", 0.1)
    assert config.schedule.milestones == [0.5, 0.75]
    short = cell_config(HE, 0, PRESETS["cpu"].overrides)
    assert (short.trainer.epochs, short.trainer.steps) == (10, None)
    assert {cell_config(c, 0, ()).schedule.name for c in CELLS[1:]} == {"constant"}


def test_the_hashes_of_a_preset_are_stable() -> None:
    """Otherwise, the committed records would belong to other runs."""
    configs = [resolve(cell_config(cell, 0, PRESETS["cpu"].overrides), "cifar10") for cell in CELLS]
    assert run_hash(configs[0]) == "5a29e44676a9c428"
    assert run_hash(configs[CELLS.index(REPLAYED)]) == "d8c0e149c63b7c89"
    assert len({run_hash(config) for config in configs}) == 19


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("preset=short", "preset='short' is not one of cpu, cpu_bf16, paper"),
        ("start=own", "start='own' is not one of scratch, records"),
        ("seeds=all", "seeds='all' is not a list of numbers such as 0,1,2"),
        ("seeds=0,0", "seeds='0,0' has a seed twice"),
        ("seed=1", "did you mean seeds"),
        ("trainer.epochs=1", "is not an option of this command"),
    ],
)
def test_a_bad_option_gets_one_clear_line(argument: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        STUDY.request([argument])
    assert message in str(caught.value) and "\n" not in str(caught.value)


# The whole command, on a few synthetic images.


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with 20 + 10 images under the name of CIFAR-10; each class has a colour."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, n in (("train", 20), ("test", 10)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = random.integers(0, 128, (n, 32, 32, 3)) + 12 * labels[:, None, None, None]
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels}
    np.savez(folder / "cifar10.npz", **arrays)
    with pytest.MonkeyPatch.context() as patch:
        train, test = (data._sorted(arrays[f"x_{p}"], arrays[f"y_{p}"]) for p in ("train", "test"))
        known = data._dataset("cifar10", "", [*train, *test])
        patch.setitem(data.SHA256, "cifar10", known.sha256)
        catalog.load.cache_clear()
        yield folder
    catalog.load.cache_clear()


SHORT = (
    *("trainer.epochs=2", "trainer.steps=null", "trainer.batch_size=12", "trainer.record_every=1"),
    *("trainer.compile=false", "device=cpu", "progress=false"),
)


def execute(folder: Path, cifar: Path, *more: str, **how: Any) -> int:
    """The command in this process, on a preset of four steps; returns how many runs it has made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "cpu", Preset(SHORT))
        arguments = ("preset=cpu", "seeds=0", f"data.root={cifar}", *more)
        return len(running.execute(STUDY, folder, *arguments, **how))


def results_of(folder: Path) -> Path:
    return folder / "results" / "figure2" / "cpu"


@pytest.fixture(scope="module")
def done(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    assert execute(folder, cifar) == 20  # the grid, He et al. and the replay
    return folder


def run_files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in (folder / "runs").rglob("*.*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def values(folder: Path, cell: Cell) -> list[dict[str, float]]:
    """The recorded hyperparameters of a cell's run."""
    for path in (folder / "runs").glob("*/summary.json"):
        if cell_of(json.loads(path.read_text())) == cell:
            with open(path.with_name("hyperparameters.csv"), newline="") as file:
                return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    raise AssertionError(f"there is no run of {cell}")


def test_the_page_has_a_claim_for_each_start_and_every_run(done: Path) -> None:
    *starts, decays = report.claims(done / "results")
    assert len(starts) == 9 and "Figure 2, learned from lr 0.1, momentum 0.9" in decays.setting
    assert {claim.verdict for claim in (*starts, decays)} <= {"yes", "no"}
    assert {(claim.n, len(claim.runs.split())) for claim in starts} == {(1, 2)}
    entries = report.run_entries(done / "results", done / "no-store")
    assert len(entries) == 20 and all(entry.curves for entry in entries)
    towers = [entry for entry in entries if "/" in entry.values["stack"]]  # not constant
    assert towers and all("hypergradient.0.momentum" in entry.curves for entry in towers)


def test_in_every_tower_lr_and_momentum_move(done: Path) -> None:
    expected = {"tower": [True, True], "plain": [False, False], "he": [True, False]}
    for cell in CELLS:
        rows = values(done, cell)
        starts = {"0.lr": cell.lr, "0.momentum": cell.momentum}
        moved = [any(row[name] != start for row in rows) for name, start in starts.items()]
        assert moved == expected[cell.kind], cell
        assert {row["0.weight_decay"] for row in rows} == {1e-4}


def test_he_et_al_s_schedule_is_followed(done: Path) -> None:
    lrs = [row["0.lr"] for row in values(done, HE)]
    np.testing.assert_allclose(lrs, [0.1, 0.1, 0.01, 0.001])


def test_the_replay_repeats_the_tower(done: Path) -> None:
    """With the same seed and values, plain SGD makes the steps that the tower made."""
    tower, replay = values(done, REPLAYED), values(done, REPLAY)
    for name in ("0.lr", "0.momentum"):
        np.testing.assert_allclose([r[name] for r in replay], [t[name] for t in tower], rtol=1e-12)
    runs = (results_of(done) / "runs.csv").read_text().splitlines()
    lines = [dict(zip(runs[0].split(","), line.split(","), strict=True)) for line in runs[1:]]
    losses = {
        line["kind"]: float(line["train_loss"])
        for line in lines
        if line["lr"] == "0.1" and line["momentum"] == "0.9"
    }
    assert losses["replay"] == pytest.approx(losses["tower"], rel=1e-5)
    assert abs(losses["plain"] - losses["tower"]) > 1e-4


def test_tables_are_drawn_from_the_records_alone(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, saved = copy_of_records(done, tmp_path), list[str]()

    def save(figure: Any, path: Path) -> list[Path]:
        saved.append(path.name)
        return []

    monkeypatch.setattr(style, "save", save)
    drawn = STUDY.draw(folder)
    assert {path.suffix for path in drawn} == {".csv", ".md", ".tex", ".json"}
    for path in drawn:
        assert path.read_bytes() == (results_of(done) / path.name).read_bytes(), path.name
    assert saved == ["train_loss", "test_error", "lr", "momentum", "replay"]
    for name in saved:
        assert all((results_of(done) / f"{name}{suffix}").exists() for suffix in (".png", ".pdf"))


def test_bf16_stands_beside_float32(done: Path, tmp_path: Path) -> None:
    folder = copy_of_records(done, tmp_path)
    assert beside_float32(read_figure2(folder), folder) == ""
    bf16 = folder.with_name("cpu_bf16")
    shutil.copytree(folder, bf16)
    said = beside_float32(read_figure2(bf16), bf16)
    (error,) = (r.summary["test_error"] for r in read_figure2(folder) if r.cell == HE)
    assert f"in bf16 {error:.2f} % and" in said and f"in float32 {error:.2f} % and" in said


def copy_of_records(done: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "cpu"
    shutil.copytree(results_of(done) / "records", folder / "records")
    shutil.copy(results_of(done) / "replay.csv", folder)
    return folder


def test_the_table_states_n_and_provenance(done: Path) -> None:
    text = (results_of(done) / "README.md").read_text()
    assert "a reduced setting, the paper's is 64,000 steps" in text and "n = 1" in text
    with open(results_of(done) / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 20
    for line in lines:
        summary = json.loads((done / "runs" / line["hash"] / "summary.json").read_text())
        assert float(line["test_error"]) == summary["test_error"]
        error, lr, momentum = summary["test_error"], line["lr"], line["momentum"]
        if line["kind"] in ("plain", "tower"):
            (row,) = (r for r in text.splitlines() if r.startswith(f"| {lr} | {momentum} |"))
            cells = [cell.strip() for cell in row.split("|")]
            assert cells[3 if line["kind"] == "plain" else 4] == f"{error:.2f}"
            assert cells[7 if line["kind"] == "plain" else 8] == "1"
    tower, replay = (
        next(line for line in lines if (line["kind"], line["lr"], line["momentum"]) == which)
        for which in (("tower", "0.1", "0.9"), ("replay", "0.1", "0.9"))
    )
    loss, error = (abs(float(tower[n]) - float(replay[n])) for n in ("train_loss", "test_error"))
    assert f"final loss differs by {loss:.3f} and its error by {error:.2f} points" in text
    he = next(line for line in lines if line["kind"] == "he")
    assert f"| He et al.'s schedule | {float(he['test_error']):.2f} |" in text


# Records.


def test_records_move_finished_runs_to_another_machine(
    done: Path, cifar: Path, tmp_path: Path
) -> None:
    """Half of the runs here, the rest on another machine that has only the records."""
    (here := tmp_path / "here").mkdir()
    assert execute(here, cifar, stop_after=7, draw=False) == 7
    records = read_records(results_of(here) / "records")
    assert len(records) == 7
    (there := tmp_path / "there").mkdir()
    (here / "results").rename(there / "results")
    assert execute(there, cifar, "start=records", draw=False) == 13
    assert execute(there, cifar, draw=False) == 0
    again = {**run_files(here), **run_files(there)}
    whole = run_files(done)
    assert again.keys() == whole.keys()
    curves = [name for name in whole if name.endswith(".csv")]
    assert {n: again[n] for n in curves} == {n: whole[n] for n in curves}


def test_import_restores_exported_runs(done: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl.gz"
    hashes = [run.name for run in (done / "runs").iterdir()]
    assert export_runs(RunStore(tmp_path / "runs"), hashes, path) == 0 and not path.exists()
    assert export_runs(RunStore(done / "runs"), hashes[:5], path) == 5
    assert export_runs(RunStore(done / "runs"), hashes[3:], path) == 20  # none is lost
    half_done = tmp_path / "runs" / hashes[0] / "checkpoint.pt"
    half_done.parent.mkdir(parents=True)
    half_done.touch()
    assert import_runs(path, RunStore(tmp_path / "runs")) == 20
    assert import_runs(path, RunStore(tmp_path / "runs")) == 0
    assert run_files(tmp_path) == run_files(done)
    before = path.read_bytes()
    export_runs(RunStore(tmp_path / "runs"), hashes, path)
    assert path.read_bytes() == before


def test_new_runs_go_to_a_new_file(done: Path, cifar: Path, tmp_path: Path) -> None:
    """Existing files of records never change, so git stores each once."""
    assert execute(tmp_path, cifar, stop_after=7, draw=False) == 7
    (first,) = (results_of(tmp_path) / "records").iterdir()
    before = first.read_bytes()
    assert execute(tmp_path, cifar, draw=False) == 13
    parts = sorted((results_of(tmp_path) / "records").iterdir())
    assert len(parts) == 2 and first.read_bytes() == before
    runs = [read_records(part) for part in parts]
    assert [len(part) for part in sorted(runs, key=len)] == [7, 13]
    assert runs[0].keys().isdisjoint(runs[1])
    assert execute(tmp_path, cifar, draw=False) == 0
    assert sorted((results_of(tmp_path) / "records").iterdir()) == parts


def test_concurrent_exports_lose_no_run(done: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl.gz"
    hashes = [run.name for run in (done / "runs").iterdir()]
    with ThreadPoolExecutor(4) as exports:
        [*exports.map(lambda name: export_runs(RunStore(done / "runs"), [name], path), hashes)]
    assert read_records(path).keys() == set(hashes)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("harm", ["cut short", "of another config"])
def test_damaged_records_are_refused(done: Path, tmp_path: Path, harm: str) -> None:
    path = tmp_path / "records.jsonl.gz"
    hashes = [run.name for run in (done / "runs").iterdir()]
    export_runs(RunStore(done / "runs"), hashes, path)
    if harm == "cut short":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        config = done / "runs" / hashes[0] / "config.json"
        whole = config.read_text()
        config.write_text(whole.replace('"seed": 0', '"seed": 1'))
        export_runs(RunStore(done / "runs"), hashes[:1], path)
        config.write_text(whole)
    with pytest.raises(ValueError, match=r"records.jsonl.gz cannot be read as records of runs"):
        import_runs(path, RunStore(tmp_path / "runs"))


def test_replays_of_another_schedule_are_left_out(done: Path, tmp_path: Path) -> None:
    folder = copy_of_records(done, tmp_path)
    assert len(read_figure2(folder)) == 20
    (folder / "replay.csv").write_text("step,lr,momentum\n1,0.1,0.9\n")
    kinds = [run.cell.kind for run in read_figure2(folder)]
    assert len(kinds) == 19 and "replay" not in kinds


def test_runs_of_several_settings_are_not_mixed(done: Path, cifar: Path, tmp_path: Path) -> None:
    folder = copy_of_records(done, tmp_path)
    longer = (*SHORT, "trainer.batch_size=20", f"data.root={cifar}", f"store={tmp_path}/runs")
    other = resolve(cell_config(CELLS[1], 0, longer), "cifar10")
    train(other)
    export_runs(RunStore(other.store), [run_hash(other)], folder / "records" / "other.jsonl.gz")
    with pytest.raises(ValueError, match=r"has runs of several settings"):
        STUDY.draw(folder)


def test_an_undrawable_study_gets_one_line(done: Path, tmp_path: Path) -> None:
    folder = copy_of_records(done, tmp_path)
    damaged = folder / "records" / "damaged.jsonl.gz"
    damaged.write_text("x")
    with pytest.raises(ValueError) as caught:
        STUDY.draw(folder)
    said = str(caught.value)
    assert f"{damaged} cannot be read" in said and "make tables" in said and "\n" not in said
    damaged.unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        STUDY.draw(folder)


def test_records_of_an_earlier_layout_get_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "figure2_cpu.jsonl.gz"
    request = STUDY.request(["preset=cpu", f"results={tmp_path}"])
    STUDY.say_what_moved(request)
    assert capsys.readouterr().err == ""
    old.touch()
    STUDY.say_what_moved(request)
    said = capsys.readouterr().err
    assert said.endswith(f"mv {old} {tmp_path}/figure2/cpu/records/\n") and said.count("\n") == 1


# One run.


def config_of(cifar: Path, store: Path, cell: Cell, *overrides: str) -> Config:
    places = (f"data.root={cifar}", f"store={store}")
    return resolve(cell_config(cell, 0, (*SHORT, *places, *overrides)), "cifar10")


def result(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "provenance"}


@pytest.mark.parametrize("cell", [REPLAYED, HE], ids=["tower", "schedule"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    cifar: Path, tmp_path: Path, cell: Cell
) -> None:
    """The checkpoint has the batch normalisation and the generator of order, crops and flips."""
    whole = train(config_of(cifar, tmp_path / "whole", cell, "trainer.epochs=3"))
    broken = config_of(cifar, tmp_path / "broken", cell, "trainer.epochs=3")

    def cut(progress: Progress) -> None:
        if progress.step == 3:  # in the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, cut)
    state = torch.load(next(tmp_path.glob("broken/*/checkpoint.pt")), weights_only=True)
    assert state["model"]["norm.num_batches_tracked"] == 2 == state["step"]
    assert result(train(broken)) == result(whole)


def test_steps_end_the_last_epoch_early(cifar: Path, tmp_path: Path) -> None:
    """Of 2 batches an epoch, of 12 and 8 images: the loss is that of the 12 alone."""
    config = config_of(cifar, tmp_path, HE, "trainer.epochs=5", "trainer.steps=3")
    summary = train(config)
    assert (summary["steps"], summary["epochs"]) == (3, 2)
    curves = (tmp_path / summary["hash"] / "curves.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in curves[1:]] == [["1", "2"], ["2", "3"]]
    one = config_of(cifar, tmp_path, HE, "trainer.steps=1")
    assert train(one)["train_loss"] != pytest.approx(float(curves[1].split(",")[2]), rel=1e-4)


def test_bf16_computes_the_model_in_bfloat16(cifar: Path, tmp_path: Path) -> None:
    exact, rough = (
        train(config_of(cifar, tmp_path, HE, "trainer.steps=1", f"precision={precision}"))
        for precision in ("float32", "bf16")
    )
    assert exact["hash"] != rough["hash"]
    assert exact["train_loss"] != rough["train_loss"]
    assert exact["train_loss"] == pytest.approx(rough["train_loss"], rel=0.05)


@pytest.mark.skipif(not CIFAR10.is_file(), reason="needs CIFAR-10")
def test_a_tower_learns_on_real_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 128 images the loss falls, the model separates the classes, and lr and momentum change."""
    monkeypatch.setitem(data.SHA256, "cifar10", data.CIFAR10_SHA256)
    images = catalog.load("cifar10", CIFAR10.parent)
    few = torch.randperm(50_000)[:128]
    x, y = images.x_train[few], images.y_train[few]
    some = replace(images, x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setattr("experiments.training.trainer.load", lambda name, root: some)
    lengths = ("trainer.epochs=10", "trainer.batch_size=32")
    summary = train(config_of(CIFAR10.parent, tmp_path, REPLAYED, *lengths))
    losses = pd.read_csv(tmp_path / summary["hash"] / "curves.csv").train_loss
    assert losses.iloc[-1] < 0.9 * losses.iloc[0]
    values = pd.read_csv(tmp_path / summary["hash"] / "hyperparameters.csv")
    assert values["0.lr"].nunique() > 30 and values["0.momentum"].nunique() > 30
    assert summary["test_error"] < 85


@pytest.mark.gpu
def test_the_setting_runs_on_a_gpu(cifar: Path, tmp_path: Path) -> None:
    """A tower, and He et al.'s schedule in bfloat16, with batches as on a CPU."""
    for cell, precision in ((REPLAYED, "float32"), (HE, "bf16")):
        own = (cifar, tmp_path, cell, f"precision={precision}")
        on_gpu = train(config_of(*own, "device=cuda"))
        on_cpu = train(config_of(*own))
        assert on_gpu["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=0.05)
        assert on_gpu["hyperparameters"][0]["lr"] != 0.1
