"""Warnings of this package."""

from __future__ import annotations

import os
import sys
import warnings

import torch

# Warnings skip the stack frames of code in these folders.
_INSIDE = tuple(os.path.dirname(path) + os.sep for path in (__file__, torch.__file__))


class HyperoptWarning(UserWarning):
    """The category of all warnings of this package, for `warnings.filterwarnings`."""


def warn_user(text: str) -> None:
    """Warn, and name the caller's line: the nearest one outside this package and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, HyperoptWarning, stacklevel=level)
