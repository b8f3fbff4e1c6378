"""Draw the hyperoptimization surface as a 3-D figure and as a map, from the curves of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection

from experiments.data.catalog import label as data_label
from experiments.studies import pages, style
from experiments.studies.pages import write_all
from hyperopt import parse

SMOOTH = 9  # steps of the losses' moving average
TICKS = (-3, -2, -1, 0)  # log10 of lr
LOOKS: tuple[dict[str, Any], ...] = (  # of the towers, in their order
    {"color": style.VERMILION, "marker": "o"},
    {"color": style.BLACK, "marker": "s"},
    {"color": style.BLUE, "marker": "^"},
)


class Surface:
    """The losses of plain SGD over lr and step, and the paths of towers over them.

    Attributes:
        lrs: log10 of the plain runs' lrs, ascending, [runs].
        steps: [steps].
        losses: in nats, smoothed, [runs, steps].
        towers: for each notation, log10 of the lr, and the smoothed loss, both [steps].
    """

    def __init__(self, curves: pd.DataFrame) -> None:
        smooth = curves.filter(like="loss of").rolling(SMOOTH, center=True, min_periods=1).mean()
        stacks = [name.removeprefix("loss of ") for name in smooth]
        plain = [stack for stack in stacks if parse(stack).height == 0]
        lrs = [parse(stack).levels[0].values["lr"] for stack in plain]
        self.lrs = np.log10(np.array(lrs, dtype=float))
        self.steps = curves.step.to_numpy()
        self.losses = np.array([smooth[f"loss of {stack}"] for stack in plain])
        self.towers = {
            stack: (np.log10(curves[f"lr of {stack}"]).to_numpy(), smooth[f"loss of {stack}"])
            for stack in stacks
            if stack not in plain
        }


def outlined(width: float) -> list[Any]:
    return [effects.Stroke(linewidth=width, foreground="white"), effects.Normal()]


def titled(figure: plt.Figure, axis: Any, words: str) -> plt.Figure:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    style.title(figure, f"The hyperoptimization surface\n{words}")
    return figure


def poster(surface: Surface, words: str) -> plt.Figure:
    """Draw the surface in 3-D: a thin line for each plain run, thick lines for towers."""
    figure = plt.figure(figsize=(style.WIDTH, 5.2))
    axis: Any = figure.add_subplot(projection="3d", computed_zorder=False)
    low, high = 0.8, float(np.nanmax(surface.losses))
    shade = plt.Normalize(low, high)
    for rank, k in enumerate(reversed(range(len(surface.lrs)))):  # from the back to the front
        lr, losses = np.full(len(surface.steps), surface.lrs[k]), surface.losses[k]
        line = np.column_stack([surface.steps, lr, losses])
        foot = np.column_stack([surface.steps, lr, np.full(len(lr), low)])[::-1]
        # A white curtain hides the lines behind it.
        curtain = Poly3DCollection([np.vstack([line, foot])], facecolor="white", zorder=2 * rank)
        segments = Line3DCollection(
            np.stack([line[:-1], line[1:]], 1),
            array=losses[:-1],
            cmap="viridis_r",
            norm=shade,
            linewidth=0.8,
            zorder=2 * rank + 1,
        )
        axis.add_collection3d(curtain)
        axis.add_collection3d(segments)
    for (stack, (lr, losses)), look in zip(surface.towers.items(), LOOKS, strict=True):
        axis.plot(
            surface.steps,
            lr,
            losses,
            label=stack,
            linewidth=2.4,
            markevery=[0],
            markersize=7,
            zorder=1000,
            path_effects=outlined(4),
            **look,
        )
    axis.set(
        xlim=(1, surface.steps[-1]),
        ylim=(surface.lrs[0], surface.lrs[-1]),
        zlim=(low, high),
        xlabel="training step",
        ylabel="step size",
        zlabel="training loss (nats)",
    )
    axis.yaxis.set_major_locator(FixedLocator(TICKS))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10.0**value:g}"))
    for side in (axis.xaxis, axis.yaxis, axis.zaxis):
        side.set_pane_color((1, 1, 1, 0))
    axis.view_init(elev=36, azim=-36)
    axis.set_box_aspect((1.25, 1.15, 0.8), zoom=0.98)
    return titled(figure, axis, words)


def flat(surface: Surface, words: str) -> plt.Figure:
    """Draw the surface from above: loss as shades and contours, towers as paths."""
    figure, axis = style.subplots(1, 1, 3.6)
    mesh = axis.pcolormesh(
        surface.steps,
        surface.lrs,
        surface.losses,
        cmap="viridis_r",
        shading="nearest",
        rasterized=True,
    )
    levels = np.arange(0.9, 2.5, 0.1)
    axis.contour(surface.steps, surface.lrs, surface.losses, levels, colors="white", linewidths=0.4)
    for (stack, (lr, _)), look in zip(surface.towers.items(), LOOKS, strict=True):
        axis.plot(
            surface.steps,
            lr,
            label=stack,
            linewidth=2,
            markevery=[0],
            markersize=6,
            clip_on=False,
            path_effects=outlined(3.5),
            **look,
        )
    axis.set(xlabel="training step", ylabel="step size", xlim=(1, surface.steps[-1]))
    axis.set_yticks(TICKS, [f"{10.0**tick:g}" for tick in TICKS])
    axis.grid(visible=False)
    figure.colorbar(mesh, label="training loss (nats)", pad=0.02)
    return titled(figure, axis, words)


def setting(runs: pd.DataFrame) -> str:
    """The runs' setting in words, for captions."""
    line = runs.iloc[0]
    return (
        f"MLP on {data_label(line.data)}, one epoch in the order of the file, batch 300, "
        f"seed {line.seed}, {line.device}; losses averaged over {SMOOTH} steps"
    )


def markdown(folder: Path, runs: pd.DataFrame, surface: Surface) -> str:
    """The page: both figures, and the towers' final step sizes, as Markdown."""
    errors = runs.set_index("stack").test_error
    plain = errors.drop(list(surface.towers))
    rows = [
        (f"`{stack}`", f"{10.0 ** lr[-1]:.3g}", f"{errors[stack]:.2f}")
        for stack, (lr, _) in surface.towers.items()
    ]
    rows.append((f"`{plain.idxmin()}`, the best plain run", "", f"{plain.min():.2f}"))
    texts = captions(folder)
    return pages.page(
        "# The hyperoptimization surface",
        "The paper's first version (arXiv 1909.13371v1), Figure 1.",
        *(f"![{text}]({name}.png)" for name, text in texts.items()),
        texts["figure"],
        pages.table(("Tower", "Step size at the end", "Test error (%)"), "lrr", rows),
    )


def captions(folder: Path) -> dict[str, str]:
    runs = pd.read_csv(folder / "runs.csv")
    text = (
        f"{setting(runs)}. Thin lines, or shades: plain SGD at "
        f"{(~runs['stack'].str.contains('/')).sum()} step sizes. Thick lines: towers that tune "
        "theirs; a marker shows the start."
    )
    return {"figure": text, "flat": "The same from above"}


def draw(folder: Path) -> list[Path]:
    """Draw both figures from the CSVs of runs and curves; returns the written files."""
    runs = pd.read_csv(folder / "runs.csv")
    surface = Surface(pd.read_csv(folder / "curves.csv"))
    words = setting(runs)
    paths = write_all(folder, {"README.md": markdown(folder, runs, surface)})
    paths += style.save(poster(surface, words), folder / "figure")
    return paths + style.save(flat(surface, words), folder / "flat")
