"""Draw every table and figure from the records of the runs, without training.

    python -m scripts.tables
    python -m scripts.tables results=results

The same records give the same files, byte for byte.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.cli import asked_for_help, guarded, split
from experiments.studies.catalog import studies


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


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    for path in draw_all(Path(options.results)):
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
