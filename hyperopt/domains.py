"""Domains: maps T from the raw values that a level moves to the hyperparameters that a rule uses.

A hyperparameter h is stored as a raw value r, and h = T(r). The level above moves r freely. The
unit and square domains are those of the paper's own code. Log is the usual choice for a step size
that may have to change by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Domain:
    """A smooth map T from the real line onto the legal values of a hyperparameter.

    Creating a Domain registers its name for the notation, for copies and for pickles.

    Attributes:
        name: its name in the notation, as in ``Adam(0.001)[lr: log]``.
        value: T, elementwise on a tensor of raw values of any shape.
        raw: the inverse of T for one number.
        low, high: the image of T is the open interval (low, high). For ``square`` it includes 0.
        reach: the largest absolute raw value. Beyond it, T would round to an end of its image, or h
            or its square would overflow.

    Raises:
        ValueError: a built-in domain has this name.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    raw: Callable[[float], float]
    low: float = -math.inf
    high: float = math.inf
    reach: float = 1e150

    def __post_init__(self) -> None:
        if self.name in OURS:
            raise ValueError(f"there is a domain {self.name!r} already; give this one another name")
        DOMAINS[self.name] = self

    def __reduce__(self) -> tuple:
        return domain, (self.name,)  # copies and pickles are the same object

    def __contains__(self, value: float) -> bool:
        return self.low < value < self.high or (self is SQUARE and value == 0)


DOMAINS: dict[str, Domain] = {}
OURS: frozenset[str] = frozenset()

REAL = Domain("real", lambda r: r, lambda h: h)
UNIT = Domain(
    "unit", lambda r: (torch.tanh(r) + 1) / 2, lambda h: math.atanh(2 * h - 1), 0.0, 1.0, reach=18
)
SQUARE = Domain("square", lambda r: r * r, math.sqrt, low=0.0, reach=1e75)
LOG = Domain("log", torch.exp, math.log, low=0.0, reach=345)

OURS = frozenset(DOMAINS)


def domain(name: str) -> Domain:
    """Look up a domain by its name.

    Raises:
        ValueError: no domain has this name, because the module that makes it was not imported.
    """
    if name not in DOMAINS:
        raise ValueError(f"there is no domain {name!r}; import the module that makes it first")
    return DOMAINS[name]
