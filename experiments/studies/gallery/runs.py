"""A gallery of paths on two-dimensional surfaces: textbook methods and towers.

    python -m experiments.studies gallery
    python -m experiments.studies gallery results=results

All paths on a surface begin at the same point. The step size of each rule, and the hyper-step size
of each tower, are the best of a grid, by the mean value along the path. The towers' own step size
begins at a thousandth of plain gradient descent's. The figures go to `results/gallery`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.cli import ResultsOptions, asked_for_help, split
from experiments.files import write_text
from experiments.studies.study import Measurement


def main(arguments: Sequence[str]) -> int:
    if asked_for_help(__doc__, ResultsOptions, arguments=arguments):
        return 0
    # These import matplotlib and scipy, which take seconds; every command imports this file.
    from experiments.studies.gallery import report
    from experiments.studies.gallery.walks import SURFACES, paths, table

    options, _ = split(arguments, ResultsOptions, ())
    folder = Path(options.results, "gallery")
    torch.set_num_threads(1)
    walks = {surface.name: paths(surface) for surface in SURFACES}
    text = table(walks).to_csv(index=False, lineterminator="\n", float_format="%.4g")
    write_text(folder / "table.csv", text)
    for path in (folder / "table.csv", *report.draw(walks, folder)):
        print(path)
    return 0


STUDY = Measurement("gallery", main, __doc__, place=7)
