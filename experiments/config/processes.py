"""The processes that `torchrun` has started for one run."""

from __future__ import annotations

import os


def size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes the records and prints."""
    return int(os.environ.get("RANK", "0")) == 0
