"""Table 1: its configs, its tables, and the whole command with a small preset."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from running import planned

from experiments.cli import ROOT
from experiments.config.identity import run_hash
from experiments.config.resolve import resolve
from experiments.config.schema import Config
from experiments.files import csv_text
from experiments.studies.study import Part
from experiments.studies.table1 import report as tables
from experiments.studies.table1.runs import LEARNED, STUDY, own_runs, reference, row_configs
from hyperopt import parse

COLUMNS = (
    *("block", "row", "kind", "stack", "data", "epochs", "seed", "hash"),
    *("test_error", "train_loss", "diverged", *(f"learned_{name}" for name in LEARNED)),
)
DIALECT: dict[str, dict[str, Any]] = {  # the published package's constants
    "SGD": {},
    "Adam": {"v0": 1e-8},
    "AdaGrad": {"initial_accumulator_value": 0.1, "eps_inside": True},
    "RMSProp": {"eps_inside": True},
}


# The configs.


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    return row_configs()


def test_each_published_row_has_its_config(configs: dict[str, Config]) -> None:
    rows = reference()
    assert len(rows) == 32
    assert set(configs) == {row["stack"] for row in rows}
    for row in rows:
        config = configs[row["stack"]]
        assert config.trainer.epochs == int(row["epochs"])
        assert (config.model.name, config.data.name) == ("mlp", "mnist")
        assert config.trainer.batch_size == 256


def test_each_config_is_its_row_in_the_papers_dialect(configs: dict[str, Config]) -> None:
    for name, config in configs.items():
        published, ours = parse(name), parse(config.stack.notation or "")
        assert ours.height == published.height
        for theirs, rule in zip(published.levels, ours.levels, strict=True):
            assert type(rule) is type(theirs)
            assert (rule.values, rule.tuned) == (theirs.values, theirs.tuned)
            expected = {**theirs.settings, **DIALECT[type(rule).__name__]}
            assert rule.settings == expected


def test_the_papers_preset_is_96_runs_of_359550_steps() -> None:
    runs = planned(STUDY)
    assert len(runs) == 96
    assert sum(config.trainer.epochs * 235 for _, config in runs) == 359_550


def test_options_of_other_experiments_leave_the_hashes_of_the_committed_runs_alone() -> None:
    committed = pd.read_csv(ROOT / "results" / "table1" / "paper" / "runs.csv")
    runs = planned(STUDY, "device=cpu")
    assert {run_hash(resolve(config, "mnist")) for _, config in runs} == set(committed.hash)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("preset=fast", "preset='fast' is not one of paper, quick"),
        ("start=ours", "start='ours' is not one of scratch, own"),
        ("worker=2", "did you mean workers"),
        ("trainer.epochs=1", "is not an option of this command"),
        ("quick", "'quick' is not an option of this command, as key=value"),
    ],
)
def test_a_bad_option_gets_one_clear_line(argument: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        STUDY.request([argument])
    assert message in str(caught.value) and "\n" not in str(caught.value)


# The tables.


def fake_runs(folder: Path, errors: Mapping[str, Sequence[float]], data: str = "mnist") -> None:
    """A CSV of runs whose errors are the published means, but for those given."""
    lines: list[list[object]] = [list(COLUMNS)]
    for row in reference():
        mean, sd = float(row["published_error"]), float(row["published_sd"])
        own = errors.get(row["stack"], (mean - sd, mean, mean + sd))
        for seed, error in enumerate(own):
            start = (row["block"], row["stack"], row["kind"], row["stack"], data, row["epochs"])
            learned = (0.1 + seed, None, None, None) if row["kind"] == "tower" else (None,) * 4
            lines.append([*start, seed, f"{len(lines):016x}", error, 1.0, False, *learned])
    (folder / "runs.csv").write_text(csv_text(lines))


def read(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        return {line["row"]: line for line in csv.DictReader(file)}


def test_the_table_has_means_deviations_and_a_verdict(tmp_path: Path) -> None:
    errors = {
        "SGD(0.01)": (9.28, 9.28, 9.28),  # 0.29 points off: within 0.3
        "SGD(0.01) / SGD(0.01)": (5.12, 5.12, 5.12),  # 0.31 points off, pooled sd 0.07
        "RMSProp(0.01)": (4.0, 5.0, 6.0),  # 0.81 points off, pooled sd 0.78
        "RMSProp(0.0030)": (4.83, 5.23, 5.63),  # 1.30 points off, pooled sd 0.57
    }
    fake_runs(tmp_path, errors)
    tables.draw(tmp_path)
    table = read(tmp_path / "table.csv")
    assert list(table) == [row["stack"] for row in reference()]
    verdicts = {row: line["agrees"] for row, line in table.items() if row in errors}
    assert verdicts == dict(zip(errors, ("True", "False", "True", "False"), strict=True))
    assert all(line["agrees"] == "True" for row, line in table.items() if row not in errors)
    rmsprop = table["RMSProp(0.01)"]
    assert (rmsprop["our_error"], rmsprop["our_sd"], rmsprop["n"]) == ("5", "1", "3")
    assert table["SGD(0.01) / SGD(0.01)"]["learned_lr"] == "1.1"
    text = (tmp_path / "README.md").read_text()
    assert "| `RMSProp(0.01)` | plain | 5 | 4.19 ± 0.47 | 4.22 ± 0.51 | 5.00 ± 1.00 | 3 |" in text
    assert "lr = 1.1" in text and "MNIST, 3 seeds" in text and "reduced" not in text
    assert "5.00 $\\pm$ 1.00" in (tmp_path / "table.tex").read_text()


def test_redrawing_gives_the_same_bytes(tmp_path: Path) -> None:
    fake_runs(tmp_path, {})
    first = {path: path.read_bytes() for path in tables.draw(tmp_path)}
    assert {path.suffix for path in first} == {".md", ".csv", ".tex", ".pdf", ".png"}
    time.sleep(1.1)  # a time of drawing would show
    assert {path: path.read_bytes() for path in tables.draw(tmp_path)} == first


@pytest.mark.parametrize("reduced", ["other data", "one seed"])
def test_a_reduced_setting_is_labelled_and_not_judged(tmp_path: Path, reduced: str) -> None:
    if reduced == "other data":
        fake_runs(tmp_path, {}, data="mnist-5k")
    else:
        errors = {row["stack"]: (float(row["published_error"]),) for row in reference()}
        fake_runs(tmp_path, errors)
    tables.draw(tmp_path)
    for name in ("README.md", "table.tex"):
        text = (tmp_path / name).read_text()
        assert "a reduced setting, not comparable with the paper's" in text
        assert ("MNIST-5k" in text) == (reduced == "other data")
        assert "yes" not in text
    assert "agrees" not in next(iter(read(tmp_path / "table.csv").values()))


def test_relearned_rows_start_at_the_mean_of_our_towers_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = planned(STUDY)
    values = {
        "Adam(0.001) / Adam(0.001)": {"lr": 0.0012345, "beta1": 0.87, "beta2": 0.999},
        "SGD(0.01) / Adam(0.1)": {"lr": -0.2},
        "SGD(0.01) / RMSProp(0.1)": {"lr": math.nan},
    }
    summaries = [
        {
            "tuned": list(learned),
            "hyperparameters": [{**learned, "lr": learned["lr"] + config.seed}],
        }
        for row, config in runs
        for learned in [values.get(row["stack"], {"lr": 1.0})]
    ]
    table = Part([runs], configs=[config for _, config in runs], summaries=summaries)
    own = own_runs(table, (0, 1, 2))
    said = capsys.readouterr().err
    assert "RMSProp(0.1) is left out" in said and "-0.2" not in said  # its mean is 0.8
    assert [config.seed for _, config in own] == [0, 1, 2] * 13
    starts = {row["stack"]: config.stack.notation for row, config in own}
    assert starts["Adam(0.0038, 0.870, 0.999)"] == "Adam(1.001, beta1=0.87, v0=1e-8)"
    assert starts["SGD(0.4538)"] == "SGD(0.8)"
    assert starts["RMSProp(0.0021)"] == "RMSProp(2.0, eps_inside=True)"
    assert "SGD(0.5920)" not in starts

    fake_runs(tmp_path, {})
    table_csv = tmp_path / "runs.csv"
    lines = [line for line in table_csv.read_text().splitlines() if "relearned" in line]
    kept = [line.replace("relearned,SGD(0.4538)", "relearned,SGD(0.8)") for line in lines]
    kept = [line for line in kept if "SGD(0.5920)" not in line]
    header = ",".join(COLUMNS)
    (tmp_path / "own_runs.csv").write_text("\n".join([header, *kept]) + "\n")
    tables.draw(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| `SGD(0.01) / Adam(0.1)` | `SGD(0.8)` | 2.80 ± 0.09 | 3 | `SGD(0.4538)` |" in text
    assert "`SGD(0.01) / RMSProp(0.1)` is left out" in text
    own_table = read(tmp_path / "own.csv")
    assert len(own_table) == 13 and own_table["SGD(0.4538)"]["start"] == "SGD(0.8)"


# The whole command.


def command(folder: Path, *more: str) -> list[str]:
    own = ["preset=quick", "data=mnist-5k", "device=cpu", "workers=2"]
    fast = ["trainer.compile=false", "trainer.compile_model=false"]
    places = [f"store={folder}/runs", f"results={folder}/results"]
    return [sys.executable, "-m", "experiments.studies", "table1", *own, *fast, *places, *more]


def drawn(folder: Path) -> dict[str, bytes]:
    paths = (folder / "results" / "table1" / "quick-mnist-5k").iterdir()
    return {path.name: path.read_bytes() for path in paths if path.suffix != ".json"}


def finished(folder: Path) -> int:
    return len(list(folder.glob("runs/*/summary.json")))


def wait_for(folder: Path, runs: int) -> None:
    end = time.monotonic() + 300
    while finished(folder) < runs:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.long
def test_the_command_killed_and_started_again_draws_the_same_table(tmp_path: Path) -> None:
    """Two epochs, one seed, on the embedded digits: once undisturbed, once killed by SIGKILL."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(command(whole), capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert "32 of 32 runs are finished" in done.stderr

    where = whole / "results" / "table1" / "quick-mnist-5k" / "runs.json"
    provenance = where.read_text()
    again = subprocess.run(command(whole), capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert where.read_text() == provenance, "a command that trains nothing has changed it"

    process = subprocess.Popen(command(broken), stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(broken, 12)
    process.kill()  # only the parent: its workers must notice
    process.wait()
    end = time.monotonic() + 20
    while alive(process.pid):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.05)
    assert finished(broken) < 32
    done = subprocess.run(command(broken), capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert drawn(broken) == drawn(whole)

    table = pd.read_csv(whole / "results" / "table1" / "quick-mnist-5k" / "table.csv")
    assert len(table) == 32 and (table.our_error < 75).all() and (table.n == 1).all()
    runs_csv = pd.read_csv(whole / "results" / "table1" / "quick-mnist-5k" / "runs.csv")
    for line in runs_csv.itertuples():
        summary = json.loads((whole / "runs" / str(line.hash) / "summary.json").read_text())
        assert summary["test_error"] == line.test_error
    made = json.loads((whole / "results" / "table1" / "quick-mnist-5k" / "runs.json").read_text())
    assert (made["runs"], made["data"], made["steps"]) == (32, "MNIST-5k", 32 * 2 * 16)


def alive(session: int) -> list[int]:
    """The processes of a session that still run; a zombie does not."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[3]) == session:
            found.append(int(path.parent.name))
    return found


@pytest.mark.long
def test_ctrl_c_ends_the_command_with_a_hint(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job may ignore it
    )
    wait_for(tmp_path, 1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "give the same command again to continue" in said and "Traceback" not in said
    assert not any(path.is_file() for path in (tmp_path / "results").rglob("*"))
