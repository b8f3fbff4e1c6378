"""The dashboard of the runs on Weights & Biases, as code.

    python -m experiments.records.dashboard entity=NAME
    python -m experiments.records.dashboard entity=NAME project=hyperopt

makes a view of the project, with the error (of a text the perplexity) by the height of the tower,
the lr over time by where it started, and how robust each height is against its start: a heat map of
height by initial lr, which is a chart of its own beside the view. It needs a key (wandb login).
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.reports.v2 import Config, SummaryMetric

from experiments.cli import asked_for_help, guarded, split
from experiments.config.schema import LoggerConfig
from experiments.records.loggers.wandb import offline
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
    project: str = field(default=LoggerConfig().project)


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The dashboard; nothing is sent before its `save`."""
    by_height: list[Any] = []
    robustness: list[Any] = []
    for metric, words in MEASURES.items():
        by_height += [
            panels.BarPlot(
                title=f"{words} by height",
                metrics=[metric],
                groupby=Config("height"),
                groupby_aggfunc="mean",
                groupby_rangefunc="stddev",
                title_x=words,
            ),
            _in_the_course_of_training(words, metric),
        ]
        robustness += [
            panels.CustomChart(
                query={"config": {"keys": ["height", "lr"]}, "summary": {"keys": [metric]}},
                chart_name=f"{entity}/{HEAT_MAP_NAME}",
                chart_fields={"height": "height", "lr": "lr", "value": metric},
                chart_strings={"title": f"{words} by height and initial lr"},
            ),
            panels.ParallelCoordinatesPlot(
                title=f"From a start to an end: {words}",
                columns=[
                    panels.ParallelCoordinatesPlotColumn(Config("height")),
                    panels.ParallelCoordinatesPlotColumn(Config("lr"), log=True),
                    panels.ParallelCoordinatesPlotColumn(SummaryMetric("learned.0.lr")),
                    panels.ParallelCoordinatesPlotColumn(SummaryMetric(metric)),
                ],
            ),
        ]
    by_height.append(_in_the_course_of_training("Training loss", "train_loss"))
    lr_over_time = [
        panels.LinePlot(
            title="lr by where it started",
            x="Step",
            y=["0.lr"],
            log_y=True,
            groupby=Config("lr"),
        ),
        panels.LinePlot(
            title="Hypergradient of lr",
            x="Step",
            y=["hypergradient.0.lr"],
            groupby=Config("lr"),
        ),
    ]
    sections = {
        "Error by height": by_height,
        "Learning rate over time": lr_over_time,
        "Robustness": robustness,
    }
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


def _in_the_course_of_training(words: str, metric: str) -> panels.LinePlot:
    return panels.LinePlot(
        title=f"{words} in the course of training",
        x="Step",
        y=[metric],
        groupby=Config("height"),
        groupby_rangefunc="stddev",
    )


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
