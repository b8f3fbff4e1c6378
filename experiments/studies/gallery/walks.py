"""Two-dimensional surfaces, and the paths of optimization methods on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from hyperopt import HyperOptimizer

STEPS = 150
GRID = tuple(m * 10.0**k for k in range(-6, 2) for m in (1, 3))  # of step sizes
HYPER_GRID = tuple(10.0**k for k in range(-12, -1))  # of hyper-step sizes
TOO_SMALL = 1e-3  # towers begin at this fraction of plain gradient descent's step size

Function = Callable[[Tensor, Tensor], Tensor]
# From a surface and a step size (its meaning depends on the method) to the STEPS + 1 points of a
# path; to fewer if the path diverges.
Walk = Callable[["Surface", float], list[Tensor]]


@dataclass(frozen=True)
class Surface:
    """A function of x and y, the start of all paths, its minima, and the view."""

    name: str
    f: Function
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    view: tuple[float, float, float, float]  # x from, x to, y from, y to

    def at(self, point: Tensor) -> Tensor:
        return self.f(point[0], point[1])

    @property
    def lowest(self) -> float:
        """The value at the minima."""
        return float(self.at(torch.tensor(self.minima[0], dtype=torch.float64)))

    def begin(self) -> Tensor:
        return torch.tensor(self.start, dtype=torch.float64, requires_grad=True)


SURFACES = (
    Surface(
        "a narrow valley",
        lambda x, y: (x**2 + 30 * y**2) / 2,
        (-9.0, 2.0),
        ((0.0, 0.0),),
        (-10, 4, -3.2, 3.2),
    ),
    Surface(
        "a saddle",
        lambda x, y: x**2 - y**2 + y**4 / 8,
        (-1.8, 0.02),
        ((0.0, 2.0), (0.0, -2.0)),
        (-2.2, 2.2, -2.8, 2.8),
    ),
    Surface(
        "Rosenbrock",
        lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        (-1.2, 1.0),
        ((1.0, 1.0),),
        (-1.9, 1.9, -0.7, 2.2),
    ),
    Surface(
        "Beale",
        lambda x, y: (
            (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2
        ),
        (1.0, 1.5),
        ((3.0, 0.5),),
        (-0.5, 4.2, -1.2, 2.2),
    ),
)


def by_optimizer(make: Callable[[list[Tensor], float], torch.optim.Optimizer]) -> Walk:
    def walk(surface: Surface, size: float) -> list[Tensor]:
        point = surface.begin()
        optimizer = make([point], size)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = surface.at(point)
            value.backward()
            return value

        path = [point.detach().clone()]
        for _ in range(STEPS):
            optimizer.step(closure)  # type: ignore[arg-type]
            if not point.isfinite().all():
                break
            path.append(point.detach().clone())
        return path

    return walk


def by_tower(notation: str) -> Walk:
    return by_optimizer(
        lambda points, size: HyperOptimizer(points, notation.format(size=size), compile=False)
    )


def by_hand(step: Callable[[Surface, Tensor, Tensor], Tensor]) -> Walk:
    """Walk by a function that returns the next point from surface, point and gradient."""

    def walk(surface: Surface, size: float) -> list[Tensor]:
        point = surface.begin().detach()
        path = [point]
        for _ in range(STEPS):
            point = step(surface, point, torch.func.grad(surface.at)(point))
            path.append(point)
        return path

    return walk


def exact_line_search(surface: Surface, point: Tensor, gradient: Tensor) -> Tensor:
    """Go downhill to the first minimum on the line."""

    def along(size: float) -> float:
        return float(surface.at(point - size * gradient))

    far = 1e-6 / max(float(gradient.norm()), 1e-12)
    while along(2 * far) < along(far):
        far *= 2
    found = minimize_scalar(
        along, bounds=(0.0, 2 * far), method="bounded", options={"xatol": 1e-10 * far}
    )
    return point - found.x * gradient


def newton(surface: Surface, point: Tensor, gradient: Tensor) -> Tensor:
    """Go to the stationary point of the quadratic model, which need not be a minimum."""
    hessian = torch.func.hessian(surface.at)(point)
    return point - torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]


optim = torch.optim

GROUPS: dict[str, dict[str, tuple[Walk, Sequence[float]]]] = {
    "plain": {
        "gradient descent": (by_optimizer(lambda p, lr: optim.SGD(p, lr)), GRID),
        "momentum": (by_optimizer(lambda p, lr: optim.SGD(p, lr, momentum=0.9)), GRID),
        "Nesterov": (
            by_optimizer(lambda p, lr: optim.SGD(p, lr, momentum=0.9, nesterov=True)),
            GRID,
        ),
    },
    "adaptive": {
        "AdaGrad": (by_optimizer(lambda p, lr: optim.Adagrad(p, lr)), GRID),
        "RMSProp": (by_optimizer(lambda p, lr: optim.RMSprop(p, lr)), GRID),
        "Adam": (by_optimizer(lambda p, lr: optim.Adam(p, lr)), GRID),
    },
    "line search, curvature": {
        "exact line search": (by_hand(exact_line_search), (math.nan,)),
        "Newton": (by_hand(newton), (math.nan,)),
        "L-BFGS": (
            by_optimizer(
                lambda p, _: optim.LBFGS(p, max_iter=1, max_eval=100, line_search_fn="strong_wolfe")
            ),
            (math.nan,),
        ),
    },
}

# Towers; lr is the initial step size and size the hyper-step size, from a grid.
TOWERS: dict[str, tuple[str, Sequence[float]]] = {
    "SGD / SGD": ("SGD({lr!r}) / SGD({size!r})", HYPER_GRID),
    "SGD / Adam": ("SGD({lr!r})[lr: log] / Adam({size!r})", (0.03, 0.1, 0.3, 1.0)),
    "Adam / Adam": ("Adam({lr!r})[lr: log] / Adam({size!r})", (0.03, 0.1, 0.3, 1.0)),
}
TOWERS_GROUP = "towers"


@dataclass(frozen=True)
class Trail:
    """The result of a walk.

    Attributes:
        size: the best of its grid; NaN for a method without a step size.
        points: [steps + 1, 2].
        above: the final value minus the value at the minima.
        mean: the same, averaged over the path; infinite if the path diverges.
    """

    method: str
    size: float
    points: np.ndarray
    above: float
    mean: float


def best(surface: Surface, method: str, walk: Walk, grid: Sequence[float]) -> Trail:
    """Try all step sizes of a grid; return the walk with the lowest mean value."""
    trails = []
    for size in grid:
        points = torch.stack(walk(surface, size))
        above = surface.f(*points.T) - surface.lowest
        mean = float(above.mean()) if len(points) > STEPS else math.inf
        trails.append(Trail(method, size, points.numpy(), float(above[-1]), mean))
    return min(trails, key=lambda trail: trail.mean)


def paths(surface: Surface) -> dict[str, list[Trail]]:
    """The paths of all groups of methods on a surface."""
    found = {
        group: [best(surface, method, *how) for method, how in methods.items()]
        for group, methods in GROUPS.items()
    }
    lr = float(f"{found['plain'][0].size * TOO_SMALL:.3g}")
    found[TOWERS_GROUP] = [
        best(surface, method, by_tower(notation.replace("{lr!r}", repr(lr))), grid)
        for method, (notation, grid) in TOWERS.items()
    ]
    return found


Walks = dict[str, dict[str, list[Trail]]]  # by surface, then by group of methods


def table(walks: Walks) -> pd.DataFrame:
    """A line for each path: its step size, and how far above the minimum it ends."""
    return pd.DataFrame(
        {
            "surface": name,
            "group": group,
            "method": trail.method,
            "step_size": trail.size,
            "above_minimum": trail.above,
            "mean_above_minimum": trail.mean,
        }
        for name, groups in walks.items()
        for group, trails in groups.items()
        for trail in trails
    )
