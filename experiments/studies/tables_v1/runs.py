"""Tables 1 and 2 of the paper's first version (arXiv 1909.13371v1): one epoch, three seeds a row.

python -m experiments.studies tables_v1
python -m experiments.studies tables_v1 data.root=data store=runs results=results
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.config.compose import compose
from experiments.studies.study import Part, Preset, Request, Study, each_seed

REFERENCE = Path(__file__).with_name("published.csv")
Row = dict[str, str]  # a line of the published tables


def reference() -> list[Row]:
    """Read the rows of the published tables, in their order, from published.csv.

    They have the test accuracy in percent of one run, and ms of a step on a 2.4 GHz laptop core.
    """
    with open(REFERENCE, newline="") as file:
        return list(csv.DictReader(file))


def notation(row: str) -> str:
    """The stack of a row of the published tables, with the paper's constants.

    A level "per hyperparameter" has a step size for each hyperparameter of the Adam below it.
    """

    def per_hyperparameter(match: re.Match) -> str:
        sizes = ", ".join(f"{name}: {match[1]}" for name in ("lr", "beta1", "beta2"))
        return f"SGD({{{sizes}}})"

    stack = re.sub(r"SGD\(([^),]+), per hyperparameter\)", per_hyperparameter, row)
    return re.sub(r"Adam\((.*?)\)", r"Adam(\1, v0=1e-8)", stack)


def parts(request: Request) -> Iterator[Part]:
    """The runs of both tables."""
    base = compose(["experiment=tables_v1", *request.overrides])
    rows = ((row, notation(row["stack"]), row["stack"]) for row in reference())
    yield Part([each_seed(request, base, rows)])


def line(row: Row, summary: dict[str, Any]) -> dict[str, Any]:
    """A run in the CSV."""
    made = summary["provenance"]
    return {
        "table": row["table"],
        "row": row["stack"],
        "stack": summary["stack"],
        "data": summary["data"],
        "epochs": summary["epochs"],
        "device": made["device"],
        "seed": summary["seed"],
        "hash": summary["hash"],
        "test_accuracy": round(100 - summary["test_error"], 6),
        "ms_per_step": 1000 * made["seconds_per_step"],
        "diverged": summary["diverged"],
    }


PRESETS = {"paper": Preset(), "quick": Preset(seeds=(0,))}
STUDY = Study("tables_v1", PRESETS, parts, __doc__, line)
