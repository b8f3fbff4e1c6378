"""What a model declares of itself, beside its class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Model:
    """A model of the experiments. It is one of the `MODELS` of its module, by its name in configs.

    Attributes:
        make: makes it.
        reads: the kind of data that it reads, as a data set of `experiments.data` declares it.
        sizes: the arguments of `make` that a config has to give, as keys of its `model`.
    """

    make: Callable[..., nn.Module]
    reads: str
    sizes: tuple[str, ...] = ()
