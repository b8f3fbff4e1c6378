"""The paper's claims beside our results, as a study's report lists them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: its value, ours, and whether they agree."""

    dataset: str
    setting: str
    scale: str  # the paper's, or reduced
    metric: str
    published: str
    ours: str
    n: int
    verdict: str  # yes, no, or empty if not judged
    runs: str  # hashes


def scale(papers: bool) -> str:
    """The name of the paper's setting, or of a reduced one."""
    return "the paper's" if papers else "reduced"
