"""Draw the gallery's figure and animation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from experiments.files import write_bytes
from experiments.studies import style
from experiments.studies.gallery.walks import STEPS, SURFACES, Surface, Walks

FRAMES = 60  # of the animation
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
    """Draw a surface from above, with shades for the log of its height, its minima and start."""
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


def still(walks: Walks) -> plt.Figure:
    """Draw the figure: a row for each surface, a column for each group of methods."""
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
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02))
    style.title(figure, f"{STEPS} steps from the same start\n{CHOSEN}")
    return figure


def animation(walks: Walks) -> bytes:
    """Draw all surfaces side by side, with a method of each group, as a GIF."""
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
    # MAXCOVERAGE keeps the colours of thin lines, which have few pixels.
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    first, *others = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    buffer = io.BytesIO()
    durations = [70] * (FRAMES - 1) + [2500]  # ms
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return buffer.getvalue()


def draw(walks: Walks, folder: Path) -> list[Path]:
    """Draw the figure and the animation into a folder; returns the written files."""
    write_bytes(folder / "animation.gif", animation(walks))
    return [folder / "animation.gif", *style.save(still(walks), folder / "figure")]


def captions(folder: Path) -> dict[str, str]:
    return {"figure": "Paths of a tower, gradient descent, Adam and L-BFGS on four surfaces"}
