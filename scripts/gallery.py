"""A gallery of paths on surfaces of two dimensions: the methods of the textbooks, and towers.

    python -m scripts.gallery
    python -m scripts.gallery results=results

All paths on a surface begin at the same point. The step size of each rule, and the hyper-step size
of each tower, are the best of a grid, by the mean value along the path; the towers' own step size
begins at a thousandth of plain gradient descent's. It is drawn into the folder `results`.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from torch import Tensor

from experiments.command import asked_for_help, split
from experiments.run import guarded
from experiments.store import write_bytes, write_text
from hyperopt import HyperOptimizer
from scripts import style

STEPS = 150
FRAMES = 60  # of the animation
GRID = tuple(m * 10.0**k for k in range(-6, 2) for m in (1, 3))  # of step sizes
HYPER_GRID = tuple(10.0**k for k in range(-12, -1))  # of the step sizes of step sizes
TOO_SMALL = 1e-3  # towers begin at this part of plain gradient descent's step size

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    results: str = "results"


Walk = Callable[["Surface", float], list[Tensor]]


@dataclass(frozen=True)
class Surface:
    """A function of x and y, where paths begin, its minima, and what of it is shown."""

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


# How to walk: a step size (what it means depends) to the points of a path, STEPS + 1 of them, or
# fewer where it leads to infinity.


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
    """By a function of the surface, the point and the gradient there."""

    def walk(surface: Surface, size: float) -> list[Tensor]:
        point = surface.begin().detach()
        path = [point]
        for _ in range(STEPS):
            point = step(surface, point, torch.func.grad(surface.at)(point))
            path.append(point)
        return path

    return walk


def exact_line_search(surface: Surface, point: Tensor, gradient: Tensor) -> Tensor:
    """Downhill to the first minimum on the line."""

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
    """To the point where the quadratic model is level, be it a minimum or not."""
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

# Towers, by the step size that they begin with and the grid's.
TOWERS: dict[str, tuple[str, Sequence[float]]] = {
    "SGD / SGD": ("SGD({lr!r}) / SGD({size!r})", HYPER_GRID),
    "SGD / Adam": ("SGD({lr!r})[lr: log] / Adam({size!r})", (0.03, 0.1, 0.3, 1.0)),
    "Adam / Adam": ("Adam({lr!r})[lr: log] / Adam({size!r})", (0.03, 0.1, 0.3, 1.0)),
}
TOWERS_GROUP = "towers"


@dataclass(frozen=True)
class Trail:
    """A walk that was made.

    Attributes:
        size: the best of its grid; NaN where there was none to choose.
        points: [steps + 1, 2].
        above: how far the value at the end is above that of the minima.
        mean: the same, over the whole path; infinite where it leads to infinity.
    """

    method: str
    size: float
    points: np.ndarray
    above: float
    mean: float


def best(surface: Surface, method: str, walk: Walk, grid: Sequence[float]) -> Trail:
    """Of the walks with the step sizes of a grid, the lowest on the whole."""
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


# Pictures.

LOOKS: tuple[dict[str, Any], ...] = (
    {"color": style.VERMILION, "linestyle": "-", "marker": "o"},
    {"color": style.BLUE, "linestyle": "--", "marker": "s"},
    {"color": style.BLACK, "linestyle": "-.", "marker": "^"},
    {"color": style.GREEN, "linestyle": ":", "marker": "D"},
)
ANIMATED = ("SGD / SGD", "gradient descent", "Adam", "L-BFGS")
CHOSEN = (
    "step sizes are the best of a grid, by the mean value along the path;\n"
    "those of towers begin at a thousandth of gradient descent's"
)


def ground(axis: plt.Axes, surface: Surface) -> None:
    """The surface from above, in shades of the logarithm of its height; minima and start."""
    x0, x1, y0, y1 = surface.view
    x, y = torch.meshgrid(torch.linspace(x0, x1, 240), torch.linspace(y0, y1, 240), indexing="xy")
    z = surface.f(x, y).double().numpy()
    above = np.maximum(z - surface.lowest, 0)
    height = np.log10(above + 1e-2 * np.median(above))
    axis.contourf(x, y, height, 14, cmap="GnBu", alpha=0.55, zorder=-2)
    axis.contour(x, y, height, 14, colors="white", linewidths=0.3, zorder=-1)
    axis.set_rasterization_zorder(0)
    axis.plot(*np.array(surface.minima).T, "*", color=style.BLACK, markersize=7, zorder=5)
    axis.plot(*surface.start, "o", color="white", markeredgecolor=style.BLACK, zorder=6)
    axis.set(xlim=(x0, x1), ylim=(y0, y1), xticks=[], yticks=[])
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)


def still(walks: dict[str, dict[str, list[Trail]]]) -> plt.Figure:
    """A row for each surface, a column for each group of methods."""
    groups = list(next(iter(walks.values())))
    figure, axes = plt.subplots(
        len(SURFACES), len(groups), figsize=(style.WIDTH, 1.55 * len(SURFACES) + 0.8)
    )
    for row, surface in zip(axes, SURFACES, strict=True):
        for axis, group in zip(row, groups, strict=True):
            ground(axis, surface)
            for trail, look in zip(walks[surface.name][group], LOOKS, strict=False):
                axis.plot(*trail.points.T, label=trail.method, markevery=[-1], **look)
        row[0].set_ylabel(surface.name)
    for axis, group in zip(axes[0], groups, strict=True):
        axis.set_title(group)
    for axis in axes[-1]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=7)
    figure.suptitle(f"{STEPS} steps from the same start\n{CHOSEN}", fontsize=7)
    return figure


def animation(walks: dict[str, dict[str, list[Trail]]]) -> bytes:
    """All surfaces side by side, with a method of each group, as a GIF."""
    figure, axes = plt.subplots(1, len(SURFACES), figsize=(8, 2.5))
    moving = []
    for axis, surface in zip(axes, SURFACES, strict=True):
        ground(axis, surface)
        axis.set_title(surface.name)
        trails = {trail.method: trail for group in walks[surface.name].values() for trail in group}
        for method, look in zip(ANIMATED, LOOKS, strict=True):
            (line,) = axis.plot([], [], label=method, markevery=[-1], **look)
            moving.append((line, trails[method].points))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    frames = []
    for frame in range(FRAMES):
        length = 1 + round(STEPS * (frame / (FRAMES - 1)) ** 1.6)  # slowly at first
        for line, points in moving:
            line.set_data(*points[:length].T)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        frames.append(Image.open(buffer).convert("RGB"))
    plt.close(figure)
    # By coverage, since the lines are few pixels and their colours must not be lost.
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    first, *others = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    buffer = io.BytesIO()
    durations = [70] * (FRAMES - 1) + [2500]  # ms
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return buffer.getvalue()


def table(walks: dict[str, dict[str, list[Trail]]]) -> pd.DataFrame:
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


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    folder = Path(options.results)
    torch.set_num_threads(1)
    walks = {surface.name: paths(surface) for surface in SURFACES}
    text = table(walks).to_csv(index=False, lineterminator="\n", float_format="%.4g")
    write_text(folder / "gallery.csv", text)
    write_bytes(folder / "gallery.gif", animation(walks))
    for path in (*style.save(still(walks), folder / "gallery"), *folder.glob("gallery.[cg]*")):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
