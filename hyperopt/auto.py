"""`Auto`: the recommended stack, which needs no learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from .optimizer import HyperOptimizer
from .rules import AdaGrad, ScheduleFreeAdam

# The squares of what a smaller lr adds to the weights are 0 in float32, so that it would stay.
MIN_LR = 1e-20


class Auto(HyperOptimizer):
    """Schedule-Free Adam whose learning rate finds itself, from wherever it starts.

    The logarithm of lr is moved by AdaGrad, against the cosine between the new gradient and what
    lr has added to the weights so far, older steps counting for less: lr grows as long as going on
    in that direction lowers the loss. A hypergradient of one step, as the paper's, asks whether the
    last step did, which the noise of the gradients denies long before lr is as large as it should
    be (Wu et al. 2018, arXiv 1803.02021). For the same reason the weights that gradients are taken
    at are nearly the mean of many steps, which noise reaches less than single ones (Defazio et al.
    2024, arXiv 2405.15682); they are those to use when training ends, with no mode to switch. What
    lr adds in one step is at most a tenth of the weights, by their norms.

    Args:
        params: parameters or param groups, as `HyperOptimizer` takes them.
        lr: where the learning rate starts. The default does no harm to weights that were trained
            before; from 1.0 the first update is as large as it may be, which saves new weights some
            ten steps in which lr only grows.
        weight_decay: decoupled from the gradient, as that of AdamW and Schedule-Free AdamW. Param
            groups may have one of their own.
        compile: as in `HyperOptimizer`.

    Raises:
        ValueError, TypeError: an ``lr`` that is not above `MIN_LR`, and as `HyperOptimizer` does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        *,
        weight_decay: float = 0.0,
        compile: bool = True,
    ) -> None:
        _check(lr)
        above = AdaGrad(
            1.0, initial_accumulator_value=0.1, horizon=float("inf"), normalize=True, trust=0.1
        )
        lowest = ScheduleFreeAdam(lr, weight_decay=weight_decay, r=8)["lr: log"]
        super().__init__(params, lowest / above, compile=compile)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `HyperOptimizer`; an ``lr`` of its own is held to what is said of `Auto`'s."""
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
