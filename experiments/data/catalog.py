"""All data sets by their names. Each module of this folder that has `SOURCES` is found here."""

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
    """The data set of a name.

    Raises:
        ValueError: there is none.
    """
    for source in sources():
        if source.knows(name):
            return source
    known = ", ".join(source.name for source in sources())
    raise ValueError(f"there is no data set {name!r}; known are {known}")


def label(name: str) -> str:
    """What a data set is called in tables."""
    return find(name).label_of(name)


@functools.lru_cache(maxsize=1)
def load(name: str, root: str | Path) -> Any:
    """The data set of a name, from the disk; the last one is kept in memory. See `Source.load`."""
    return find(name).load(name, root)


def resolve(name: str, root: str | Path, download: bool = True) -> str:
    """The name of the data that a run asking for `name` gets. See `Source.resolve`."""
    return find(name).resolve(name, root, download)
