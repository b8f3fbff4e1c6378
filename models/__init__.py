"""The models of the experiments, collected from `MODELS` of each module in this folder."""

import pkgutil
from importlib import import_module

from models.declared import Model

MODELS: dict[str, Model] = {
    name: model
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__))
    for name, model in getattr(import_module(f"models.{module}"), "MODELS", {}).items()
}
