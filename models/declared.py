"""The declaration of a model for the experiments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Model:
    """A model of the experiments. Its module lists it in `MODELS`, by its name in configs.

    Attributes:
        make: the function that makes the model.
        reads: the kind of data that it reads, as declared by a data set of `experiments.data`.
        sizes: the arguments of `make` that a config must have as keys of its `model`.
    """

    make: Callable[..., nn.Module]
    reads: str
    sizes: tuple[str, ...] = ()
