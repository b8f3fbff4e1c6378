"""Make the dashboard of the runs on Weights & Biases.

    python -m experiments.records.dashboard entity=NAME
    python -m experiments.records.dashboard entity=NAME project=hyperopt
    python -m experiments.records.dashboard picture=docs/dashboards.png

The dashboard shows lr, momentum, loss and error (for a text, perplexity) over training, grouped by
the height of the tower and by the initial lr, and the final error by both. The heat map is a
separate custom chart. W&B needs a key (wandb login). The last command draws the panels over
training without W&B, from the runs in the folder `records`.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.reports.v2 import Config, SummaryMetric

from experiments.cli import asked_for_help, guarded, split
from experiments.records.archive import read_records
from experiments.records.loggers.logger import initial
from experiments.records.loggers.wandb import PROJECT, describe, metric, offline
from experiments.tasks.catalog import tasks

# The metrics of all tasks.
MEASURES = {task.judged_by.name: task.judged_by.words.capitalize() for task in tasks()}

# W&B has no heat map, so this is one in Vega-Lite. A cell is the mean over its runs.
HEAT_MAP: dict[str, Any] = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "data": {"name": "wandb"},
    "title": "${string:title}",
    "transform": [{"filter": "isValid(datum['${field:value}']) && isValid(datum['${field:lr}'])"}],
    "mark": {"type": "rect", "tooltip": True},
    "encoding": {
        "x": {"field": "${field:height}", "type": "ordinal", "title": "height"},
        "y": {
            "field": "${field:lr}",
            "type": "ordinal",
            "sort": "descending",
            "title": "initial lr",
            "axis": {"format": "~g"},
        },
        "color": {
            "field": "${field:value}",
            "aggregate": "mean",
            "type": "quantitative",
            "title": "mean",
            "scale": {"scheme": "viridis"},
        },
    },
}
# The hash makes each version of the specification a new chart.
HEAT_MAP_NAME = f"height-by-lr-{hashlib.sha256(json.dumps(HEAT_MAP).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    entity: str = ""
    project: str = PROJECT
    picture: str = ""
    records: str = "results/figure2/cpu/records"


# Metrics over training, grouped by the height of the tower and by the initial lr.
OVER_TIME = {
    metric("0.lr"): "lr",
    metric("0.momentum"): "momentum",
    metric("0.beta1"): "beta1",
    "train_loss": "Training loss",
    **MEASURES,
}
GROUPS = {"height": "by height", "lr": "by start"}


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """Build the dashboard; only its `save` sends anything."""
    sections: dict[str, list[Any]] = {
        f"Over training, {words}": [
            _over_time(f"{name} {words}", column, group) for column, name in OVER_TIME.items()
        ]
        for group, words in GROUPS.items()
    }
    hypergradient = metric("hypergradient.0.lr")
    sections["Hypergradients"] = [_over_time("Hypergradient of lr by start", hypergradient, "lr")]
    sections["At the end"] = [
        panel for column, words in MEASURES.items() for panel in _at_the_end(entity, column, words)
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Towers of optimizers",
        sections=[
            workspaces.Section(name=name, panels=those, is_open=True)
            for name, those in sections.items()
        ],
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Metric("Group")],
            order=[workspaces.Ordering(workspaces.Summary("train_loss"), ascending=True)],
        ),
    )


def _over_time(title: str, column: str, group: str) -> panels.LinePlot:
    return panels.LinePlot(
        title=title,
        x="Step",
        y=[column],
        log_y=column == metric("0.lr"),
        groupby=Config(group),
        groupby_rangefunc="stddev",
    )


def _at_the_end(entity: str, column: str, words: str) -> list[Any]:
    columns = panels.ParallelCoordinatesPlotColumn
    return [
        panels.BarPlot(
            title=f"{words} by height",
            metrics=[column],
            groupby=Config("height"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            title_x=words,
        ),
        panels.CustomChart(
            query={"config": {"keys": ["height", "lr"]}, "summary": {"keys": [column]}},
            chart_name=f"{entity}/{HEAT_MAP_NAME}",
            chart_fields={"height": "height", "lr": "lr", "value": column},
            chart_strings={"title": f"{words} by height and initial lr"},
        ),
        panels.ParallelCoordinatesPlot(
            title=f"From a start to an end: {words}",
            columns=[
                columns(Config("height")),
                columns(Config("lr"), log=True),
                columns(SummaryMetric(metric("learned.0.lr"))),
                columns(SummaryMetric(column)),
            ],
        ),
    ]


def draw(records: Path, path: Path) -> None:
    """Draw the panels over training as W&B does: mean and sd over the runs of a group."""
    from matplotlib import pyplot as plt

    runs = [_history(files) for files in read_records(records).values()]
    shown = {c: t for c, t in OVER_TIME.items() if any(c in run.columns for _, run in runs)}
    figure, axes = plt.subplots(
        len(GROUPS), len(shown), figsize=(3.2 * len(shown), 2.6 * len(GROUPS)), squeeze=False
    )
    for row, (group, words) in zip(axes, GROUPS.items(), strict=True):
        for axis, (column, title) in zip(row, shown.items(), strict=True):
            groups: dict[Any, list[pd.Series]] = {}
            for config, run in runs:
                if column in run:
                    groups.setdefault(config[group], []).append(run[column].dropna())
            for value in sorted(groups):
                table = pd.concat(groups[value], axis=1).sort_index()
                mean, sd = table.mean(axis=1), table.std(axis=1).fillna(0)
                (line,) = axis.plot(mean.index, mean, lw=1, label=f"{group}: {value:g}")
                axis.fill_between(
                    mean.index, mean - sd, mean + sd, color=line.get_color(), alpha=0.2, lw=0
                )
            axis.set_title(f"{title} {words}", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.set_xlabel("Step", fontsize=7)
            if column == metric("0.lr"):
                axis.set_yscale("log")
        row[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _history(files: dict[str, str]) -> tuple[dict[str, Any], pd.DataFrame]:
    """The config of a run, and its history by step, under W&B's names."""
    settings = json.loads(files["config.json"])
    settings.pop("hash")
    tables = [
        pd.read_csv(io.StringIO(files[f"{name}.csv"])).set_index("step")
        for name in ("hyperparameters", "curves")
    ]
    both = tables[0].combine_first(tables[1])
    start = initial(settings["stack"], dict.fromkeys(both.columns, 0.0))
    both.loc[0] = {name: start.get(name) for name in both.columns}
    return describe("", settings, {})["config"], both.sort_index().rename(columns=metric)


def make_heat_map(entity: str) -> None:
    """Upload the heat map's specification; the panels find it by its name."""
    try:
        wandb.Api().create_custom_chart(
            entity=entity,
            name=HEAT_MAP_NAME,
            display_name="Height by initial lr",
            spec_type="vega2",
            access="private",
            spec=HEAT_MAP,
        )
    except wandb.Error as error:  # for example, it exists already
        reason = str(error).partition("\n")[0]
        print(f"the heat map {entity}/{HEAT_MAP_NAME} is not uploaded: {reason}", file=sys.stderr)


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    if options.picture:
        draw(Path(options.records), Path(options.picture))
        print(options.picture)
        return 0
    if not options.entity:
        raise ValueError("entity is not set; give the W&B user or team, as in entity=NAME")
    if offline():
        raise ValueError("W&B has no key on this machine; log in with: wandb login")
    make_heat_map(options.entity)
    print(workspace(options.entity, options.project).save().url)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
