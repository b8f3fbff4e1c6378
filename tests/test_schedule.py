"""Schedules follow their formulas at any length; invalid ones are refused."""

from pathlib import Path

import pandas as pd
import pytest

from experiments.config.compose import compose
from experiments.config.identity import run_hash
from experiments.config.lr_schedules import make_schedule
from experiments.config.resolve import resolve
from experiments.config.schema import Config
from experiments.training.trainer import train


def lrs(steps: int, *overrides: str) -> list[float]:
    """The lr of each step of a run that starts at 0.1."""
    schedule = make_schedule(compose(overrides).schedule, {"lr": 0.1}, steps)
    return [schedule(step).get("lr", 0.1) for step in range(steps)]


def test_a_constant_schedule_sets_nothing() -> None:
    assert make_schedule(compose([]).schedule, {"lr": 0.1}, 10)(3) == {}


def test_he_divides_by_ten_at_32000_and_48000_of_64000() -> None:
    found = lrs(64_000, "schedule=he")
    drops = [step for step in range(1, 64_000) if found[step] != found[step - 1]]
    assert drops == [32_000, 48_000]
    assert [found[step] for step in (0, *drops)] == pytest.approx([0.1, 0.01, 0.001])
    short = lrs(3910, "schedule=he")  # ten epochs
    assert [step for step in range(1, 3910) if short[step] != short[step - 1]] == [1955, 2933]


def test_linear_goes_to_one_percent_at_tau() -> None:
    found = lrs(101, "schedule=linear", f"schedule.until={50 / 101}")
    for k in range(101):
        alpha = min(k / 50, 1.0)  # Goodfellow et al., equation 8.14
        assert found[k] == pytest.approx((1 - alpha) * 0.1 + alpha * 0.001)


def test_exponential_is_char_rnns() -> None:
    """After each epoch from the 10th on, the lr is multiplied by 0.97; here 7 steps an epoch."""
    found, lr = lrs(350, "schedule=exponential"), 0.1
    for epoch in range(1, 51):
        assert found[7 * (epoch - 1) : 7 * epoch] == pytest.approx([lr] * 7)
        if epoch >= 10:
            lr *= 0.97


def test_cosine_starts_at_the_lr_and_ends_near_its_final_share() -> None:
    found = lrs(1000, "schedule=cosine", "schedule.final=0.1")
    assert found[0] == 0.1 and found[500] == pytest.approx(0.055)
    assert found[-1] == pytest.approx(0.01, abs=1e-5)
    assert found == sorted(found, reverse=True)


def test_a_replay_interpolates_its_values(tmp_path: Path) -> None:
    path = tmp_path / "learned.csv"
    path.write_text("step,lr,momentum\n1,0.1,0.9\n3,0.3,0.5\n")
    overrides = ["schedule=replay", f"schedule.file={path}"]
    schedule = make_schedule(compose(overrides).schedule, {}, 10)
    found = [schedule(step) for step in range(4)]  # the first step is step 1 of the file
    assert [row["lr"] for row in found] == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert [row["momentum"] for row in found] == pytest.approx([0.9, 0.7, 0.5, 0.5])


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        resolve(composed(*overrides), "mnist-5k")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def composed(*overrides: str) -> Config:
    return compose(["data=mnist-5k", "device=cpu", "stack=SGD(0.1)", *overrides])


def test_a_replay_of_what_a_tower_moves_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "learned.csv"
    path.write_text("step,lr\n1,0.1\n")
    replay = ("schedule=replay", f"schedule.file={path}")
    said = refused("stack=SGD(0.1) / SGD(0.01)", *replay)
    assert "schedule replay sets lr, but SGD(0.01) tunes it" in said
    resolve(composed("stack=SGD(0.1, momentum=0.9)[momentum] / SGD(0.01)", *replay), "mnist")


def test_a_schedule_scales_the_learned_lr_and_both_are_recorded(tmp_path: Path) -> None:
    fast = ("trainer.compile=false", "trainer.compile_model=false", "trainer.epochs=2")
    stack = "stack=Adam(0.001)[lr: log] / SGD(0.05)"
    own = ("schedule=linear", "trainer.record_every=1", f"store={tmp_path}", *fast)
    config = resolve(composed(stack, *own), "mnist-5k")
    train(config)
    table = pd.read_csv(tmp_path / run_hash(config) / "hyperparameters.csv")
    learned, effective = table["0.lr"], table["0.effective_lr"]
    assert len(set(learned)) > 10  # it is tuned
    factors = lrs(len(table), "schedule=linear")
    assert (effective / learned).tolist() == pytest.approx([10 * factor for factor in factors])


@pytest.mark.parametrize(
    ("schedule", "value", "expected"),
    [
        ("linear", "until=0.0", "a share of the run, above 0 and at most 1"),
        ("linear", "until=1.5", "a share of the run, above 0 and at most 1"),
        ("cosine", "final=-3.0", "a share of the lr, from 0 up"),
        ("cosine", "final=inf", "a share of the lr, from 0 up"),
        ("he", "factor=nan", "a number from 0 up"),
        ("he", "milestones=[50.0, 75.0]", "shares of the run between 0 and 1, as in [0.5,0.75]"),
        ("exponential", "epochs=0", "1 or more"),
        ("exponential", "after=0", "1 or more"),
        ("replay", "file=", "the name of a file"),
    ],
)
def test_a_value_out_of_its_limits_is_refused(schedule: str, value: str, expected: str) -> None:
    said = refused(f"schedule={schedule}", f"schedule.{value}")
    assert said == f"schedule.{value} must be {expected}"


def test_an_unsuitable_schedule_is_refused(tmp_path: Path) -> None:
    assert "did you mean 'cosine'?" in refused("schedule.name=cosin")
    assert refused("schedule.name=cosine") == "schedule cosine needs schedule.final"
    assert refused("schedule.final=0.1") == "schedule constant does not read schedule.final"
    path = tmp_path / "learned.csv"
    replay = ("schedule=replay", f"schedule.file={path}")
    assert "learned.csv cannot be replayed (FileNotFoundError" in refused(*replay)
    path.write_text("step,lr\n1,much\n")
    assert "could not convert string to float: 'much'" in refused(*replay)
    path.write_text("epoch,lr\n1,0.1\n")
    assert "expected a CSV or JSON of numbers with a column step" in refused(*replay)
    path.write_text("step,beta1\n1,0.1\n")
    assert "has a column 'beta1', but SGD has no such" in refused(*replay)
