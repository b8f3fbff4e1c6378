"""What the paper claims, beside what was found: the lines that a study's report gives of it."""

from __future__ import annotations

from dataclasses import dataclass


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
