"""`Auto`: the recommended stack. It needs no learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from .optimizer import HyperOptimizer
from .rule import Stack
from .rules import AdaGrad, ScheduleFreeAdam

# With a smaller lr, the square of an update is 0 in float32, so that lr could never move.
MIN_LR = 1e-20


class Auto(HyperOptimizer):
    """Schedule-Free Adam that finds its learning rate from any start.

    AdaGrad moves log lr. Its gradient is the cosine between the new gradient and the sensitivity
    of the weights to log lr. Recent steps count more in this sensitivity. So lr grows while that
    direction still lowers the loss. The paper's hypergradient sees only the last step. The noise of
    the gradients then makes lr fall too early (Wu et al. 2018, arXiv 1803.02021). For the same
    reason the weights are close to a mean over many steps, which has less noise (Defazio et al.
    2024, arXiv 2405.15682). Use the weights as they are when training ends: no mode needs to be
    switched. The norm of one update is at most a tenth of the norm of the weights.

    Args:
        params: parameters or param groups, as for `HyperOptimizer`.
        lr: the initial learning rate. The default does no harm to pretrained weights. With 1.0 the
            first update is as large as allowed. For new weights this saves about ten steps in which
            lr only grows.
        weight_decay: decoupled from the gradient, as in AdamW and Schedule-Free AdamW. A param
            group may override it.
        compile: as for `HyperOptimizer`.

    Raises:
        ValueError: an ``lr`` below `MIN_LR`, or an error of `HyperOptimizer`.
        TypeError: as for `HyperOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        *,
        weight_decay: float = 0.0,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(params, self.make_stack(lr, weight_decay), compile=compile)

    @staticmethod
    def make_stack(lr: float = 1e-5, weight_decay: float = 0.0) -> Stack:
        """The stack, to print it or to build another one from it. The arguments are `Auto`'s."""
        _check(lr)
        above = AdaGrad(
            1.0, initial_accumulator_value=0.1, horizon=float("inf"), normalize=True, trust=0.1
        )
        return ScheduleFreeAdam(lr, weight_decay=weight_decay, r=8)["lr: log"] / above

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters as in `HyperOptimizer`. The group's ``lr`` must be `MIN_LR` or more."""
        if isinstance(param_group, dict):
            _check(param_group.get("lr", MIN_LR))
        super().add_param_group(param_group)


def _check(lr: Any) -> None:
    if isinstance(lr, Tensor) and lr.numel() == 1:  # a param group holds it as a tensor
        lr = float(lr)
    if not isinstance(lr, Real) or not MIN_LR <= float(lr) < math.inf:
        raise ValueError(
            f"Auto: lr must be a number from {MIN_LR:g} up, but is {lr!r}; without an "
            "estimate, leave it out"
        )
