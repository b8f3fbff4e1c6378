"""All data sets by their names: the `SOURCES` of the modules in this folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from experiments.data.source import Source
from experiments.found import found


@functools.lru_cache(maxsize=1)
def sources() -> tuple[Source, ...]:
    return tuple(source for each in found("experiments.data", "SOURCES") for source in each)


def find(name: str) -> Source:
    """Return the data set of this name.

    Raises:
        ValueError: an unknown name.
    """
    for source in sources():
        if source.knows(name):
            return source
    known = ", ".join(source.name for source in sources())
    raise ValueError(f"there is no data set {name!r}; known are {known}")


def label(name: str) -> str:
    """The label of a data set in tables."""
    return find(name).label_of(name)


@functools.lru_cache(maxsize=1)
def load(name: str, root: str | Path) -> Any:
    """Load a data set from the disk; the last one stays in memory. See `Source.load`."""
    return find(name).load(name, root)


def resolve(name: str, root: str | Path, download: bool = True) -> str:
    """The name of the data that a run gets if its config names `name`. See `Source.resolve`."""
    return find(name).resolve(name, root, download)
