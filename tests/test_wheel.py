"""The wheel: its content, and that it works alone and beside the well-known Hyperopt of PyPI."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from test_project import ROOT

OURS = "ultimate_hyperoptimizer"
TRAIN = f"""
import torch
from {OURS} import Auto, HyperOptimizer, __file__ as where
assert "site-packages" in where, where
for compile in (False, True):
    weights = torch.nn.Linear(3, 1)
    for optimizer in (
        Auto(weights.parameters(), compile=compile),
        HyperOptimizer(weights.parameters(), "Adam(0.001) / SGD(1e-5)", compile=compile),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            weights(torch.ones(2, 3)).square().mean().backward()
            optimizer.step()
"""
THEIRS = """
from hyperopt import fmin, hp, rand
fmin(lambda x: x * x, hp.uniform("x", -1, 1), rand.suggest, 3, show_progressbar=False)
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("a folder") / "project"
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "hyperopt", project / "hyperopt")
    build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", project)
    done = run(*build, project, check=False)
    if done.returncode and ("No matching distribution" in done.stderr or "Retry" in done.stderr):
        pytest.skip("PyPI cannot be reached, and the wheel needs setuptools from it")
    assert done.returncode == 0, done.stderr
    (found,) = project.glob("*.whl")
    return found


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a new environment that sees our torch, and not our checkout."""
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", where).stdout.strip())
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: str | Path) -> None:
    done = run(python, "-m", "pip", "install", "-q", *what, check=False)
    if done.returncode and what == ("hyperopt",):
        pytest.skip(f"PyPI cannot be reached: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    here = {path.relative_to(ROOT / "hyperopt") for path in (ROOT / "hyperopt").rglob("*.py")}
    inside = {name.relative_to(OURS) for name in names if name.parts[0] == OURS}
    assert inside == here | {Path("py.typed")}
    assert {name.parts[0] for name in names if name.parts[0] != OURS} == {
        next(name.parts[0] for name in names if name.parts[0].endswith(".dist-info"))
    }


@pytest.mark.long
@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_both_packages_work_in_either_order(wheel: Path, python: Path, order: str) -> None:
    ours = ("--no-deps", wheel)
    first, second = (ours, ("hyperopt",)) if order == "ours first" else (("hyperopt",), ours)
    install(python, *first)
    install(python, *second)
    run(python, "-I", "-c", TRAIN)
    run(python, "-I", "-c", THEIRS)
    run(python, "-m", "pip", "uninstall", "-qy", "hyperopt")
    run(python, "-I", "-c", TRAIN)
