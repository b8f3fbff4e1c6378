"""Warnings of this package."""

from __future__ import annotations

import os
import sys
import warnings

import torch

# The folders of the code between a user's line and a warning.
_INSIDE = tuple(os.path.dirname(path) + os.sep for path in (__file__, torch.__file__))


class HyperoptWarning(UserWarning):
    """The category of all warnings of this package, for `warnings.filterwarnings`."""


def warn_user(text: str) -> None:
    """Warn with the line outside of this package and of torch that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, HyperoptWarning, stacklevel=level)
