"""Figure 3: the robustness of towers to their initial step sizes, and the cost of each level.

    python -m experiments.studies.figure3.report
    python -m experiments.studies.figure3.report results=results

The command checks the paper's claims. It prints the decades of robustness of each height, and our
test errors beside those of the published package. The exit status is 1 if a claim does not hold or
an error does not agree.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from experiments.cli import ROOT, ResultsOptions, asked_for_help, guarded, split
from experiments.data.catalog import label as data_label
from experiments.studies import pages, style
from experiments.studies.claim import Claim, scale
from experiments.studies.pages import csv_of, diverged, table, with_sd, write_all
from experiments.studies.step_time.report import plot_heights

# Test errors of the authors' package (1.0 on PyPI) in the setting of the preset quick, one seed.
REFERENCE = Path(__file__).with_name("published.csv")
TIMES = ROOT / "results" / "step_time" / "times.csv"
PAPERS_EPOCHS = 30
NEAR = 1.5  # an error is near if at most this factor times the best plain error
GUESSING = 80.0  # percent; guessing one of ten digits has an error of about 90


def points(runs: pd.DataFrame) -> pd.DataFrame:
    """A line for each rule, height and start: mean and sample standard deviation over seeds."""
    groups = runs.groupby(["rule", "height", "lr"], sort=False)
    return groups.agg(
        n=("seed", "size"),
        test_error=("test_error", "mean"),
        sd=("test_error", "std"),
        lowest=("test_error", "min"),
        highest=("test_error", "max"),
        diverged=("diverged", "sum"),
    ).reset_index()


def robustness(table: pd.DataFrame) -> pd.DataFrame:
    """A line for each rule and height: its decades of robustness.

    A start is near if its error is within 1.5 times the best error of the plain rule. `decades` is
    the number of near starts, divided by the number of starts in a power of ten. `below` counts
    only near starts below the best start of the plain rule. `reach` is the distance in powers of
    ten from that best start down to the smallest near start. `own_decades` and `own_reach` use the
    height's own best error, and so measure how flat its curve is.
    """
    lines = []
    for rule, own in table.groupby("rule", sort=False):
        plain = own[own.height == 0]
        best = plain.loc[plain.test_error.idxmin()]
        starts = sorted(own.lr.unique())
        per_decade = (len(starts) - 1) / math.log10(starts[-1] / starts[0])
        for height, rows in own.groupby("height"):
            near = rows.lr[rows.test_error <= NEAR * best.test_error]
            near_own = rows.lr[rows.test_error <= NEAR * rows.test_error.min()]
            lines.append(
                {
                    "rule": rule,
                    "height": height,
                    "decades": len(near) / per_decade,
                    "below": (near < best.lr).sum() / per_decade,
                    "reach": _decades_below(near, best.lr),
                    "own_decades": len(near_own) / per_decade,
                    "own_reach": _decades_below(near_own, best.lr),
                    "best_error": rows.test_error.min(),
                    "best_lr": rows.lr[rows.test_error.idxmin()],
                    "diverged": rows.diverged.sum(),
                    "runs": rows.n.sum(),
                }
            )
    return pd.DataFrame(lines)


def _decades_below(starts: pd.Series, lr: float) -> float:
    """How many powers of ten the smallest start lies below lr; 0 if none does."""
    return max(0.0, round(math.log10(lr / starts.min()), 2)) if len(starts) else 0.0


# The check.


MEASURES = {  # table heads
    "decades": "Decades",
    "below": "Too small",
    "reach": "Reach",
    "own_decades": "Own decades",
    "own_reach": "Own reach",
}
# Measures that must not shrink with height.
CLAIMED = {
    "below": "decades of starts below the best plain one that end near its error",
    "reach": "decades from the best plain start down to the least that ends near its error",
    "own_reach": "decades from the best plain start down to the least near the height's own best",
}


def claim(robust: pd.DataFrame) -> dict[tuple[str, str], bool]:
    """For each rule and each claimed measure, whether the measure never shrinks with height."""
    return {
        (str(rule), measure): bool(own.sort_values("height")[measure].is_monotonic_increasing)
        for rule, own in robust.groupby("rule", sort=False)
        for measure in CLAIMED
    }


def beside_published(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Our means beside the published package's errors of one seed, for the starts of both.

    `agrees`: the difference is at most three of our standard deviations, or 15 % of the error,
    whichever is larger. Two errors at the level of guessing also agree.
    """
    both = published.merge(table, on=["rule", "height", "lr"], suffixes=("_published", ""))
    off = (both.test_error - both.test_error_published).abs()
    guessing = both[["test_error", "test_error_published"]].min(axis=1) >= GUESSING
    allowed = (3 * both.sd.fillna(0.0)).clip(lower=0.15 * both.test_error_published)
    both["agrees"] = (off <= allowed) | guessing
    return both


def check(folder: Path) -> bool:
    """Print the numbers behind the paper's claims; returns whether all hold.

    Raises:
        ValueError: there are no runs.
    """
    sources = sorted(folder.glob("figure3/*/runs.csv"))
    if not sources:
        raise ValueError(f"there is no figure3/*/runs.csv in {folder}; make reproduce-figure3")
    holds = True
    for source in sources:
        runs = pd.read_csv(source)
        table = points(runs)
        robust = robustness(table)
        print(f"{source.parent.name}: {setting(runs)}")
        print(robust.to_string(index=False, float_format="{:.3g}".format))
        for (rule, measure), verdict in claim(robust).items():
            answer = "never shrinks" if verdict else "SHRINKS"
            print(f"  {rule}, {MEASURES[measure]}: {answer} with height")
            holds &= verdict
        if is_of_reference(runs):
            both = beside_published(table, pd.read_csv(REFERENCE))
            print("  test error (%) beside the published package, one seed")
            columns = ["rule", "height", "lr", "test_error_published", "test_error", "sd", "agrees"]
            print(both[columns].to_string(index=False, float_format="{:.3g}".format))
            print(f"  {both.agrees.sum()} of {len(both)} agree")
            holds &= bool(both.agrees.all())
    return holds


def is_of_reference(runs: pd.DataFrame) -> bool:
    """Whether runs have the setting of published.csv."""
    return bool((runs.data == "mnist").all() and (runs.epochs == 2).all())


def is_papers(runs: pd.DataFrame) -> bool:
    """Whether runs are on the full MNIST and as long as the paper's."""
    return bool((runs.data == "mnist").all() and (runs.epochs == PAPERS_EPOCHS).all())


# The page and the figure.


def setting(runs: pd.DataFrame) -> str:
    """The runs' setting in words, for captions."""
    length, seeds = (
        f"{count} {what}{'s' if count > 1 else ''}"
        for count, what in ((runs.epochs.max(), "epoch"), (runs.seed.nunique(), "seed"))
    )
    data, devices = data_label(runs.data.iloc[0]), " and ".join(runs.device.unique())
    return f"MLP on {data}, batch 256, {length}, {seeds}, {devices}"


def markdown(runs: pd.DataFrame, errors: pd.DataFrame, robust: pd.DataFrame) -> str:
    """The page: the figure, the decades of robustness, and every point, as Markdown."""
    rows = (
        (
            *(line.rule, str(line.height)),
            *(f"{getattr(line, measure):.1f}" for measure in MEASURES),
            *(f"{line.best_error:.2f}", f"{line.best_lr:g}", str(line.diverged), str(line.runs)),
        )
        for line in robust.itertuples()
    )
    heads = ["Towers of", "Height", *MEASURES.values(), "Best error", "from", "Diverged", "Runs"]
    parts: list[Any] = [
        f"# Figure 3: {setting(runs)}",
        *pages.captioned(captions_of(runs)),
        "## Decades of robustness",
        f"*Decades*: how many powers of ten of starts end within {NEAR} times the best error of "
        "the plain rule. *Too small*: the same, only for starts below the plain rule's best start. "
        "*Reach*: how many powers of ten the smallest of them lies below that best start. *Own*: "
        "the same with the height's own best error, so how flat its curve is.",
        table(heads, "lrrrrrrrrrr", rows),
        "With height:",
        [
            f"- towers of {rule}: *{MEASURES[measure]}* "
            f"{'never shrinks' if verdict else 'shrinks somewhere'}."
            for (rule, measure), verdict in claim(robust).items()
        ],
    ]
    for rule, own in errors.groupby("rule", sort=False):
        heads = ["Start", *(f"height {height}" for height in own.height.unique())]
        cells = (
            [f"{lr:g}"]
            + [
                with_sd(one.test_error, one.sd) + diverged(one)
                for one in row.sort_values("height").itertuples()
            ]
            for lr, row in own.groupby("lr")
        )
        parts.append(f"## Towers of {rule}: test error in percent")
        parts.append(table(heads, "r" * len(heads), cells))
    return pages.page(*parts)


def captions(folder: Path) -> dict[str, str]:
    return captions_of(pd.read_csv(folder / "runs.csv"))


def captions_of(runs: pd.DataFrame) -> dict[str, str]:
    diverged = int(runs.diverged.sum())
    text = (
        "(a) Test error after the last epoch against the initial step size of all levels of a "
        "tower, mean and standard deviation over seeds. A cross above marks a start from which "
        f"a run diverged; {diverged} of {len(runs)} diverged, and count with the error of their "
        "last weights. Below, decades of robustness: how many powers of ten of starts end within "
        f"{NEAR} times the best error of the plain rule (dotted line) or, hatched, of the same "
        "height. (b) Time of a training step of the MLP against height, from results/step_time. "
        f"{setting(runs)}."
    )
    return {"figure": text}


def figure(runs: pd.DataFrame, table: pd.DataFrame, robust: pd.DataFrame) -> plt.Figure:
    """Draw error against the start for each rule, decades below it, and time against height."""
    rules = list(table.rule.unique())
    figure = plt.figure(figsize=(style.WIDTH, 4.6))
    left, right = figure.subfigures(1, 2, width_ratios=[2.3, 1])  # type: ignore[misc]
    axes = left.subplots(2, len(rules), sharey="row", height_ratios=[2.4, 1], squeeze=False)
    for (above, below), rule in zip(axes.T, rules, strict=True):
        draw_errors(above, table[table.rule == rule], rule)
        draw_decades(below, robust[robust.rule == rule])
    axes[0, 0].set_ylabel("test error (%)")
    axes[1, 0].set_ylabel("decades of\nrobustness")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    left.legend(handles, labels, loc="outside lower center", ncols=len(labels), title="height")
    axis = right.subplots()
    plot_heights(axis, pd.read_csv(TIMES), "mlp")
    axis.set(title="(b) a training step", ylabel="ms")
    right.legend(*axis.get_legend_handles_labels(), loc="outside lower center")
    spread = "; mean ± standard deviation" if runs.seed.nunique() > 1 else ""
    style.title(figure, f"{setting(runs)}{spread}")
    return figure


def draw_errors(axis: plt.Axes, table: pd.DataFrame, rule: str) -> None:
    """Draw a curve for each height; crosses above mark starts from which a run diverged."""
    looks = style.sequence(table.height.nunique())
    for (height, own), look in zip(table.groupby("height"), looks, strict=True):
        rows = own.sort_values("lr")
        sd = rows.sd.fillna(0.0)
        axis.plot(rows.lr, rows.test_error, label=f"{height}", linewidth=1.1, **look)
        low = (rows.test_error - sd).clip(lower=rows.lowest)
        high = (rows.test_error + sd).clip(upper=100.0)
        axis.fill_between(rows.lr, low, high, color=look["color"], alpha=0.18, linewidth=0)
        bad = rows.lr[rows.diverged > 0]
        place = 115 * 1.13**height  # above all errors, a line for each height
        axis.plot(bad, [place] * len(bad), "x", color=look["color"], markersize=3.5)
    best = table[table.height == 0].test_error.min()
    axis.axhline(NEAR * best, color=style.BLACK, linewidth=0.7, linestyle=":")
    axis.set(xscale="log", yscale="log", ylim=(2.5, 240), xlabel="initial step size")
    axis.yaxis.set_major_locator(FixedLocator([3, 5, 10, 20, 50, 100]))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xticks([1e-8, 1e-6, 1e-4, 1e-2, 1e0, 1e2])
    axis.set_title(f"(a) towers of {rule}")


def draw_decades(axis: plt.Axes, robust: pd.DataFrame) -> None:
    """Draw a bar for each height; behind it, hatched, the bar by the height's own best error."""
    looks = style.sequence(len(robust))
    for line, look in zip(robust.itertuples(), looks, strict=True):
        colour = look["color"]
        axis.bar(
            line.height, line.own_decades, 0.8, color="white", edgecolor=colour, hatch="//////"
        )
        axis.bar(line.height, line.decades, 0.5, color=colour, edgecolor="white")
        axis.annotate(
            f"{line.decades:.1f}",
            (line.height, max(line.decades, line.own_decades)),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
        )
    axis.set(xlabel="height", xticks=robust.height)
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.2)


def draw(folder: Path) -> list[Path]:
    """Draw Figure 3 from the CSV of its runs; returns the written files."""
    runs = pd.read_csv(folder / "runs.csv")
    errors = points(runs)
    robust = robustness(errors)
    texts = {"table.csv": csv_of(errors), "README.md": markdown(runs, errors, robust)}
    paths = write_all(folder, texts)
    return paths + style.save(figure(runs, errors, robust), folder / "figure")


def claims(folder: Path) -> Iterator[Claim]:
    """A claim for each rule and measure: robustness to small starts never shrinks with height."""
    runs = pd.read_csv(folder / "runs.csv")
    robust = robustness(points(runs))
    for (rule, measure), holds in claim(robust).items():
        own = robust[robust.rule == rule].sort_values("height")
        yield Claim(
            data_label(runs.data.iloc[0]),
            f"Figure 3a, towers of {rule}, {setting(runs)}",
            scale(is_papers(runs)),
            f"{CLAIMED[measure]}, by height",
            "never shrinks",
            ", ".join(f"{decades:.1f}" for decades in own[measure]),
            int(runs.seed.nunique()),
            "yes" if holds else "no",
            " ".join(runs[runs.rule == rule].hash),
        )


def prose(folder: Path) -> dict[str, str]:
    """The blocks in README and docs: the robustness of taller towers, in words."""
    runs = pd.read_csv(folder / "runs.csv")
    errors = points(runs).set_index(["rule", "height", "lr"]).sort_index().test_error
    robust = robustness(points(runs)).set_index(["rule", "height"])
    top = robust.loc["Adam"].index.max()
    reach = robust.reach
    best = errors["SGD", 0].idxmin()
    text = (
        f"{setting(runs)}. From a step size of 1e-8 plain Adam ends at a test error of "
        f"{errors['Adam', 0, 1e-8]:.1f} %, a tower of Adam of height {top} at "
        f"{errors['Adam', top, 1e-8]:.1f} %. A tower of height 2 ends within {NEAR} times the best "
        f"error of plain Adam from starts {reach['Adam', 2]:.1f} powers of ten below the best one, "
        f"one of height {top} from {reach['Adam', top]:.1f}. Extra height does not help from every "
        f"small start: from 1e-4 heights 2 and {top} end at {errors['Adam', 2, 1e-4]:.1f} and "
        f"{errors['Adam', top, 1e-4]:.1f} %. From 100, every tower of Adam ends at "
        f"{errors.loc['Adam', 1:, 100].min():.0f} % or more. Plain SGD does best from {best:.3g}, "
        f"at {errors['SGD', 0, best]:.1f} %; from a hundredth of that and less, no tower of SGD "
        f"ends below {errors.loc['SGD', 1:, : best / 100].min():.1f} %."
    )
    found = {
        lr: ", ".join(f"{errors['Adam', height, lr]:.1f}" for height in (0, 2, top))
        for lr in (1e-8, 1e-4)
    }
    line = (
        "Figure 3a: towers, MNIST",
        "taller towers depend less on the start",
        f"test error of Adam at height 0, 2, {top}: "
        + "; ".join(f"from {lr:g}: {cells} %" for lr, cells in found.items()),
    )
    return {"summary": text, "line": " | ".join(line)}


def main() -> int:
    if asked_for_help(__doc__, ResultsOptions):
        return 0
    options, _ = split(sys.argv[1:], ResultsOptions, ())
    return 0 if check(Path(options.results)) else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
