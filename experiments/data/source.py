"""The interface of a data set: its names, its kind, and how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Kinds of data.
GREY, COLOUR, TEXT, PROBLEM = "grey images", "colour images", "text", "a small problem"


@dataclass(frozen=True)
class Source:
    """A data set. List it in the `SOURCES` of a module in this folder.

    Attributes:
        name: in configs, part of a run's identity.
        label: in tables.
        kind: decides the task and the models.
        whole: whether its results are comparable with the paper's.
    """

    name: str
    label: str
    kind: str
    whole: bool = True

    def knows(self, name: str) -> bool:
        """Whether `name` is this data set or an edition of it."""
        return name == self.name

    def label_of(self, name: str) -> str:
        return self.label

    def is_whole(self, name: str) -> bool:
        return self.whole

    def load(self, name: str, root: str | Path) -> Any:
        """Load the data from the disk; their `source` and `sha256` go into a run's summary.

        Raises:
            FileNotFoundError: the data are not under `root`.
            ValueError: a file has the wrong content.
        """
        raise NotImplementedError

    def resolve(self, name: str, root: str | Path, download: bool) -> str:
        """The name of the data that a run gets if its config names `name`; may download them.

        Raises:
            ValueError: the data are missing and have no replacement.
        """
        try:
            self.load(name, root)
        except FileNotFoundError as error:
            raise ValueError(f"{error}; set data.root or HYPEROPT_DATA to the folder") from None
        return name

    def warning(self, found: str, root: str | Path, download: bool) -> str:
        """The warning for a run that gets `found`, another data set than its config names."""
        raise NotImplementedError
