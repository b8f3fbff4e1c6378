"""The processes that `torchrun` has started to do one run together."""

from __future__ import annotations

import os


def size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that keeps the records and speaks."""
    return int(os.environ.get("RANK", "0")) == 0
