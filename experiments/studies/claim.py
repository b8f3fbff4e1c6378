"""What the paper claims, beside what was found: the lines that a study's report gives of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.studies.curves import Run, of


@dataclass(frozen=True)
class Claim:
    """A line of what the paper claims: its value, ours, and whether they agree."""

    dataset: str
    setting: str
    scale: str  # the paper's, or reduced
    metric: str
    published: str
    ours: str
    n: int
    verdict: str  # yes, no, or empty where it is not judged
    runs: str  # their hashes


def scale(papers: bool) -> str:
    """Whether a setting is the paper's, in words."""
    return "the paper's" if papers else "reduced"


def paired(runs: Sequence[Run], *cells: Any) -> tuple[int, str]:
    """How many seeds all of some cells have, and the hashes of the runs with these."""
    seeds = set.intersection(*({run.seed for run in of(runs, cell)} for cell in cells))
    found = [run for cell in cells for run in of(runs, cell) if run.seed in seeds]
    return len(seeds), " ".join(run.summary["hash"] for run in found)
