"""How every figure looks: colours, sizes, and files that are the same whenever they are redrawn."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.files import write_bytes

WIDTH = 6.0  # inches; on a phone, text of 8 points is then 7 pixels high
SMALL = 8  # points; no text is smaller

# Of the Okabe-Ito palette, which colour-blind readers can tell apart; their greys differ too, and
# each goes with a marker of its own, for print in black and white.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"
VERMILION = "#D55E00"

MARKERS = "os^Dv*"

# The paper's value, or what the paper's code gives, looks the same in all figures; so does ours.
PAPER: dict[str, Any] = {"color": ORANGE, "marker": "D", "markerfacecolor": "white"}
OURS: dict[str, Any] = {"color": BLUE, "marker": "o"}


def sequence(count: int) -> list[dict[str, Any]]:
    """Looks of lines that have an order, the first light and the last dark, for `plot`."""
    shades = matplotlib.colormaps["cividis_r"](np.linspace(0.08, 1.0, count))
    return [
        {"color": tuple(shade), "marker": marker}
        for shade, marker in zip(shades, MARKERS, strict=False)
    ]


plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 9,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "legend.fontsize": SMALL,
        "legend.title_fontsize": SMALL,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "grid.linewidth": 0.4,
        "grid.color": "#dddddd",
        "axes.axisbelow": True,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "legend.frameon": False,
        "lines.markersize": 4,
        "figure.constrained_layout.use": True,
        "pdf.fonttype": 42,
        "savefig.dpi": 200,
    }
)


def subplots(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """Axes on a figure as wide as a page, `height` inches high."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), **options)


def title(figure: Figure, text: str) -> None:
    """A title of lines that fit above a figure."""
    figure.suptitle("\n".join(textwrap.fill(line, 76) for line in text.splitlines()))


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PDF and PNG beside each other, without the time of drawing."""
    paths = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], metadata=metadata)
        paths.append(path.with_suffix(suffix))
        write_bytes(paths[-1], buffer.getvalue())
    plt.close(figure)
    return paths
