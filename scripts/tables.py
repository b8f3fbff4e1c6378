"""Redraw all tables and figures from stored runs, and regenerate the blocks of README and docs.

    python -m scripts.tables
    python -m scripts.tables results=results

The same records give the same files, byte for byte. For the blocks between markers, see
`experiments/studies/prose.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.cli import ROOT, ResultsOptions, asked_for_help, guarded, split
from experiments.files import write_text
from experiments.studies.catalog import studies
from experiments.studies.prose import BLOCK, written


def draw_all(results: Path) -> list[Path]:
    """Draw all studies with runs in a folder; returns the written files.

    Raises:
        ValueError: the folder has no runs, or damaged ones.
    """
    paths = [
        path
        for study in studies()
        for folder in study.folders(results)
        for path in study.draw(folder)
    ]
    if not paths:
        raise ValueError(f"there are no runs in {results}; make reproduce-table1 creates some")
    return paths


def write_pages(results: Path) -> list[Path]:
    """Regenerate the blocks in README and docs; returns the pages with blocks."""
    pages = [*ROOT.glob("README.md"), *sorted((ROOT / "docs").glob("*.md"))]
    found = [page for page in pages if BLOCK.search(page.read_text())]
    for page in found:
        write_text(page, written(page.read_text(), results))
    return found


def main() -> int:
    if asked_for_help(__doc__, ResultsOptions):
        return 0
    options, _ = split(sys.argv[1:], ResultsOptions, ())
    paths = draw_all(Path(options.results))
    if Path(options.results).resolve() == ROOT / "results":
        paths += write_pages(ROOT / "results")
    for path in paths:
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
