"""The style of all figures: colours, sizes, and files that are reproducible byte for byte."""

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

# Okabe-Ito colours, which colour-blind readers can tell apart. For print in black and white, their
# greys differ and each line has its own marker.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"
VERMILION = "#D55E00"

MARKERS = "os^Dv*"

# One look for the paper's values and its code's results in all figures, and one for ours.
PAPER: dict[str, Any] = {"color": ORANGE, "marker": "D", "markerfacecolor": "white"}
OURS: dict[str, Any] = {"color": BLUE, "marker": "o"}


def sequence(count: int) -> list[dict[str, Any]]:
    """Styles for `plot` of an ordered list of lines, from light to dark."""
    shades = matplotlib.colormaps["cividis_r"](np.linspace(0.08, 1.0, count))
    return [
        {"color": tuple(shade), "marker": marker}
        for shade, marker in zip(shades, MARKERS, strict=False)
    ]


plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",  # matplotlib ships it, so every machine has it
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
    """Make a figure as wide as a page and `height` inches high, with axes."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), **options)


def title(figure: Figure, text: str) -> None:
    """Set a figure's title, wrapped to its width."""
    figure.suptitle("\n".join(textwrap.fill(line, 76) for line in text.splitlines()))


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PDF and PNG, without timestamps; returns the paths."""
    paths = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], metadata=metadata)
        paths.append(path.with_suffix(suffix))
        write_bytes(paths[-1], buffer.getvalue())
    plt.close(figure)
    return paths
