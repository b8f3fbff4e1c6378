"""What a data set declares: its names, what it consists of, where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Kinds of data.
GREY, COLOUR, TEXT, PROBLEM = "grey images", "colour images", "text", "a small problem"


@dataclass(frozen=True)
class Source:
    """A data set. It is one of the `SOURCES` of a module in this folder, and is found there.

    Attributes:
        name: in configs, part of a run's identity.
        label: in tables.
        kind: what it consists of, which decides the task and the models.
        whole: whether results from it may stand beside the paper's.
    """

    name: str
    label: str
    kind: str
    whole: bool = True

    def knows(self, name: str) -> bool:
        """Whether a name is that of this data set, or of an edition of it."""
        return name == self.name

    def label_of(self, name: str) -> str:
        return self.label

    def is_whole(self, name: str) -> bool:
        return self.whole

    def load(self, name: str, root: str | Path) -> Any:
        """The data from the disk, with `source` and `sha256`, which go into a run's summary.

        Raises:
            FileNotFoundError: they are not under `root`.
            ValueError: a file does not hold what its name says.
        """
        raise NotImplementedError

    def resolve(self, name: str, root: str | Path, download: bool) -> str:
        """The name of the data that a run asking for `name` gets, downloaded if need be.

        Raises:
            ValueError: they cannot be had, and nothing stands in for them.
        """
        try:
            self.load(name, root)
        except FileNotFoundError as error:
            raise ValueError(f"{error}; set data.root or HYPEROPT_DATA to the folder") from None
        return name

    def warning(self, found: str, root: str | Path, download: bool) -> str:
        """What a run is told where it gets `found`, another data set than it asked for."""
        raise NotImplementedError
