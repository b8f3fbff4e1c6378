"""The benchmark times the right code, and its table reports whether a bound is met."""

import json

import pandas as pd
import pytest
import torch

from experiments.studies.step_time import contenders as benchmark
from experiments.studies.step_time import peers, report, runs
from hyperopt import Auto, HyperOptimizer
from models.mlp import MLP


def test_contenders_take_turns_and_each_is_timed(monkeypatch):
    monkeypatch.setattr(runs, "ROUNDS", {"mlp": 2})
    families = {
        name: (low, high, tuple(h for h in heights if h <= 1))
        for name, (low, high, heights) in benchmark.FAMILIES.items()
    }
    monkeypatch.setattr(benchmark, "FAMILIES", families)
    monkeypatch.setattr(
        benchmark,
        "HyperOptimizer",
        lambda params, stack, compile=True: HyperOptimizer(params, stack, compile=False),
    )
    rows = json.loads(json.dumps(runs.measure("mlp")))
    table = pd.DataFrame(rows).set_index(["optimizer", "family", "height"])
    assert table.index.is_unique
    assert set(table.index.get_level_values(0)) == {
        "torch.optim foreach",
        "torch.optim fused",
        "compiled",
        "eager",
        "published",
    }
    assert (table.whole_us > 0).all()
    assert table.step_us.isna().eq(table.index.get_level_values(0) == "published").all()
    timed = table[table.step_us.notna()]
    assert timed.step_us.between(timed.step_us_q25, timed.step_us_q75).all()
    assert (timed.inside_us > 0).all()
    # Adam holds two moments, a tower of it the last gradient as well.
    assert table.bytes_per_parameter["torch.optim fused", "Adam", 0] == pytest.approx(8, abs=0.1)
    assert table.bytes_per_parameter["eager", "Adam", 1] == pytest.approx(12, abs=0.3)


@pytest.mark.parametrize("family", benchmark.FAMILIES)
@pytest.mark.parametrize("height", [0, 1, 2])
def test_the_published_tower_matches_its_counterpart(family, height):
    """The weights after some steps are equal, so both names mean the same computation."""
    if height not in benchmark.FAMILIES[family][2]:
        pytest.skip("not timed")
    images, labels = torch.rand(8, 28, 28), torch.randint(10, (8,))

    def loss(forward):
        return torch.nn.functional.nll_loss(forward(images), labels)

    torch.manual_seed(0)
    ours, theirs = MLP(), MLP()
    theirs.load_state_dict(ours.state_dict())
    stack = benchmark.tower(family, height).replace("Adam(1e-6)", "Adam(1e-6, v0=1e-8)")
    optimizer = HyperOptimizer(ours.parameters(), stack, compile=False)
    entrants: list[benchmark.Plain | benchmark.Published] = [
        benchmark.Plain(ours, loss, optimizer),
        benchmark.Published(theirs, loss, benchmark.published(family, height)),
    ]
    start = [p.detach().clone() for p in ours.parameters()]
    for entrant in entrants:
        for _ in range(3):
            entrant.whole()
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        torch.testing.assert_close(p - before, q - before, rtol=1e-2, atol=1e-8)


def test_a_bound_is_met_or_not():
    rows = [
        {"model": m, "optimizer": o, "family": f, "height": h}
        for m in benchmark.LABELS
        for o in ("compiled", "published", "torch.optim foreach", "torch.optim fused")
        for f, (_, _, heights) in benchmark.FAMILIES.items()
        for h in heights
    ]
    times = pd.DataFrame(rows).assign(
        step_us=100.0, inside_us=150.0, whole_us=1000.0, bytes_per_parameter=12.0
    )
    compiling = pd.DataFrame(
        [{"family": "Adam", "height": h, "cold_s": 5.0, "warm_s": 1.0} for h in (1, 50)]
    )
    equal = {what: value for what, _, _, value in report.bars(times, compiling)}
    assert len(equal) == 15
    assert {value for what, value in equal.items() if "over torch" in what} == {1.0}
    more = times.inside_us.where(times.optimizer != "compiled", 160.0)
    dearer = {w: v for w, _, _, v in report.bars(times.assign(inside_us=more), compiling)}
    assert [v for w, v in dearer.items() if "over torch (foreach)" in w] == [1.01] * 3
    slower = times.whole_us.where(times.optimizer != "published", 16000.0)
    faster = {w: v for w, _, _, v in report.bars(times.assign(whole_us=slower), compiling)}
    assert [value for what, value in faster.items() if "times faster" in what] == [16.0] * 3


def test_each_peer_makes_its_steps_and_has_its_line(monkeypatch):
    """HeavyBall's, which compile, are left out."""

    def eager(kind):
        return lambda *args, compile, **options: kind(*args, compile=False, **options)

    monkeypatch.setattr(peers, "HyperOptimizer", eager(HyperOptimizer))
    monkeypatch.setattr(peers, "Auto", eager(Auto))
    before = torch.randn(3, 4)
    made: list[torch.nn.Parameter] = []

    def parameters():
        made.append(torch.nn.Parameter(before.clone()))
        return made[-1:]

    def once(steps, *_):
        for step in steps.values():
            step(), step()  # SOAP's first step moves no weights
        return {name: [float(i)] * 3 for i, name in enumerate(steps, 1)}

    rows = []
    for group, (title, _, makers) in peers.GROUPS.items():
        here = {name: make for name, make in makers.items() if not name.startswith("heavyball")}
        monkeypatch.setitem(peers.GROUPS, group, (title, parameters, here))
        rows += peers.measure(group, once)
    assert len(rows) == len(made) > 10
    assert not any(torch.equal(p, before) for p in made)
    lines = peers.table(pd.DataFrame(rows))
    assert "| torch.optim.Muon | 1,000,000 (1,000,000 to 1,000,000) | 1.00 |" in lines
    assert "| Muon / SGD | 3,000,000 (3,000,000 to 3,000,000) | 3.00 |" in lines
