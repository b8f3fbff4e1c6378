"""Stacks that several studies train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperopt import Auto, Rule

# A level of each rule, with the published package's constants.
LEVELS = {"SGD": "SGD({lr})", "Adam": "Adam({lr}, v0=1e-8)"}
STARTS = tuple(float(f"{10 ** (k / 2):.4g}") for k in range(-16, 5))  # 1e-8 to 1e2


@dataclass(frozen=True)
class MethodCell:
    """A cell of a study that compares methods from several lrs.

    Attributes:
        task, method: their names in the study.
        start: the initial lr; None for a method without one.
    """

    task: str
    method: str
    start: float | None

    @property
    def label(self) -> str:
        start = "" if self.start is None else f" from {self.start:g}"
        return f"{self.method}{start}, {self.task}"


def tower(rule: str, height: int, lr: float | str) -> str:
    """A tower of one rule; all levels start at one lr, or at the placeholder "{lr}"."""
    return " / ".join([LEVELS[rule].format(lr=lr)] * (height + 1))


def auto(
    lr: float | None = None, rule: type[Rule] | None = None, domain: str = "log", **options: Any
) -> str:
    """`Auto`'s stack; optionally another rule, another domain of lr, or other top-level options."""
    start = {} if lr is None else {"lr": lr}
    lowest, above = Auto.make_stack(**start).levels
    if rule is not None:
        lowest = rule(lowest.values["lr"])
    top = type(above)(**{**above.values, **above.settings, **options})
    return str(lowest[f"lr: {domain}"] / top)
