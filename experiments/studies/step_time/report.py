"""Draw the tables and figures of step times from the CSVs that `runs.py` writes."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from experiments.files import write_text
from experiments.studies import style
from experiments.studies.claim import Claim, scale
from experiments.studies.step_time import first_steps, peers
from experiments.studies.step_time.contenders import LABELS, TRAFFIC, tower_label


def bars(times: pd.DataFrame, compiling: pd.DataFrame) -> list[tuple[str, str, float, float]]:
    """The performance goals: the comparison, "≤" or "≥", the bound, and the measured value."""
    table = times.set_index(["model", "optimizer", "family", "height"])
    seconds = compiling.set_index(["family", "height"])

    def of(column: str, model: str, optimizer: str, family: str, height: int) -> float:
        return float(table.loc[(model, optimizer, family, height), column])

    def step(model: str, ours: tuple[str, int], theirs: tuple[str, str, int]) -> float:
        return of("step_us", model, "compiled", *ours) / of("step_us", model, *theirs)

    def whole(model: str, family: str) -> float:
        ours, theirs = (model, "compiled", family, 1), (model, foreach, family, 0)
        more = of("inside_us", *ours) - of("inside_us", *theirs)
        return 1 + more / of("whole_us", *theirs)

    def faster(model: str, *stack: Any) -> float:
        theirs = of("whole_us", model, "published", *stack)
        return theirs / of("whole_us", model, "compiled", *stack)

    foreach, momentum = "torch.optim foreach", ("SGD momentum", 1)
    plain = (foreach, "SGD momentum", 0)
    added = "`step()`, SGD(momentum) / SGD, {}, over torch SGD(momentum) (foreach)"
    entire = "whole step, {}, {}, over torch (foreach)"
    published = "whole step, {}, times faster than the published package"
    heights = (of("step_us", "mlp", "compiled", "Adam", height) for height in (50, 10))
    compiled = "seconds to compile {}, {}"
    cold, warm = ("cold_s", "cold"), ("warm_s", "from the cache on disk")
    return [
        (
            "`step()`, Adam / SGD, MLP, over torch Adam (foreach)",
            *("≤", 1.0, step("mlp", ("Adam / SGD", 1), (foreach, "Adam", 0))),
        ),
        *(
            (added.format(LABELS[model]), "≤", bar, step(model, momentum, plain))
            for model, bar in (("mlp", 2.0), ("resnet20", 1.5))
        ),
        *(
            (
                entire.format(tower_label(family, 1), LABELS[model]),
                *("≤", bar, whole(model, family)),
            )
            for model, family, bar in (
                ("mlp", "SGD momentum", 1.06),
                ("resnet20", "SGD momentum", 1.005),
                ("char_rnn", "Adam", 1.01),
            )
        ),
        (
            "each further level, tower of Adam, MLP, in µs",
            *("≤", 10.0, (next(heights) - next(heights)) / 40),
        ),
        *(
            (published.format(stack), "≥", bar, faster(*which))
            for stack, bar, which in (
                ("tower of Adam of height 50, MLP", 15.0, ("mlp", "Adam", 50)),
                ("Adam / SGD, MLP", 2.0, ("mlp", "Adam / SGD", 1)),
                ("Adam / Adam, char-RNN", 2.5, ("char_rnn", "Adam", 1)),
            )
        ),
        (
            "25 M parameters, Adam / Adam: bytes per parameter beyond Adam's moments",
            *("≤", 8.0, of("bytes_per_parameter", "transformer", "compiled", "Adam", 1) - 8),
        ),
        (
            "25 M parameters, `step()`, Adam / Adam, over torch Adam (fused)",
            *("≤", 1.8, step("transformer", ("Adam", 1), ("torch.optim fused", "Adam", 0))),
        ),
        *(
            (
                compiled.format(tower_label("Adam", height), how),
                *("≤", bar, float(seconds.loc[("Adam", height), column])),
            )
            for height, bar, (column, how) in ((1, 8.0, cold), (1, 2.0, warm), (50, 40.0, cold))
        ),
    ]


def draw(folder: Path) -> list[Path]:
    """Draw the page and both figures from a folder's CSVs; returns the written files."""
    times = pd.read_csv(folder / "times.csv")
    compiling = pd.read_csv(folder / "compile.csv")
    about = (folder / "machine.txt").read_text().strip()
    lines = [
        "# The cost of a hyperoptimizer",
        "",
        f"{about}.",
        "Medians over rounds in which all contenders of a model take turns, with quartiles.",
        "Times of whole steps vary by more than the optimizers differ. So the time that a tower",
        "adds is measured by timing `step()` within whole steps, after the model has used the",
        "caches. Made by `make benchmark`; ratios carry over to other machines, times do not.",
        "",
        "| what | bound | measured | |",
        "|---|---|---|---|",
    ]
    for what, bound, bar, value in bars(times, compiling):
        met = value <= bar if bound == "≤" else value >= bar
        lines.append(
            f"| {what} | {bound} {bar:g} | {value:#.4g} | {'met' if met else '**not met**'} |"
        )
    steps = times[times.model == "transformer"].set_index(["optimizer", "family", "height"]).step_us
    bound = steps[TRAFFIC, "Adam", 1] / steps["torch.optim fused", "Adam", 0]
    lines += [
        "",
        "With 25 M parameters, two loops with only the reads and writes of Adam / Adam",
        f"({TRAFFIC}) take {bound:.2f} times as long as torch Adam (fused), which passes over its",
        "vectors once.",
    ]
    lines += ["", "## Compiling", "", "| stack | cold | from the cache on disk |", "|---|---|---|"]
    for row in compiling.itertuples():
        if row.height < 0:
            lines.append(f"| the first compilation on a machine | {row.cold_s:.1f} s | |")
        else:
            label = tower_label(row.family, row.height)
            lines.append(f"| {label} | {row.cold_s:.1f} s | {row.warm_s:.1f} s |")
    if (folder / "first_steps.csv").exists():
        rows = pd.read_csv(folder / "first_steps.csv").itertuples()
        lines += ["", "## First steps", "", *first_steps.table([*rows])]
    if (folder / "peers.csv").exists():
        lines += ["", "## Beside other packages", *peers.table(pd.read_csv(folder / "peers.csv"))]
    for model, label in LABELS.items():
        lines += [
            "",
            f"## {label}",
            "",
            "| stack | optimizer | `step()` µs | in a whole step µs | whole step µs "
            "| bytes held per parameter |",
            "|---|---|---|---|---|---|",
        ]
        for row in times[times.model == model].itertuples():
            cells = [tower_label(row.family, row.height), row.optimizer]
            for name in ("step", "inside", "whole"):
                middle, low, high = (getattr(row, f"{name}_us{q}") for q in ("", "_q25", "_q75"))
                cells.append(
                    "" if pd.isna(middle) else f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"
                )
            held_bytes = row.bytes_per_parameter
            cells.append("" if pd.isna(held_bytes) else f"{held_bytes:.1f}")
            lines.append("| " + " | ".join(cells) + " |")
    write_text(folder / "README.md", "\n".join(lines) + "\n")
    paths = [folder / "README.md", *style.save(draw_heights(times), folder / "height")]
    return paths + style.save(draw_peers(times), folder / "peers")


def draw_heights(times: pd.DataFrame) -> plt.Figure:
    """Draw the time of a training step against the height of the tower (the paper's Figure 3b)."""
    models = [model for model in LABELS if times[times.model == model].whole_us.notna().any()]
    figure, axes = plt.subplots(1, len(models), figsize=(style.WIDTH, 3.0), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        plot_heights(axis, times, model)
        axis.set_title(LABELS[model].split(",")[0])
    axes[0][0].set_ylabel("ms per training step")
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, ncols=2, loc="outside upper center")
    return figure


def plot_heights(axis: plt.Axes, times: pd.DataFrame, model: str) -> None:
    """Plot the time of a training step of one model against height, ours and the published."""
    looks = {"compiled": ("ours", style.OURS), "published": ("published", style.PAPER)}
    families = (("SGD", "--"), ("Adam", "-"))
    for (kind, (name, look)), (family, line) in itertools.product(looks.items(), families):
        own = (times.model == model) & (times.optimizer == kind) & (times.family == family)
        rows = times[own].sort_values("height")
        middle, low, high = (rows[f"whole_us{q}"] for q in ("", "_q25", "_q75"))
        axis.errorbar(
            rows.height,
            middle / 1000,
            [(middle - low) / 1000, (high - middle) / 1000],
            linestyle=line,
            elinewidth=0.8,
            **look,
            label=f"{name}, towers of {family}",
        )
    axis.set(ylim=(0, None), xlabel="height")


def draw_peers(times: pd.DataFrame) -> plt.Figure:
    """Draw the time of `step()` alone and of the whole training step, beside all peers."""
    kinds = {
        "torch.optim foreach": ("#bbbbbb", "foreach"),
        "torch.optim fused": ("#dddddd", "fused"),
        "published": (style.ORANGE, "published"),
        "compiled": (style.BLUE, "ours"),
    }
    stacks = ("SGD momentum", 0), ("SGD momentum", 1), ("Adam", 0), ("Adam / SGD", 1), ("Adam", 1)
    shown = [
        (kind, family, height)
        for family, height in stacks
        for kind in kinds
        if height == 0 or not kind.startswith("torch")
    ]
    figure, axes = plt.subplots(2, len(LABELS), figsize=(style.WIDTH, 6.4), sharey=True)
    for column, (model, label) in enumerate(LABELS.items()):
        rows = times[times.model == model].set_index(["optimizer", "family", "height"])
        rows = rows.reindex(shown)
        for axis, name, unit in (axes[0][column], "step", 1), (axes[1][column], "whole", 1000):
            middle, low, high = (rows[f"{name}_us{q}"] / unit for q in ("", "_q25", "_q75"))
            if middle.isna().all():
                axis.set_visible(False)
                continue
            if name == "step":
                axis.set_title(textwrap.fill(label.split(",")[0], 12))
            axis.barh(
                range(len(shown)),
                middle,
                xerr=[middle - low, high - middle],
                color=[kinds[kind][0] for kind, _, _ in shown],
                error_kw={"linewidth": 0.6},
            )
            axis.set_xlabel("µs" if unit == 1 else "ms")
            axis.tick_params(axis="x")
    names = [f"{tower_label(family, height)} · {kinds[kind][1]}" for kind, family, height in shown]
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(shown)), names)
    axes[0][0].invert_yaxis()
    axes[0][0].set_ylabel("step() alone")
    axes[1][0].set_ylabel("a whole training step")
    return figure


def captions(folder: Path) -> dict[str, str]:
    return {
        "height": "Time of a training step against the height of the tower, by model",
        "peers": "Time of a training step, ours beside other packages, by model",
    }


def claims(folder: Path) -> Iterator[Claim]:
    return claims_of(pd.read_csv(folder / "times.csv"))


def claims_of(times: pd.DataFrame) -> Iterator[Claim]:
    """A claim on the time that each level of a tower adds to a training step of ResNet-20."""
    own = times[(times.model == "resnet20") & (times.optimizer == "compiled")]
    towers = own[own.family == "SGD"].set_index("height").sort_index()
    if len(towers) > 1:
        levels = towers.index[-1] - towers.index[0]
        added = (towers.step_us.iloc[-1] - towers.step_us.iloc[0]) / levels
        yield Claim(
            "random images",
            f"Figure 3b, ResNet-20, towers of SGD up to height {towers.index[-1]}",
            scale(True),
            "time of a step that each level adds (%)",
            "1 to 2",
            f"{100 * added / towers.whole_us.iloc[0]:.2g}",
            1,
            "yes" if added <= 0.02 * towers.whole_us.iloc[0] else "no",
            "results/step_time/times.csv",
        )


def prose(folder: Path) -> dict[str, str]:
    """The blocks in README and docs: the two most important numbers, in words."""
    found = bars(pd.read_csv(folder / "times.csv"), pd.read_csv(folder / "compile.csv"))
    values = [value for _, _, _, value in found]
    text = (
        f"On one core, `step()` of `Adam / SGD` on the MLP takes {values[0]:.2f} times as long as "
        "torch's own Adam (foreach). A whole training step under a tower of Adam of height 50 is "
        f"{values[7]:.0f} times faster than under the published package."
    )
    line = ["Figure 3b: time of a step", "each level adds 1 to 2 % on ResNet-20"]
    line += [f"each level adds {claim.ours} %" for claim in claims(folder)]
    return {"summary": text, "line": " | ".join(line)}
