"""Auto under a linear decay: its whole command on a few digits."""

from pathlib import Path

import pandas as pd
from running import execute, planned

from experiments.studies.decay.runs import STUDY
from experiments.studies.prose import written
from hyperopt import parse


def test_the_whole_command(tmp_path: Path) -> None:
    few = ("preset=quick", "data=mnist-5k", "trainer.compile_model=false")
    assert len(execute(STUDY, tmp_path, *few)) == 4
    folder = tmp_path / "results" / "decay" / "quick-mnist-5k"
    runs = pd.read_csv(folder / "runs.csv")
    assert list(runs.decay) == ["none", "linear", "none", "linear"]
    assert list(runs.start) == [1e-5, 1e-5, 1e-2, 1e-2] and runs.error.nunique() == 4
    text = (folder / "README.md").read_text()
    plain, decayed = runs.error[:2]
    row = f"| 1e-05 | {plain:.2f} | {decayed:.2f} | {decayed / plain:.3f} | 1 |"
    assert row in text
    page = "<!-- begin decay/quick/table -->\n<!-- end -->\n"
    folder.rename(folder.with_name("quick"))
    assert row in written(page, tmp_path / "results")


def test_the_two_arms_differ_in_the_schedule_alone() -> None:
    runs = planned(STUDY, "preset=cpu")
    for cell, config in runs:
        assert parse(config.stack.notation or "").levels[0].values["lr"] == cell.start
        assert (config.schedule.name, config.schedule.final) == (
            ("linear", 0.0) if cell.decay == "linear" else ("constant", None)
        )
    assert len(runs) == 2 * 3 * (2 + 2 + 1 + 1 + 1)
