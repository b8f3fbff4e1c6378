"""All studies: the `STUDY` in the `runs.py` of each folder here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.cli import did_you_mean

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.parent.name for path in FOLDER.glob("*/runs.py"))


def find(name: str) -> Any:
    """Return the study of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in names():
        raise ValueError(f"there is no study {name!r}; {did_you_mean(name, names())}")
    return import_module(f"experiments.studies.{name}.runs").STUDY


def studies() -> Iterator[Any]:
    yield from map(find, names())
