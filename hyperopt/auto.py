"""`Auto`: the recommended stack, which needs no learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .optimizer import HyperOptimizer
from .rules import AdaGrad, Adam


class Auto(HyperOptimizer):
    """Adam whose learning rate finds itself, from wherever it starts.

    The logarithm of lr is moved by AdaGrad, against the cosine between the new gradient and the way
    from the mean of all earlier weights to the present ones: lr grows as long as going on from that
    mean lowers the loss. A hypergradient of one step, as the paper's, asks whether the last step
    did, which the noise of the gradients denies long before lr is as large as it should be (Wu et
    al. 2018, arXiv 1803.02021). No update is larger than a tenth of the weights, by their norms.

    Args:
        params: parameters or param groups, as `HyperOptimizer` takes them.
        lr: where the learning rate starts. The default does no harm to weights that were trained
            before; from 1.0 the first update is as large as it may be, which saves new weights some
            ten steps in which lr only grows.
        compile: as in `HyperOptimizer`.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-5, *, compile: bool = True) -> None:
        above = AdaGrad(
            1.0, initial_accumulator_value=1.0, horizon=float("inf"), normalize=True, trust=0.1
        )
        super().__init__(params, Adam(lr)["lr: log"] / above, compile=compile)
