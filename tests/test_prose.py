"""The generated blocks of README and docs match the results."""

from pathlib import Path

import pytest

from experiments.cli import ROOT
from experiments.studies.prose import BLOCK, wrapped, written

RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_writing_a_page_again_changes_nothing(page: Path) -> None:
    """If this fails, run `make tables`."""
    text = page.read_text()
    assert written(text, RESULTS) == text


def test_the_readme_and_the_page_of_auto_have_blocks() -> None:
    blocks = {page.name: len(BLOCK.findall(page.read_text())) for page in PAGES}
    assert blocks["README.md"] >= 1 and blocks["reproduce.md"] >= 7
    assert blocks["start-anywhere.md"] >= 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("table1/paper/nothing", "no results in .*table1/paper for the block table1/paper/nothing"),
        ("table1/none/rows", "no results in .*table1/none for"),
        ("table9/paper/rows", "there is no study 'table9'; did you mean table1"),
        ("lines table1/paper surface/paper", "no results in .* for the block surface/paper/line"),
    ],
)
def test_an_unknown_block_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        written(f"<!-- begin {name} -->\n<!-- end -->", RESULTS)


def test_only_what_is_between_markers_is_written() -> None:
    text = "before\n<!-- begin table1/paper/rows -->\nold\n<!-- end -->\nafter\n"
    new = written(text, RESULTS)
    assert new.startswith("before\n<!-- begin") and new.endswith("<!-- end -->\nafter\n")
    assert "old" not in new and "| `SGD(0.01)` | 8.99 ± 0.05 |" in new


def test_a_table_has_a_line_for_each_folder() -> None:
    new = written("<!-- begin lines table1/paper figure2/cpu -->\n<!-- end -->", RESULTS)
    _, heads, _, first, second, _ = new.splitlines()
    assert heads == "| Experiment | The paper | Here |"
    assert first.startswith("| [Table 1: MLP, MNIST](results/table1/paper/README.md) | ")
    assert first.count("|") == second.count("|") == 4 and "figure2/cpu" in second


def test_paragraphs_are_wrapped_and_tables_are_not() -> None:
    long = "word " * 40
    text = wrapped(f"{long}\n\n| {long} |")
    assert max(map(len, text.split("\n\n")[0].splitlines())) <= 100
    assert text.endswith(f"| {long} |")
