"""Draw every table and figure from the records of the runs, without training, and write the pages.

    python -m scripts.tables
    python -m scripts.tables results=results

README and docs say of the results of the repository what is between their markers; see
`experiments/studies/prose.py`. The same records give the same files, byte for byte.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.cli import ROOT, asked_for_help, guarded, split
from experiments.files import write_text
from experiments.studies.catalog import studies
from experiments.studies.prose import BLOCK, written


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    results: str = "results"


def draw_all(results: Path) -> list[Path]:
    """Draw all that a folder has the runs of; returns what was written.

    Raises:
        ValueError: it has none, or some that cannot be read.
    """
    paths = [
        path
        for study in studies()
        for folder in study.folders(results)
        for path in study.draw(folder)
    ]
    if not paths:
        raise ValueError(f"there are no runs in {results}; make reproduce-table1 makes some")
    return paths


def write_pages(results: Path) -> list[Path]:
    """Write into README and docs what they say of the results; returns those that have blocks."""
    pages = [*ROOT.glob("README.md"), *sorted((ROOT / "docs").glob("*.md"))]
    found = [page for page in pages if BLOCK.search(page.read_text())]
    for page in found:
        write_text(page, written(page.read_text(), results))
    return found


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    paths = draw_all(Path(options.results))
    if Path(options.results).resolve() == ROOT / "results":
        paths += write_pages(ROOT / "results")
    for path in paths:
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
