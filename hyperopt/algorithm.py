"""Definition of the paper's algorithm, for one vector of weights and a stack of any height.

Gradient descent can tune its own hyperparameters. The loss depends on the step size through the
last update of the weights, so the step size has a gradient too, and an optimizer can descend it
(Chandra, Xie, Ragan-Kelley and Meijer, NeurIPS 2022, arXiv 1909.13371, section 2).

Level k of a stack has a rule U_k, a state s_k and hyperparameters h_k = T(r_k). Level 0 moves the
weights w. Level k + 1 moves r_k, the raw values of the hyperparameters of level k. One step, with G
the gradient of the loss at w:

1. Hypergradients, from the bottom:

       dr_0 = Gᵀ S_0        dr_{k+1} = dr_kᵀ S_{k+1}

   S_k is the *sensitivity* of level k's output with respect to r_k. In the paper it is the
   derivative of the last update, S_k = ∂U_k/∂r_k. On the first step all S_k are 0. The upper rules
   still run, with gradient 0. Level k + 1 may replace dr_k by a cosine (normalize), divide it by a
   squared norm (surrogate) and clip it. The levels above it see the result.

2. Hyperparameters, from the top: r_k ← U_{k+1}(r_k, dr_k, s_{k+1}; T(r_{k+1})).

3. Weights: w ← U_0(w, G, s_0; T(r_0)).

All earlier values are constants, and so is G. So the model is never differentiated twice.

`hyperopt.HyperOptimizer` computes the same, but fast, in ``_engine/updates.py``. The test
``tests/test_algorithm.py`` compares the two. This module leaves out the trust region, the timing
(``every``, ``until``), the restart of a long horizon, the zeroing of rounding noise before a
cosine, the factor of a scheduler, and parameters without a gradient. If G is not finite, call
`skip` instead of `step`.

    >>> import torch
    >>> from hyperopt import SGD
    >>> w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    >>> levels = start(SGD(0.1) / SGD(0.01), w)
    >>> for _ in range(3):
    ...     w, levels = step(levels, w, gradient=2 * w)  # the loss is w · w
    >>> round(float(hyperparameters(levels[0], levels[0].raw).lr), 4)  # SGD has raised it
    0.3214
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .estimators import Timing, cosine, per_square
from .rule import Rule, Stack, State


class Level(NamedTuple):
    """One optimizer of the stack. It moves a vector x: the weights, or the raw values below it.

    Attributes:
        rule: its update U.
        raw: r, the raw values that the level above moves, [n].
        bounds: lowest and highest values of ``raw``, [2, n].
        places: for each tuned hyperparameter, the index of its value in ``raw``, 0-dim. If it has
            several values: the index for each element of x.
        constants: the values of the other hyperparameters, 0-dim or one for each element of x.
        state: s, the state of the rule.
        sensitivity: S = ∂x/∂r, [elements of x, n].
        updates: the number of updates so far, 0-dim.
        square: the squared norm of the gradient that the last update used, 0-dim.
    """

    rule: Rule
    raw: Tensor
    bounds: Tensor
    places: dict[str, Tensor]
    constants: dict[str, Tensor]
    state: State
    sensitivity: Tensor
    updates: Tensor
    square: Tensor


def hyperparameters(level: Level, raw: Tensor) -> SimpleNamespace:
    """The namespace that a rule reads: h = T(r), and the constants."""
    domains = {name: how.domain for name, how in level.rule.tuned.items()}
    tuned = {name: domains[name].value(raw[place]) for name, place in level.places.items()}
    return SimpleNamespace(**tuned, **level.constants)


def moves(level: Level, x: Tensor) -> Tensor:
    """1 where a raw value moves an element of x, else 0, [elements of x, n]."""
    moved = [one_hot(place.expand(len(x)), len(level.raw)) for place in level.places.values()]
    return torch.stack(moved).sum(0).to(x.dtype)


def hypergradients(levels: Sequence[Level], gradient: Tensor) -> list[Tensor]:
    """The gradient for each level: G for the weights, then dr_0, dr_1, ... for the raw values."""
    gradients = [gradient]
    for level, above in itertools.pairwise(levels):
        g, s = gradients[-1], level.sensitivity
        hypergradient = g @ s
        if above.rule.policy.estimator.normalize:
            hypergradient = cosine(hypergradient, g * g @ moves(level, g), (s * s).sum(0))
        if above.rule.policy.estimator.surrogate:
            hypergradient = per_square(hypergradient, level.square)
        gradients.append(above.rule.policy.clipping(hypergradient))
    return gradients


def horizon(above: Level | None) -> float:
    """The memory of S in updates. The level above sets it; the paper uses 1."""
    return above.rule.policy.estimator.horizon if above else 1


def update(levels: Sequence[Level], k: int, x: Tensor, g: Tensor) -> tuple[Tensor, Level]:
    """Apply x ← U_k(x, g, s_k; T(r_k)), and compute S_k.

    A long horizon accumulates the derivatives of many updates: at the t-th update,
    S ← (1 - 1/min(t, horizon)) S + ∂U/∂r.
    """
    level = levels[k]

    def new(raw: Tensor) -> tuple[Tensor, tuple[Tensor, State]]:
        moved, state = level.rule.update(x, g, level.state, hyperparameters(level, raw))
        return moved, (moved, state)

    derivative, (moved, state) = torch.func.jacrev(new, has_aux=True)(level.raw)
    updates = level.updates + 1
    kept = 1 - 1 / updates.clamp(max=horizon(levels[k + 1] if k + 1 < len(levels) else None))
    sensitivity = kept * level.sensitivity + derivative
    level = level._replace(state=state, sensitivity=sensitivity, updates=updates, square=g @ g)
    return moved, level


def step(levels: Sequence[Level], w: Tensor, gradient: Tensor) -> tuple[Tensor, list[Level]]:
    """Make one step of the whole stack. Returns the new weights and the new levels."""
    gradients, levels = hypergradients(levels, gradient), [*levels]
    for k in reversed(range(1, len(levels))):  # from the top
        below = levels[k - 1]
        raw, levels[k] = update(levels, k, below.raw, gradients[k])
        low, high = below.bounds
        levels[k - 1] = below._replace(raw=raw.clamp(low, high))
        free = (low < raw) & (raw < high)  # a clamped value does not depend on the level above
        levels[k] = levels[k]._replace(sensitivity=free[:, None] * levels[k].sensitivity)
    w, levels[0] = update(levels, 0, w, gradient)
    return w, levels


def skip(levels: Sequence[Level]) -> list[Level]:
    """Skip a step whose gradient is not finite: nothing moves, and the next step takes S = 0.

    A long horizon keeps its S.
    """
    above = [*levels[1:], None]
    return [
        level if horizon(over) > 1 else level._replace(sensitivity=0 * level.sensitivity)
        for level, over in zip(levels, above, strict=True)
    ]


def start(stack: Stack, w: Tensor, owners: Sequence[int] = ()) -> list[Level]:
    """Make the levels of a stack before the first step.

    Args:
        w: the weights, 1-D.
        owners: for hyperparameters per tensor, the number of each weight's tensor.

    Raises:
        ValueError: the stack has a trust region or a timing, which this module leaves out.
    """
    for rule in stack.levels:
        if "trust" in rule.hypers or rule.policy.timing != Timing():
            raise ValueError(f"{rule}: trust, every and until are not part of the definition")
    levels: list[Level] = []
    x, names = w, list[Any](owners)  # the vector that the level moves, each element's owner
    for k, rule in enumerate(stack.levels):
        tuned = rule.tuned if k < stack.height else {}
        raw: list[float] = []
        bounds: list[tuple[float, float]] = []
        below: list[str] = []
        places: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        for name, value in rule.values.items():
            own: dict[Any, Any] = value if isinstance(value, dict) else {None: value}
            per = tuned[name].per if name in tuned else "run"
            of = [*range(len(x))] if per == "element" else names
            if per != "run":
                own = dict.fromkeys(of, value)
            place = 0 if None in own else [[*own].index(each) for each in of]
            if name in tuned:
                places[name] = torch.tensor(place) + len(raw)
                raw += [tuned[name].domain.raw(number) for number in own.values()]
                bounds += [tuned[name].raw_bounds] * len(own)
                below += [name] * len(own)
            else:
                constants[name] = torch.tensor([*own.values()], dtype=torch.float64)[place]
        r = torch.tensor(raw, dtype=torch.float64)
        limits = torch.tensor(bounds, dtype=torch.float64).view(-1, 2).T
        sensitivity = torch.zeros(len(x), len(r), dtype=torch.float64)
        zero = torch.zeros((), dtype=torch.float64)
        state = rule.init(x)
        levels.append(Level(rule, r, limits, places, constants, state, sensitivity, zero, zero))
        x, names = r, below
    return levels
