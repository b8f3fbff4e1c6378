"""Plug-in discovery: find all modules of a package that define a given name."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any


def found(package: str, name: str) -> list[Any]:
    """Return `name` from each module of a package that defines it, in the order of the modules."""
    path = import_module(package).__path__
    modules = sorted(module.name for module in pkgutil.iter_modules(path))
    loaded = (import_module(f"{package}.{module}") for module in modules if module != "catalog")
    return [getattr(module, name) for module in loaded if hasattr(module, name)]
