"""The documentation site: the code of its pages runs, all public names are on it, and it builds."""

import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import Digits
from test_project import ROOT, make_targets

import hyperopt
from hyperopt import DOMAINS, RULES, HyperOptimizer, parse
from hyperopt.estimators import KEYWORDS

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# Pages that tests/test_docs.py follows, and the one whose code is for a cluster.
FOLLOWED = {f"add-a-{what}.md" for what in ("logger", "model", "rule", "study")}
FOLLOWED |= {"start-anywhere.md", "sweeps.md"}
HERE = [page for page in PAGES if page.name not in FOLLOWED]
# A comment before a block gives the reason not to run it, or asks for a new model.
BLOCK = re.compile(
    r"^(?:<!-- (not run: .+|fresh model) -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")  # what other packages say of their own code
def test_the_code_of_a_page_runs(
    page: Path, mnist: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    torch.manual_seed(0)
    x = mnist.x_train[:320].flatten(1).float() / 255
    batches = list(zip(x.split(32), mnist.y_train[:320].split(32), strict=True))

    def new_model() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(784, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)
        )

    names: dict[str, Any] = {
        "__name__": f"page_{page.stem.replace('-', '_')}",
        "model": new_model(),
        "loader": batches,
        "loss_fn": torch.nn.CrossEntropyLoss(),
        "x": batches[0][0],
        "y": batches[0][1],
    }
    text = page.read_text()
    with patch.dict(RULES), patch.dict(DOMAINS):
        for match in BLOCK.finditer(text):
            mark, kind, code = match.groups()
            if kind != "python" or (mark or "").startswith("not run"):
                continue
            if mark == "fresh model":
                names["model"] = new_model()
            line = text[: match.start(3)].count("\n")
            exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.name)
def test_commands_of_a_page_are_known(page: Path) -> None:
    for mark, kind, code in BLOCK.findall(page.read_text()):
        assert kind in {"python", "sh"}
        assert kind == "python" or mark.startswith("not run: ")
        for target in re.findall(r"^make ([\w-]+)", code, re.MULTILINE) if kind == "sh" else ():
            assert target in make_targets()


def test_the_api_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text()
    rules = (DOCS / "rules.md").read_text()
    missing = []
    for name in hyperopt.__all__:
        if name in RULES:
            section = rules.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
            needed = ("\n$$ ", f"<!-- arguments: {name} -->", "```python", "*Reference:*")
            assert [part for part in needed if part not in section] == [], name
        elif name in ("DOMAINS", "RULES"):
            assert f"`{name}`" in text + rules
        else:
            missing += [name] * (f"::: hyperopt.{name}\n" not in text)
    assert missing == []
    for name in KEYWORDS:
        assert f"| `{name}=" in text, name


@pytest.mark.parametrize("name", sorted(set(hyperopt.__all__) - {"DOMAINS", "RULES"}))
def test_public_names_have_docstrings(name: str) -> None:
    assert inspect.getdoc(getattr(hyperopt, name))


def test_stacks_of_the_pages_parse() -> None:
    found = []
    for page in HERE:
        rule = rf"(?:{'|'.join(RULES)})\([^`…]*\)"
        found += re.findall(rf"`({rule}(?:\[[^`]+\])? / [^`…]+)`", page.read_text())
    assert len(found) > 15
    for stack in found:
        if '"' not in stack:  # else it is Python, and a block runs the like of it
            parse(stack)


def test_auto_is_the_stack_that_its_page_writes() -> None:
    text = (DOCS / "start-anywhere.md").read_text()
    (stack,) = re.findall(r"^    (ScheduleFreeAdam.*)$", text, re.MULTILINE)
    optimizer: HyperOptimizer = hyperopt.Auto(torch.nn.Linear(1, 1).parameters())
    assert optimizer.stack == parse(stack)


@pytest.mark.skipif(not find_spec("mkdocs"), reason="needs the extra docs: make docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: a broken link or anchor, or a name without a page, is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "GITHUB_REPOSITORY": "somebody/project"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "rules" / "index.html").read_text()
    assert rules.count('display="block"') >= len(RULES) and "arithmatex" not in rules
    assert (tmp_path / "results" / "table1" / "paper" / "figure.png").is_file()
    tutorial = (tmp_path / "tutorial" / "index.html").read_text()
    assert (tmp_path / "tutorial.ipynb").is_file() and 'href="../tutorial.ipynb"' in tutorial
    assert len(re.findall(r'<img [^>]*src="figure\d\.png"', tutorial)) == 2
    colab = "colab.research.google.com/github/somebody/project/blob/main/docs/tutorial.ipynb"
    assert colab in tutorial
    assert 'href="../tutorial/"' in (tmp_path / "guide" / "index.html").read_text()
