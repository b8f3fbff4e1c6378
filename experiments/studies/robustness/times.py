"""Measure the time of a training step under each method.

    python -m experiments.studies.robustness.times

It times a training step of the MLP under each method, and the time that Auto adds to a step of each
model. All methods take turns in one process on one core. It writes `results/robustness/times.json`,
the source of the table's last column.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from experiments.cli import ROOT, asked_for_help, guarded, split
from experiments.config.baselines import make_optimizer
from experiments.data.images import Dataset
from experiments.files import write_json
from experiments.records.provenance import device_name
from experiments.studies.robustness.report import MAIN, REFERENCE, TIMES
from experiments.studies.robustness.runs import FREE, Cell
from experiments.studies.step_time.contenders import Plain
from experiments.studies.step_time.contenders import setting as model_and_loss
from experiments.studies.step_time.runs import rounds
from experiments.studies.study import Nothing
from experiments.tasks.classification import Classification
from models.mlp import MLP

ROUNDS = 60


def measure(count: int = ROUNDS, at_least: float = 0.02, compile: bool = True) -> dict[str, Any]:
    """Microseconds of a training step of the MLP under each method: median and quartiles."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (256, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (256,), generator=generator)
    noise = Classification(
        Dataset("mnist", "", "", pixels, labels, pixels, labels), 256, False, "cpu"
    )

    def action(make: Callable[[MLP], Any]) -> Callable[[], None]:
        model = MLP()
        optimizer, gradient = make(model), noise.gradient(model, compile, autocast=False)

        def run() -> None:
            gradient(pixels, labels)
            optimizer.step()

        return run

    actions = {REFERENCE: action(lambda m: torch.optim.Adam(m.parameters(), 1e-3, foreach=True))}
    for method in MAIN:
        stack = Cell("mlp", method, None if method in FREE else 1e-3).stack
        actions[method] = action(lambda m, stack=stack: make_optimizer(m, stack, compile))  # type: ignore[misc]
    times = rounds(actions, count, at_least)
    quartiles = {
        method: [1e6 * float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75)]
        for method, seconds in times.items()
    }
    return {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "rounds": count,
        "microseconds": quartiles,
        "relative": {m: own[1] / quartiles[REFERENCE][1] for m, own in quartiles.items()},
    }


def overheads(counts: Mapping[str, int], compile: bool = True) -> dict[str, dict[str, float]]:
    """The time that Auto's `step()` takes beyond Adam's, torch's and ours, as a share of the step.

    It times `step()` within training steps, because the times of whole steps vary by more.

    Args:
        counts: the number of rounds for each model of `experiments.studies.step_time`.
    """
    torch.set_num_threads(1)
    shares = {}
    for name, count in counts.items():
        make, loss = model_and_loss(name)
        stacks = {method: Cell("mlp", method, 1e-3).stack for method in ("Auto", "Adam")}

        def entrant(how: Callable[[Any], Any], make: Any = make, loss: Any = loss) -> Plain:
            torch.manual_seed(0)
            model = make()
            return Plain(model, loss, how(model))

        entrants = {
            method: entrant(lambda m, stack=stack: make_optimizer(m, stack, compile))  # type: ignore[misc]
            for method, stack in stacks.items()
        }
        entrants[REFERENCE] = entrant(
            lambda m: torch.optim.Adam(m.parameters(), 1e-3, foreach=True)
        )
        for each in entrants.values():
            each.whole()  # compiles
            each.inside.clear()
        whole = rounds({method: each.whole for method, each in entrants.items()}, count, 0.0)
        step = {method: float(np.median(each.inside)) for method, each in entrants.items()}
        shares[name] = {
            method: (step["Auto"] - step[method]) / float(np.median(whole[method]))
            for method in (REFERENCE, "Adam")
        }
    return shares


def main() -> int:
    if asked_for_help(__doc__, Nothing):
        return 0
    split(sys.argv[1:], Nothing, ())
    measured = {
        **measure(),
        "overheads_of_auto": overheads({"mlp": 500, "char_rnn": 60, "resnet20": 15}),
    }
    write_json(ROOT / "results" / "robustness" / TIMES, measured)
    for method, times in measured["relative"].items():
        print(f"{method:18} {times:.3f}")
    for model, shares in measured["overheads_of_auto"].items():
        beside = ", ".join(f"{share:+.2%} beside {method}" for method, share in shares.items())
        print(f"Auto adds to a step of {model}: {beside}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
