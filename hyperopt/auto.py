"""`Auto`: the recommended stack. It needs no learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from .optimizer import HyperOptimizer
from .rules import AdaGrad, ScheduleFreeAdam

# With a smaller lr, the squares of an update are 0 in float32, and lr would never move.
MIN_LR = 1e-20


class Auto(HyperOptimizer):
    """Schedule-Free Adam that finds its learning rate from any start.

    AdaGrad moves the logarithm of lr. Its gradient is the cosine between the new gradient and the
    sensitivity of the weights to log lr, in which recent steps count for more. So lr grows while
    that direction still lowers the loss. The paper's hypergradient sees only the last step; the
    noise of the gradients then makes lr fall too early (Wu et al. 2018, arXiv 1803.02021). For the
    same reason the weights are nearly the mean of many steps, which has less noise (Defazio et al.
    2024, arXiv 2405.15682). Use them as they are when training ends: there is no mode to switch.
    One step adds at most a tenth of the weights, by norms.

    Args:
        params: parameters or param groups, as `HyperOptimizer` takes them.
        lr: where the learning rate starts. The default does no harm to pretrained weights. From 1.0
            the first update is as large as allowed, which saves new weights about ten steps in
            which lr only grows.
        weight_decay: decoupled from the gradient, as that of AdamW and Schedule-Free AdamW. Param
            groups may have one of their own.
        compile: as in `HyperOptimizer`.

    Raises:
        ValueError, TypeError: an ``lr`` below `MIN_LR`; otherwise as `HyperOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        *,
        weight_decay: float = 0.0,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        _check(lr)
        above = AdaGrad(
            1.0, initial_accumulator_value=0.1, horizon=float("inf"), normalize=True, trust=0.1
        )
        lowest = ScheduleFreeAdam(lr, weight_decay=weight_decay, r=8)["lr: log"]
        super().__init__(params, lowest / above, compile=compile)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `HyperOptimizer`; a group's own ``lr`` is checked like `Auto`'s."""
        if isinstance(param_group, dict):
            _check(param_group.get("lr", MIN_LR))
        super().add_param_group(param_group)


def _check(lr: Any) -> None:
    if isinstance(lr, Tensor) and lr.numel() == 1:  # as a param group of ours shows it
        lr = float(lr)
    if not isinstance(lr, Real) or not MIN_LR <= float(lr) < math.inf:
        raise ValueError(
            f"Auto: lr must be a number from {MIN_LR:g} up, but is {lr!r}; where none is known, "
            "leave it out"
        )
