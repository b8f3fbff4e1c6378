"""What declares itself: modules of a folder that have something under one name."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any


def found(package: str, name: str) -> list[Any]:
    """What the modules of a package have under a name, in the order of the modules."""
    path = import_module(package).__path__
    modules = sorted(module.name for module in pkgutil.iter_modules(path))
    loaded = (import_module(f"{package}.{module}") for module in modules if module != "catalog")
    return [getattr(module, name) for module in loaded if hasattr(module, name)]
