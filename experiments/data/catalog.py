"""All data sets by their names: what they are called, and where they are found."""

from __future__ import annotations

from pathlib import Path

from experiments.data import corpus, images


def label(name: str) -> str:
    """What a data set is called in tables."""
    return corpus.label(name) if corpus.is_book(name) else images.LABELS[name]


def is_whole(name: str) -> bool:
    """Whether it is a data set of the paper, and not a part or another edition of one."""
    return name in (*images.SHA256, corpus.NAME)


def resolve(name: str, root: str | Path, download: bool = True) -> str:
    """The name of the data that a run asking for `name` gets.

    "mnist-5k" stands in where MNIST cannot be had; the book's name says which edition it is. The
    data are downloaded if they are nowhere on the disk and `download` is set.

    Raises:
        ValueError: an unknown name, a file that does not hold what its name says, or data that
            cannot be had and for which nothing stands in.
    """
    found = corpus if corpus.is_book(name) else images
    return found.resolve(name, root, download)
