"""How a level estimates hypergradients, and how it uses them: its `Policy`.

A rule defines how a level moves numbers along a gradient. A level that moves hyperparameters also
has a policy of three parts:

* an `Estimator`: the hypergradient of the last step (the paper), of a long horizon, or as a cosine;
* limits: `Clipping` of the hypergradient, and a trust region (`TRUST`) for the update of the
  weights;
* a `Timing`: the steps in which it moves the hyperparameters below.

Their fields are the keywords of the notation, as in ``SGD(1e-5, horizon=100, clip_norm=1)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .domains import LOG
from .tuning import Hyper, Option

# A derivative smaller than this many units in the last place of its terms counts as 0. For example,
# a beta does not affect the first step, but rounding leaves a remainder. Its cosine would be noise.
# Measured in float32: remainders below 1, other derivatives of betas above 5000.
ROUNDING = 16

# Restart the accumulation when a hyperparameter falls below this fraction of its peak.
# Otherwise the old, large derivatives would decide the sign of the hypergradient for ever.
RESTART_BELOW = 1e-3

# Lower bound on the RMS of the weights in the trust region, so that weights that start at zero can
# move (epsilon_2 of Shazeer and Stern 2018, Adafactor).
MIN_WEIGHT_RMS = 1e-3

# A log lr limit without effect. It must be finite, like all stored numbers.
UNBOUNDED = 1e300


@dataclass(frozen=True)
class Estimator:
    """How a level estimates the hypergradients of the level below.

    The hypergradient of a hyperparameter is g · s. g is the gradient of what the level below moves:
    of the weights, for level 0. s is the *sensitivity*: the derivative of these with respect to the
    raw hyperparameter (S in `hyperopt.algorithm`).

    Attributes:
        horizon: n, the number of updates that s accumulates. With n = 1, as in the paper, s is the
            derivative d of the last update. With n > 1, at the t-th update,
            s <- (1 - 1/min(t, n)) s + d. When any hyperparameter falls below `RESTART_BELOW` of its
            peak, all s and t start again.
        normalize: divide g · s by the norms of both, so that it is a cosine.
        surrogate: divide g · s by the squared norm of the gradient that the last update used. With
            n = 1 this is the gradient of the surrogate (f(x') - f(x)) / ||∇f(x)||², where x' are
            the weights after the update of x (Gao et al. 2025, arXiv 2411.01803; HDM of Chu et al.
            2025, arXiv 2502.11229).
    """

    horizon: float = 1.0
    normalize: bool = False
    surrogate: bool = False

    def init(self, names: Sequence[str], w: Tensor) -> dict[str, Tensor]:
        """The initial state of the estimator, which a level keeps beside the rule's state.

        Args:
            names: the hyperparameters.
            w: the weights, [n].

        Returns:
            one sensitivity [n] for each hyperparameter and, with a long horizon, 0-dim numbers.
        """
        numbers = ["horizon_length", *(f"horizon_peak_{name}" for name in names)]
        numbers = numbers * (self.horizon > 1) + ["last_square"] * self.surrogate
        return {
            **{f"sensitivity_{name}": torch.zeros_like(w) for name in names},
            **{n: torch.zeros((), dtype=torch.float64) for n in numbers},
        }

    def accumulate(
        self, state: Mapping[str, Tensor], values: Mapping[str, Tensor], derivatives: list[Tensor]
    ) -> dict[str, Tensor]:
        """The state of the estimator after one more update.

        Args:
            state: the state before it, from `init` or `accumulate`.
            values: the hyperparameters by name, 0-dim.
            derivatives: those of the update with respect to each raw value, [n] each.
        """
        if self.horizon == 1:
            names = (f"sensitivity_{name}" for name in values)
            return dict(zip(names, derivatives, strict=True))
        values = {name: value.abs() for name, value in values.items()}
        peaks = {n: state[f"horizon_peak_{n}"].maximum(value) for n, value in values.items()}
        restart = torch.stack([v < RESTART_BELOW * peaks[n] for n, v in values.items()]).any()
        length = torch.where(restart, 1.0, state["horizon_length"] + 1)
        kept = 1 - 1 / length.clamp(max=self.horizon)
        after = {"horizon_length": length}
        for (name, value), derivative in zip(values.items(), derivatives, strict=True):
            after[f"sensitivity_{name}"] = kept * state[f"sensitivity_{name}"] + derivative
            after[f"horizon_peak_{name}"] = torch.where(restart, value, peaks[name])
        return after


@dataclass(frozen=True)
class Clipping:
    """Limits of the hypergradient that a level's rule receives. Higher levels see it clipped.

    Attributes:
        clip_value: limit of the absolute value of each element.
        clip_norm: limit of the norm, applied after ``clip_value``.
    """

    clip_value: float = math.inf
    clip_norm: float = math.inf

    def __call__(self, g: Tensor) -> Tensor:
        """Clip a gradient, [n]. Values that are not finite stay, so that the caller sees them."""
        if self.clip_value < math.inf:
            g = torch.where(g.isfinite(), g.clamp(-self.clip_value, self.clip_value), g)
        if self.clip_norm < math.inf:
            norm = torch.linalg.vector_norm(g)
            g = torch.where(norm > self.clip_norm, g * (self.clip_norm / norm), g)
        return g


@dataclass(frozen=True)
class Timing:
    """The steps in which a level moves the hyperparameters below it.

    A trust region still lowers lr in the other steps.

    Attributes:
        every: move in every n-th step, starting with the first.
        until: move only in the first n steps.
    """

    every: int = 1
    until: float = math.inf

    def is_update_step(self, steps: Tensor) -> Tensor | None:
        """Whether the level moves in this step, 0-dim; None if it moves in every step.

        Args:
            steps: the number of earlier steps, 0-dim.
        """
        if self == Timing():
            return None
        return (steps % self.every == 0) & (steps < self.until)


# Upper bound on the norm of one update of the weights, relative to the norm of the weights. lr is
# lowered to meet it. A level above may tune it.
TRUST = Hyper(math.inf, LOG, tuned=False, name="trust")

# The policy's keywords in the notation, in its order.
KEYWORDS: dict[str, Option | Hyper] = {
    "horizon": Option(1.0, low=1, name="horizon"),
    "normalize": Option(False, name="normalize"),
    "surrogate": Option(False, name="surrogate"),
    "trust": TRUST,
    "clip_value": Option(math.inf, low=0, name="clip_value"),
    "clip_norm": Option(math.inf, low=0, name="clip_norm"),
    "every": Option(1, low=1, name="every"),
    "until": Option(math.inf, low=0, name="until"),
}


@dataclass(frozen=True)
class Policy:
    """How a level applies its rule to the hyperparameters below it."""

    estimator: Estimator = Estimator()
    clipping: Clipping = Clipping()
    timing: Timing = Timing()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Policy:
        """Make a policy from the keywords of the notation, except ``trust``."""

        def part(kind: Any) -> Any:
            return kind(**{name: settings[name] for name in kind.__dataclass_fields__})

        return cls(part(Estimator), part(Clipping), part(Timing))


def derivatives(
    update: Callable[[Tensor], tuple[Tensor, Any]],
    raw: Tensor,
    like: Tensor,
    directions: Sequence[Tensor] | None = None,
    traced: bool = True,
) -> tuple[list[Tensor], Any]:
    """Differentiate the new weights along directions of the raw values, in forward mode.

    If the call may be traced, forward mode is reverse mode twice, since tracing torch's own forward
    mode fails.

    Args:
        update: maps raw values to the new weights, [n], and the new state.
        raw: the raw values, [m].
        like: a vector like the weights, [n].
        directions: directions of ``raw``, [m] each; by default the m unit vectors.
        traced: whether the call may be traced.

    Returns:
        one derivative [n] for each direction, and the new state.
    """
    if directions is None:
        directions = units(raw)
    if not traced:

        def along(direction: Tensor) -> Any:
            return torch.func.jvp(update, (raw,), (direction,), has_aux=True)[1:]

        found, state = torch.vmap(along, out_dims=(0, None))(  # type: ignore[arg-type]
            torch.stack([*directions])
        )
        return [*found], state

    def pullback(vector: Tensor) -> tuple[Tensor, Any]:
        _, back, state = torch.func.vjp(update, raw, has_aux=True)  # type: ignore[misc]
        return back(vector)[0], state

    _, forward, state = torch.func.vjp(pullback, like, has_aux=True)  # type: ignore[misc]
    return [forward(d)[0] for d in directions], state


def units(raw: Tensor) -> Sequence[Tensor]:
    """The unit vectors, one for each raw value."""
    return torch.eye(len(raw), dtype=raw.dtype, device=raw.device).unbind()


def cosine(product: Tensor, squared_norm: Tensor, other_squared_norm: Tensor) -> Tensor:
    """An inner product divided by the norms of both vectors; 0 if one is 0."""
    norms = torch.sqrt(squared_norm) * torch.sqrt(other_squared_norm)
    return torch.where(norms > 0, product / norms, product)


def per_square(product: Tensor, squared_norm: Tensor) -> Tensor:
    """An inner product divided by a squared norm; 0 if that is 0."""
    return product * torch.where(squared_norm > 0, torch.reciprocal(squared_norm), 0.0)


def zero_rounding_noise(
    forgets: Sequence[bool],
    values: Callable[[Tensor], Tensor],
    raw: Tensor,
    derivatives: list[Tensor],
    update: Tensor,
) -> list[Tensor]:
    """Set derivatives of an update that are only rounding noise to 0.

    Args:
        forgets: for each hyperparameter, whether it is a forgetting factor, like a beta. Only the
            derivatives of these have terms that can cancel. The terms are about 1 / beta or
            1 / (1 - beta) times the update.
        values: T, the map from raw values to hyperparameters.
        raw: the raw values, [m].
        derivatives: those of the update with respect to each raw value, m vectors [n].
        update: the change of the weights, [n].
    """
    if not any(forgets):
        return derivatives
    h, pullback = torch.func.vjp(values, raw)  # type: ignore[misc]
    (slopes,) = pullback(torch.ones_like(h))
    terms = slopes / torch.minimum(h, 1 - h) * torch.finfo(update.dtype).eps
    least = (ROUNDING * terms) ** 2 * (update * update).sum()
    return [
        torch.where((d * d).sum() > least[i], d, 0.0) if forgets[i] else d
        for i, d in enumerate(derivatives)
    ]


def size_of_update(update: Tensor, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The squared norms of an update and of the weights, 0-dim, for `log_lr_limit`.

    Args:
        update: the change of the weights with an lr of 1, [n]. (With a large lr its square may
            overflow.)
        w: the weights, [n].
        dtype: the dtype of the results.
    """
    squares = (update * update).sum().to(dtype)
    # If the squares overflow or underflow, use an upper bound that does not.
    largest = (update.abs().amax() if update.numel() else update.sum()).to(dtype)
    sound = squares.isfinite() & (squares > 0)
    squares = torch.where(sound, squares, update.numel() * largest * largest)
    return squares, ((w * w).sum() + MIN_WEIGHT_RMS**2 * w.numel()).to(dtype)


def log_lr_limit(update: Tensor, weights: Tensor) -> Tensor:
    """The log lr at which the norm of the update equals that of the weights.

    Args:
        update, weights: the squared norms from `size_of_update`, 0-dim.
    """
    return torch.log(torch.sqrt(weights / update))
