"""The workflows, forms and hooks of the repository name files, targets and packages that exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from test_project import ROOT, make_targets

GITHUB = ROOT / ".github"
FILES = [*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_they_are_yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_name_what_exists(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        for target in re.findall(r"\bmake ([\w-]+)", command):
            assert target in make_targets()
        for file in re.findall(r"(?:tests|\.github)/[\w.]+\.py|constraints[\w-]*\.txt", command):
            assert (ROOT / file).is_file(), file


def test_every_python_that_is_supported_is_tested() -> None:
    matrix = yaml.safe_load((GITHUB / "workflows" / "tests.yml").read_text())["jobs"]
    pythons = matrix["linux"]["strategy"]["matrix"]["python"]
    oldest = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pythons[:1] == oldest


@pytest.mark.skipif(not shutil.which("actionlint"), reason="actionlint is not installed")
def test_actionlint() -> None:
    done = subprocess.run(["actionlint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_changelog_has_the_version() -> None:
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[:2] == ["Unreleased", version]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
