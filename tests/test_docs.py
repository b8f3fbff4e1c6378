"""docs/add-a-rule.md, followed word for word in a copy of the project."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_every_rule
from test_project import ROOT

PAGE = (ROOT / "docs" / "add-a-rule.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def follow(command: str, project: Path, *more: str) -> str:
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    done = subprocess.run(
        [sys.executable, *words[1:], *more], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_adding_a_rule(tmp_path: Path) -> None:
    for folder in ("hyperopt", "experiments", "hydra_plugins", "models", "configs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (rule,), (row,), (suite, one, seeds) = blocks("python"), blocks("yaml"), blocks("sh")
    (name,) = re.findall(r"^class (\w+)\(Rule\):", rule)
    with open(tmp_path / "hyperopt" / "rules.py", "a") as file:
        file.write(f"\n\n{rule}")

    tests = [test for test in vars(test_every_rule) if test.startswith("test_")]
    passed = re.search(r"(\d+) passed", follow(suite, tmp_path, "-p", "no:cacheprovider"))
    assert passed and int(passed[1]) >= len(tests) - 1  # the compiled one is skipped in places

    (where,) = re.findall(r"`(configs/experiment/\w+\.yaml)`", PAGE)
    (tmp_path / where).write_text(row)
    short = ["data=mnist-5k", "trainer.epochs=1", "device=cpu", "progress=false", "workers=1"]
    eager = ["trainer.compile=false", "trainer.compile_model=false"]
    for command, runs in ((one, 1), (seeds, 3)):
        store = tmp_path / f"runs-{runs}"
        follow(command, tmp_path, *short, *eager, f"store={store}")
        summaries = [json.loads(path.read_text()) for path in store.glob("*/summary.json")]
        assert len(summaries) == runs
        for summary in summaries:
            assert summary["stack"] == f"{name}(0.1) / SGD(0.001)"
            assert not summary["diverged"] and summary["test_error"] < 50
            assert summary["hyperparameters"][0]["lr"] != 0.1
