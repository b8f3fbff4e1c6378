"""A learned schedule is recorded, and a plain optimizer that replays it repeats the run."""

from typing import Any

import pytest
import torch
from torch import nn

from hyperopt import HyperOptimizer, Replay, Schedule


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def train(model: nn.Module, optimizer, after) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(40):
        x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        after()
    return losses


LEARNERS: dict[str, Any] = {
    "SGD(0.05, momentum=0.5) / SGD(1e-3)": lambda p: torch.optim.SGD(p, 1, momentum=0.1),
    "Adam(0.01) / Adam(1e-3)": torch.optim.Adam,
    "RMSProp(0.01) / SGD(1e-3)": torch.optim.RMSprop,
    "AdamW(0.01, weight_decay=0.1)[lr: log, weight_decay] / SGD(0.1)": torch.optim.AdamW,
}


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("stack", LEARNERS)
def test_a_replay_repeats_the_run(stack, suffix, tmp_path):
    model, schedule = net(), Schedule()
    tower = HyperOptimizer(model.parameters(), stack, compile=False)
    learned = train(model, tower, lambda: schedule.append(tower))
    assert len(set(schedule.values["lr"])) == 40, "the lr must have moved at every step"
    schedule.save(tmp_path / f"learned.{suffix}")
    plain = stack.partition("/")[0].partition("[")[0]
    makers = (LEARNERS[stack], lambda p: HyperOptimizer(p, plain, compile=False))
    for make in makers:
        model = net()
        optimizer = make(model.parameters())
        replay = Replay(optimizer, Schedule.load(tmp_path / f"learned.{suffix}"))
        assert train(model, optimizer, replay.step) == pytest.approx(learned, rel=1e-9)
        assert replay.last_step == 41


def test_groups_and_interpolation_of_a_replay():
    schedule = Schedule([1, 3], {"lr[0]": [0.1, 0.3], "lr[1]": [1.0, 2.0]})
    p, q = (torch.ones(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [p]}, {"params": [q]}], 5.0)

    def lrs() -> list[float]:
        return [group["lr"] for group in optimizer.param_groups]

    replay = Replay(optimizer, schedule)
    assert lrs() == [0.1, 1.0]
    replay.step()
    assert lrs() == pytest.approx([0.2, 1.5])  # between two known steps
    state = replay.state_dict()
    replay.step()
    replay.step()
    assert lrs() == pytest.approx([0.3, 2.0])  # and after the last one
    replay.load_state_dict(state)
    assert lrs() == pytest.approx([0.2, 1.5])


def test_a_schedule_that_is_continued(tmp_path):
    """For example in a resumed run, or in a run that reads its schedule midway."""
    p = torch.ones(2, requires_grad=True)
    optimizer, schedule = HyperOptimizer([p], "SGD(0.1) / SGD(0.01)", compile=False), Schedule()
    lrs = []
    for t in range(6):
        p.grad = torch.ones(2)
        optimizer.step()
        schedule.append(optimizer)
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        if t == 1:
            assert schedule.steps == [1, 2]
        if t == 3:
            schedule.save(tmp_path / "learned.csv")
            schedule = Schedule.load(tmp_path / "learned.csv")
    assert schedule.steps == [1, 2, 3, 4, 5, 6] and schedule.values["lr"] == lrs


def test_columns_of_zeros_are_optional():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], 1.0)
    Replay(optimizer, Schedule([1], {"lr": [0.1], "gamma": [0.0]}))
    assert optimizer.param_groups[0]["lr"] == 0.1 and "gamma" not in optimizer.param_groups[0]
    adam = torch.optim.Adam([torch.ones(1, requires_grad=True)])
    Replay(adam, Schedule([1], {"beta1": [0.5]}))
    assert adam.param_groups[0]["betas"] == (0.5, 0.999)


def test_a_group_without_what_the_optimizer_would_have():
    """A value that was always 0 is set if the optimizer's own value is not 0."""
    p, q = (torch.ones(1, requires_grad=True) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "weight_decay": 0.0, "lr": 0.0}]
    learner = HyperOptimizer(groups, "AdamW(0.01, weight_decay=0.1)", compile=False)
    p.grad, q.grad = torch.ones(1), torch.ones(1)
    learner.step()
    schedule = Schedule()
    schedule.append(learner)
    plain = torch.optim.AdamW([{"params": [p]}, {"params": [q]}])
    Replay(plain, schedule)
    assert [group["weight_decay"] for group in plain.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in plain.param_groups] == [0.01, 0.0]


def test_a_schedule_after_adding_a_group():
    p, q = (torch.ones(1, requires_grad=True) for _ in range(2))
    optimizer, schedule = HyperOptimizer([p], "SGD(0.1) / SGD(0.01)", compile=False), Schedule()
    p.grad, q.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    schedule.append(optimizer)
    optimizer.add_param_group({"params": [q], "lr": 0.5})
    optimizer.step()
    with pytest.raises(ValueError, match=r"has lr, .*now has lr, lr\[1\].*; start a new schedule"):
        schedule.append(optimizer)
    assert schedule.steps == [1]
    with pytest.raises(ValueError, match=r"the schedule has lr, but the optimizer now has"):
        Schedule([1], {"lr": [0.1]}).append(optimizer)


def test_a_name_may_contain_csv_separators(tmp_path):
    values = {'lr[a,"b"]': [0.1, 1e-7], "momentum": [0.9, 1 / 3]}
    Schedule([1, 5], values).save(tmp_path / "learned.csv")
    assert Schedule.load(tmp_path / "learned.csv").values == values


def test_schedules_that_cannot_be_replayed(tmp_path):
    p = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="SGD has no hyperparameter 'gamma'"):
        Replay(torch.optim.SGD([p], 0.1), Schedule([1], {"gamma": [0.9]}))
    for name, message in (
        ("lr[1]", r"has no param group in this optimizer; give"),
        ("lr[hidden.weight]", r"belongs to one tensor, .* learn the schedule per group, with each"),
    ):
        with pytest.raises(ValueError, match=message):
            Replay(torch.optim.SGD([p], 0.1), Schedule([1], {name: [0.9]}))
    with pytest.raises(ValueError, match="the schedule has no steps to replay; call append"):
        Replay(torch.optim.SGD([p], 0.1), Schedule())
    tower = HyperOptimizer([p], "SGD(0.1) / SGD(0.2)", compile=False)
    with pytest.raises(ValueError, match=r"lr cannot be replayed, since SGD\(0.2\) moves it"):
        Replay(tower, Schedule([1], {"lr": [0.1]}))
    with pytest.raises(TypeError, match="needs a HyperOptimizer, not SGD"):
        Schedule().append(torch.optim.SGD([p], 0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no steps to write to .*none.csv; call append"):
        Schedule().save(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="steps of a schedule must increase"):
        Schedule([2, 1], {"lr": [0.1, 0.2]})
    with pytest.raises(ValueError, match="lr has 1 values for 2 steps"):
        Schedule([1, 2], {"lr": [0.1]})
    for text in ("", "lr\n0.1\n", "step,lr\n1,x\n", "step,lr\n", "step,lr\n1.5,0.1\n"):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=r"bad.csv cannot be replayed .*; expected a CSV"):
            Schedule.load(tmp_path / "bad.csv")
    for text in ("5", '"x"', '{"step": [1], "lr": ["a"]}', '{"step": [1], "lr": 0.1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json cannot be replayed .*; expected a CSV"):
            Schedule.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"none.json cannot be replayed \(FileNotFoundError"):
        Schedule.load(tmp_path / "none.json")
