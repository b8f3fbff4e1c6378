"""The gallery: its methods against closed forms, its files."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from experiments.studies.gallery import report
from experiments.studies.gallery import walks as gallery
from experiments.studies.gallery.runs import STUDY
from experiments.studies.gallery.walks import GROUPS, SURFACES, TOWERS, best, by_tower

VALLEY = SURFACES[0]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "STEPS", 4)
    monkeypatch.setattr(report, "FRAMES", 3)
    monkeypatch.setattr(report, "STEPS", 4)
    for methods in GROUPS.values():
        for name, (walk, grid) in methods.items():
            monkeypatch.setitem(methods, name, (walk, grid[7:8] or grid))
    for name, (notation, _) in TOWERS.items():
        monkeypatch.setitem(TOWERS, name, (notation, (1e-9,)))


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
def test_minima_are_stationary_and_lowest(surface: gallery.Surface) -> None:
    x0, x1, y0, y1 = surface.view
    x, y = torch.meshgrid(torch.linspace(x0, x1, 99), torch.linspace(y0, y1, 99), indexing="xy")
    assert surface.f(x, y).min() >= surface.lowest - 1e-6
    for minimum in surface.minima:
        point = torch.tensor(minimum, dtype=torch.float64)
        assert torch.func.grad(surface.at)(point).abs().max() < 1e-12
        assert float(surface.at(point)) == pytest.approx(surface.lowest)
        assert x0 < minimum[0] < x1 and y0 < minimum[1] < y1


def test_methods_do_what_their_names_say(short: None) -> None:
    """On f = (x² + 30 y²) / 2: Newton takes one step; line search turns by right angles."""
    found = {
        name: best(VALLEY, name, *how).points
        for methods in GROUPS.values()
        for name, how in methods.items()
    }
    np.testing.assert_allclose(found["Newton"][1], 0.0, atol=1e-12)
    steps = np.diff(found["exact line search"], axis=0)
    for first, second in itertools.pairwise(steps):
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert abs(cosine) < 1e-5
    lr = GROUPS["plain"]["gradient descent"][1][0]
    x, y = VALLEY.start
    descent = [(x * (1 - lr) ** k, y * (1 - 30 * lr) ** k) for k in range(5)]
    np.testing.assert_allclose(found["gradient descent"], descent, rtol=1e-12)


def test_a_tower_moves_its_step_size_by_the_product_of_gradients(short: None) -> None:
    lr, above = 1e-3, 1e-6
    trail = best(VALLEY, "", by_tower(f"SGD({lr}) / SGD({above})"), (math.nan,))
    scale = np.array([1.0, 30.0])
    point, before, size = np.array(VALLEY.start), None, lr
    for reached in trail.points:
        np.testing.assert_allclose(reached, point, rtol=1e-12)
        gradient = scale * point
        size += 0.0 if before is None else above * float(gradient @ before)
        point, before = point - size * gradient, gradient


def test_the_best_of_a_grid_has_the_lowest_mean(short: None) -> None:
    walk, _ = GROUPS["plain"]["gradient descent"]
    grid = (1e-3, 1e-2, 1e-1, 1e200)  # the third swings ever wider, the last ends at infinity
    trails = [best(VALLEY, "", walk, (size,)) for size in grid]
    assert [trail.size for trail in trails] == [*grid]
    means = [trail.mean for trail in trails]
    assert means[3] == math.inf and means[1] == min(means)
    assert best(VALLEY, "", walk, grid).size == 1e-2

    # A detour that ends lower is worse than a path that is low on the whole.
    ways = {
        1.0: [(-9.0, 2.0), *[(99.0, 99.0)] * 3, (0.0, 0.0)],
        2.0: [(-9.0, 2.0), *[(1.0, 0.0)] * 4],
    }
    chosen = best(VALLEY, "", lambda _, size: [torch.tensor(p) for p in ways[size]], (1.0, 2.0))
    assert chosen.size == 2.0


def test_the_files(short: None, tmp_path: Path) -> None:
    assert STUDY.main([f"results={tmp_path}"]) == 0
    folder = tmp_path / "gallery"
    assert len(pd.read_csv(folder / "table.csv")) == 4 * (9 + len(TOWERS))
    with Image.open(folder / "animation.gif") as image:
        assert image.format == "GIF" and getattr(image, "n_frames", 1) == 3
    names = {path.name for path in folder.iterdir()}
    assert names == {"table.csv", "animation.gif", "figure.pdf", "figure.png"}
