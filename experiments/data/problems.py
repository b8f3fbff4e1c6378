"""Data of the suite's small problems.

A problem generates its data from fixed seeds, or takes them from another data set; see
`experiments/tasks/problems.py`. This module loads that data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.data import corpus, images
from experiments.data.source import PROBLEM, Source


@dataclass(frozen=True)
class Material:
    """The data of a problem.

    Attributes:
        data: the data set; None if the problem generates its own.
        source, sha256: of `data`.
    """

    name: str
    data: Any = None
    source: str = "synthetic"
    sha256: str | None = None


@dataclass(frozen=True)
class Problem(Source):
    """A problem, and the name of its data set."""

    needs: str | None = None

    def load(self, name: str, root: str | Path) -> Material:
        if self.needs is None:
            return Material(name)
        data = _source(self.needs).load(self.needs, root)
        return Material(name, data, data.source, data.sha256)

    def resolve(self, name: str, root: str | Path, download: bool) -> str:
        if self.needs is not None:
            found = _source(self.needs).resolve(self.needs, root, download)
            if found != self.needs:
                raise ValueError(f"{name} needs {self.needs}, but only {found} was found")
        return name


def _source(name: str) -> Source:
    return next(s for s in (*images.SOURCES, *corpus.SOURCES) if s.knows(name))


SOURCES = (
    Problem("problem-table", "noisy regression on a table", PROBLEM),
    Problem("problem-picture", "full-batch fit of a picture by sines", PROBLEM),
    Problem("problem-finetune", "fine-tuning on few digits", PROBLEM, needs="mnist-5k"),
    Problem("problem-ratings", "matrix factorisation, Zipf rows", PROBLEM),
    Problem("problem-vae", "VAE of digits", PROBLEM, needs="mnist-5k"),
    Problem("problem-convnet", "convnet, group norm", PROBLEM, needs="cifar10"),
    Problem("problem-transformer", "transformer, tied embeddings", PROBLEM, needs="war_and_peace"),
    Problem("problem-change", "task that changes at half time", PROBLEM),
    Problem("problem-cartpole", "actor-critic on cart-pole", PROBLEM),
    Problem("problem-stiff", "physics-informed fit, stiff", PROBLEM),
)
