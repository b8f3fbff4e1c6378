"""The dashboard of the runs on Weights & Biases, as code.

    python -m experiments.records.dashboard entity=NAME
    python -m experiments.records.dashboard entity=NAME project=hyperopt

makes a view of the project: lr, momentum, loss and error (of a text the perplexity) over training,
by the height of the tower and by the initial lr, and the error at the end by both. Its heat map is
a chart of its own beside the view. It needs a key (wandb login).
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.reports.v2 import Config, SummaryMetric

from experiments.cli import asked_for_help, guarded, split
from experiments.records.loggers.wandb import PROJECT, metric, offline
from experiments.tasks.catalog import tasks

# How runs are judged.
MEASURES = {task.judged_by.name: task.judged_by.words.capitalize() for task in tasks()}

# W&B has no heat map of its own. In this one, in Vega-Lite, a cell is the mean over its runs.
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
# Another specification is another chart.
HEAT_MAP_NAME = f"height-by-lr-{hashlib.sha256(json.dumps(HEAT_MAP).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    entity: str = ""
    project: str = PROJECT


# What is shown over training, by the height of the tower and by the initial lr.
OVER_TIME = {
    metric("0.lr"): "lr",
    metric("0.momentum"): "momentum",
    metric("0.beta1"): "beta1",
    "train_loss": "Training loss",
    **MEASURES,
}
GROUPS = {"height": "by height", "lr": "by start"}


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The dashboard; nothing is sent before its `save`."""
    sections = {
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


def make_heat_map(entity: str) -> None:
    """Put the heat map's specification there, where the panels find it by its name."""
    try:
        wandb.Api().create_custom_chart(
            entity=entity,
            name=HEAT_MAP_NAME,
            display_name="Height by initial lr",
            spec_type="vega2",
            access="private",
            spec=HEAT_MAP,
        )
    except wandb.Error as error:  # as where it has been made before
        reason = str(error).partition("\n")[0]
        print(f"the heat map {entity}/{HEAT_MAP_NAME} is not made anew: {reason}", file=sys.stderr)


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    if not options.entity:
        raise ValueError("entity is not set; give the W&B user or team as in entity=NAME")
    if offline():
        raise ValueError("W&B has no key here; log in with: wandb login")
    make_heat_map(options.entity)
    print(workspace(options.entity, options.project).save().url)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
