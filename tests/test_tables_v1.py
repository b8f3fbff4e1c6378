"""The first version's tables: their stacks, the order of the data, the tables."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from running import planned

from experiments.config.compose import compose
from experiments.config.identity import identity, run_hash
from experiments.config.resolve import resolve
from experiments.data.catalog import load
from experiments.studies.tables_v1.runs import REFERENCE, STUDY, line, notation, reference
from experiments.tasks.classification import Classification
from hyperopt import parse


def test_each_published_row_has_its_stack() -> None:
    rows = reference()
    assert len(rows) == 14
    for row in rows:
        named = row["stack"].replace(", per hyperparameter", "")
        for theirs, ours in zip(
            parse(named).levels, parse(notation(row["stack"])).levels, strict=True
        ):
            assert type(theirs) is type(ours) and list(theirs.tuned) == list(ours.tuned)
            assert type(ours).__name__ != "Adam" or ours.settings["v0"] == 1e-8
            if "per hyper" not in row["stack"]:
                assert theirs.values == ours.values


def test_per_hyperparameter_is_a_step_size_for_each_and_the_level_above_moves_all() -> None:
    (stack,) = (notation(row["stack"]) for row in reference() if "per hyper" in row["stack"])
    levels = parse(stack).levels
    assert list(levels[0].tuned) == ["lr", "beta1", "beta2"]
    assert levels[1].values["lr"] == {"lr": 1e-3, "beta1": 1e-3, "beta2": 1e-3}
    assert list(levels[1].tuned) == ["lr"] and levels[2].values["lr"] == 1e-4


def test_the_setting_is_one_epoch_of_300_in_the_order_of_the_file() -> None:
    runs = planned(STUDY)
    assert len(runs) == 42
    for _, config in runs:
        assert (config.trainer.epochs, config.trainer.batch_size) == (1, 300)
        assert not config.data.shuffle and not config.data.augment
    assert {config.seed for _, config in runs} == {0, 1, 2}


def test_the_order_is_part_of_a_run_and_leaves_earlier_hashes_alone() -> None:
    shuffled, in_order = (
        resolve(compose([f"data.shuffle={value}", "device=cpu"]), "mnist")
        for value in ("true", "false")
    )
    assert "shuffle" not in identity(shuffled)
    assert identity(in_order)["shuffle"] is False
    assert run_hash(in_order) != run_hash(shuffled)


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_come_in_the_order_of_the_file_unless_shuffled(shuffle: bool) -> None:
    data = load("mnist-5k", "")
    images = Classification(data, 300, False, "cpu", shuffle)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x, y = (torch.cat(parts) for parts in zip(*images.epoch(generator), strict=True))
        assert torch.equal(y, data.y_train) is not shuffle
        assert torch.equal(x, data.x_train) is not shuffle


def test_the_tables_have_ours_beside_the_published(tmp_path: Path) -> None:
    rows = [row for row in reference() for _ in range(3)]
    summaries = [
        {
            **{"stack": notation(row["stack"]), "data": "mnist", "epochs": 1, "seed": k % 3},
            **{"hash": f"{k:016x}", "diverged": False},
            "test_error": 101 - float(row["test_accuracy"]) - k % 3,
            # The first run compiles.
            "provenance": {"device": "a core", "seconds_per_step": 0.05 if k % 3 == 0 else 0.0012},
        }
        for k, row in enumerate(rows)
    ]
    lines = [line(row, summary) for row, summary in zip(rows, summaries, strict=True)]
    pd.DataFrame(lines).to_csv(tmp_path / "runs.csv", index=False)
    paths = STUDY.draw(tmp_path)
    table = pd.read_csv(tmp_path / "table.csv")
    published = pd.read_csv(REFERENCE)
    assert list(table["row"]) == list(published["stack"])
    assert list(table.accuracy) == pytest.approx(list(published.test_accuracy))
    assert all(math.isclose(sd, 1.0) for sd in table.sd)
    text = (tmp_path / "README.md").read_text()
    assert "| `SGD(0.01) / SGD(0.01)` | 88.35 | 88.35 ± 1.00 | 16 | 1.20 |" in text
    assert "in the order of the file, 3 seeds, a core" in text
    before = {path: path.read_bytes() for path in paths}
    assert {path: path.read_bytes() for path in STUDY.draw(tmp_path)} == before
