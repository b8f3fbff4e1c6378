"""Train what a study needs, and draw its tables and figures.

    python -m experiments.studies
    python -m experiments.studies table1 preset=quick
    python -m experiments.studies table1 --help

The first lists the studies. Runs that are finished are not done again.
"""

from __future__ import annotations

import sys

from experiments.cli import guarded
from experiments.studies.catalog import find, studies


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        for study in studies():
            print(f"  {study.name:12} {(study.doc or '').partition(chr(10))[0]}")
        return 0
    return find(arguments[0]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(guarded(main))
