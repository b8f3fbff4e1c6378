"""Train a study's runs, and draw its tables and figures.

    python -m experiments.studies
    python -m experiments.studies table1 preset=quick
    python -m experiments.studies table1 --help
    python -m experiments.studies all preset=quick

The first command lists the studies. The last does all studies with this preset, one after the
other. Finished runs are not repeated.
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
    if arguments[0] != "all":
        return find(arguments[0]).main(arguments[1:])
    given = dict(argument.partition("=")[::2] for argument in arguments[1:])
    chosen = [study for study in studies() if given.get("preset", "") in study.presets]
    if not chosen:
        raise ValueError("no study has this preset; give one such as preset=quick")
    return max(study.main(arguments[1:]) for study in chosen)


if __name__ == "__main__":
    sys.exit(guarded(main))
