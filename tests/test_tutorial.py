"""The tutorial runs from top to bottom, and its committed outputs are right."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from test_project import ROOT

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
nbformat: Any = pytest.importorskip("nbformat")


def printed(notebook: Any) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.text for output in outputs if output.output_type == "stream")


def figures(notebook: Any) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check(notebook: Any) -> None:
    """The tower beats plain SGD; from both broken starts Auto recovers and Adam does not."""
    text = printed(notebook)
    (pair,) = re.findall(r"plain SGD ([\d.]+) %, tower ([\d.]+) %", text)
    plain, tower = map(float, pair)
    assert tower < plain / 1.5
    rows = re.findall(r"^ +(1e-07|100) +([\d.]+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    assert [start for start, *_ in rows] == ["1e-07", "100"]
    for _, adam, _, auto in rows:
        assert float(adam) > 80 and float(auto) < 8
    assert figures(notebook) == 2


def test_the_committed_tutorial_shows_the_results() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    check(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings about Jupyter's own code
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient: Any = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)  # this checkout, wherever the tests are run
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute(cwd=tmp_path)
    check(notebook)
