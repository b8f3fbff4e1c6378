"""The dashboard of the runs on Weights & Biases, as code.

    python -m experiments.dashboard entity=NAME
    python -m experiments.dashboard entity=NAME project=hyperopt

makes a view of the project, with the error by the height of the tower, the lr over time by where it
started, and how robust each height is against its start. It needs a key (wandb login).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.reports.v2 import Config, SummaryMetric

from .command import split
from .config import LoggerConfig
from .logger import offline
from .run import guarded


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    entity: str = ""
    project: str = field(default=LoggerConfig().project)


ERROR = SummaryMetric("test_error")


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The dashboard; nothing is sent before its `save`."""
    by_height = workspaces.Section(
        name="Error by height",
        panels=[
            panels.BarPlot(
                title="Test error by height",
                metrics=["test_error"],
                groupby=Config("height"),
                groupby_aggfunc="mean",
                groupby_rangefunc="stddev",
                title_x="test error (%)",
            ),
            panels.LinePlot(
                title="Test error in the course of training",
                x="Step",
                y=["test_error"],
                groupby=Config("height"),
                groupby_rangefunc="stddev",
            ),
        ],
        is_open=True,
    )
    lr_over_time = workspaces.Section(
        name="Learning rate over time",
        panels=[
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
        ],
        is_open=True,
    )
    robustness = workspaces.Section(
        name="Robustness",
        panels=[
            panels.ScatterPlot(
                title="Test error (colour) by height and initial lr",
                x=Config("height"),
                y=Config("lr"),
                z=ERROR,
                log_y=True,
                gradient=[
                    panels.GradientPoint(color="#440154", offset=0),
                    panels.GradientPoint(color="#21918c", offset=50),
                    panels.GradientPoint(color="#fde725", offset=100),
                ],
            ),
            panels.ParallelCoordinatesPlot(
                title="From a start to an error",
                columns=[
                    panels.ParallelCoordinatesPlotColumn(Config("height")),
                    panels.ParallelCoordinatesPlotColumn(Config("lr"), log=True),
                    panels.ParallelCoordinatesPlotColumn(SummaryMetric("learned.0.lr")),
                    panels.ParallelCoordinatesPlotColumn(ERROR),
                ],
            ),
        ],
        is_open=True,
    )
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Towers of optimizers",
        sections=[by_height, lr_over_time, robustness],
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Metric("Group")],
            order=[workspaces.Ordering(workspaces.Summary("test_error"), ascending=True)],
        ),
    )


def main() -> int:
    if set(sys.argv[1:]) & {"-h", "--help"}:
        print(__doc__)
        return 0
    options, _ = split(sys.argv[1:], Options, ())
    if not options.entity:
        raise ValueError("entity is not set; give the W&B user or team as in entity=NAME")
    if offline():
        raise ValueError("W&B has no key here; log in with: wandb login")
    print(workspace(options.entity, options.project).save().url)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
