"""Follow the how-to pages of docs/ word for word in a copy of the project."""

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

DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def files(page: str) -> dict[str, str]:
    """The files that a page asks the reader to write; each name comes before its block."""
    text = (DOCS / page).read_text()
    found = {}
    for match in re.finditer(r"^```(?:python|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        names = re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml))`", text[: match.start()])
        new = (name for name in names[::-1] if not (name in found or (ROOT / name).exists()))
        found[next(new)] = match[1]
    return found


def follow(command: str, project: Path, *more: str) -> str:
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    done = subprocess.run(
        [sys.executable, *words[1:], *more], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FOLDERS = ("hyperopt", "experiments", "hydra_plugins", "models", "configs", "scripts", "tests")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project without results."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def write(page: str, project: Path) -> None:
    for name, text in files(page).items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists(), name
        path.write_text(text)


FEW = ("data=mnist-5k", "device=cpu", "progress=false", "workers=1")
EAGER = ("trainer.compile=false", "trainer.compile_model=false")


@pytest.mark.slow
def test_adding_a_study(project: Path) -> None:
    write("add-a-study.md", project)
    (block,) = blocks("add-a-study.md", "sh")
    list_them, train, draw, test = block.splitlines()
    assert "nesterov     Momentum with and without" in follow(list_them, project)
    follow(train, project, *FEW, *EAGER)
    folder = project / "results" / "nesterov" / "quick-mnist-5k"
    names = {path.name for path in folder.iterdir()}
    assert names == {"runs.csv", "runs.json", "README.md", "figure.png", "figure.pdf"}
    first = {path: path.read_bytes() for path in folder.iterdir()}
    for path in folder.glob("figure.*"):
        path.unlink()
    follow(draw, project)
    assert {path: path.read_bytes() for path in folder.iterdir()} == first
    assert "1 passed" in follow(test, project, "-p", "no:cacheprovider")


@pytest.mark.slow
def test_adding_a_model_and_its_data(project: Path) -> None:
    write("add-a-model.md", project)
    (block,) = blocks("add-a-model.md", "sh")
    train, summarise = block.splitlines()
    said = follow(train, project, "device=cpu", "progress=false", *EAGER)
    assert "on Stripes" in said
    (summary,) = (json.loads(path.read_text()) for path in project.glob("runs/*/summary.json"))
    assert summary["model"] == {"name": "tiny_net"} and summary["test_error"] < 20
    assert "tiny_net" in follow(summarise, project)
    refused = [sys.executable, *shlex.split(train)[1:], "model=resnet20", *EAGER]
    done = subprocess.run(refused, cwd=project, capture_output=True, text=True)
    assert done.returncode == 2 and "give model=mlp or softmax or tiny_net" in done.stderr


@pytest.mark.slow
def test_adding_a_logger(project: Path) -> None:
    write("add-a-logger.md", project)
    (command,) = blocks("add-a-logger.md", "sh")
    follow(command, project, *FEW, *EAGER, "trainer.epochs=2")
    (lines,) = (path.read_text().splitlines() for path in project.glob("runs/*/lines.txt"))
    assert [re.sub(r"\d\.\d+$", "x", line) for line in lines] == [
        "step 16: loss x",
        "step 32: loss x",
    ]


@pytest.mark.slow
def test_adding_a_rule(project: Path) -> None:
    page, tmp_path = "add-a-rule.md", project
    (rule,), (row,), (suite, one, seeds) = (blocks(page, kind) for kind in ("python", "yaml", "sh"))
    (name,) = re.findall(r"^class (\w+)\(Rule\):", rule)
    with open(tmp_path / "hyperopt" / "rules.py", "a") as file:
        file.write(f"\n\n{rule}")

    tests = [test for test in vars(test_every_rule) if test.startswith("test_")]
    passed = re.search(r"(\d+) passed", follow(suite, tmp_path, "-p", "no:cacheprovider"))
    assert passed and int(passed[1]) >= len(tests) - 1  # the compiled one is skipped in places

    (where,) = re.findall(r"`(configs/experiment/\w+\.yaml)`", (DOCS / page).read_text())
    (tmp_path / where).write_text(row)
    short = [*FEW, *EAGER, "trainer.epochs=1"]
    for command, runs in ((one, 1), (seeds, 3)):
        store = tmp_path / f"runs-{runs}"
        follow(command, tmp_path, *short, f"store={store}")
        summaries = [json.loads(path.read_text()) for path in store.glob("*/summary.json")]
        assert len(summaries) == runs
        for summary in summaries:
            assert summary["stack"] == f"{name}(0.1) / SGD(0.001)"
            assert not summary["diverged"] and summary["test_error"] < 50
            assert summary["hyperparameters"][0]["lr"] != 0.1
