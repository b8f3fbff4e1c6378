"""What a hyperoptimizer costs, beside `torch.optim` and the published package.

    make benchmark                                everything, about twenty minutes of one core
    python -m experiments.studies step_time mlp   some of the models, or compiling, or first

All contenders of a model stand beside each other in one process, on one thread, and take turns:
every round each of them makes a few steps, and what is reported is the median over the rounds with
its quartiles. Times of another run, or of another machine, compare as ratios only.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from experiments.files import write_text
from experiments.records.provenance import of_process
from experiments.studies.step_time import first_steps, report
from experiments.studies.step_time.contenders import LABELS, ROUNDS, Plain, contenders, tower
from experiments.studies.study import Measurement
from hyperopt import HyperOptimizer
from models.mlp import MLP

FOLDER = Path("results", "step_time")


def rounds(actions: dict[Any, Callable[[], None]], count: int, at_least: float) -> dict[Any, list]:
    """Seconds a call, one number a round for each action; they take turns, in a new order."""
    repeats = {}
    for key, action in actions.items():
        action(), action(), action()
        start = time.perf_counter()
        action()
        repeats[key] = max(1, round(at_least / (time.perf_counter() - start)))
    times: dict[Any, list[float]] = {key: [] for key in actions}
    order = list(actions)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        for i in torch.randperm(len(order), generator=generator).tolist():
            action, n = actions[order[i]], repeats[order[i]]
            action()  # brings its own tensors back into the cache
            start = time.perf_counter()
            for _ in range(n):
                action()
            times[order[i]].append((time.perf_counter() - start) / n)
    return times


def held(optimizer: Any, model: nn.Module) -> float:
    """Bytes of tensors that an optimizer holds beyond weights and gradients, per parameter."""
    own = {
        t.untyped_storage().data_ptr()
        for p in model.parameters()
        for t in (p, p.grad)
        if t is not None
    }
    seen: dict[int, int] = {}
    todo, known = [optimizer], set()
    while todo:
        thing = todo.pop()
        if id(thing) in known or isinstance(thing, type | type(sys) | type(held)):
            continue
        known.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
        else:
            todo += gc.get_referents(thing)
    return sum(seen.values()) / sum(p.numel() for p in model.parameters())


def measure(name: str) -> list[dict[str, Any]]:
    """Time all contenders of one model."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
    entrants = contenders(name)
    for entrant in entrants.values():
        for _ in range(2):  # the second step compiles
            (entrant.whole if getattr(entrant, "loss", None) else entrant.bare)()
    bare = rounds(
        {key: e.bare for key, e in entrants.items() if isinstance(e, Plain)},
        2 * ROUNDS[name],
        0.02,
    )
    whole: dict[Any, list[float]] = {}
    if name != "transformer":
        for entrant in entrants.values():
            if isinstance(entrant, Plain):
                entrant.inside.clear()
        whole = rounds({key: e.whole for key, e in entrants.items()}, ROUNDS[name], 0.01)
    rows = []
    for key, entrant in entrants.items():
        row: dict[str, Any] = dict(zip(("optimizer", "family", "height"), key, strict=True))
        inside = entrant.inside if isinstance(entrant, Plain) else []
        kinds = {"step": bare.get(key), "inside": inside, "whole": whole.get(key)}
        for label, times in kinds.items():
            series = pd.Series(times or [], dtype=float) * 1e6
            for column, q in (("", 0.5), ("_q25", 0.25), ("_q75", 0.75)):
                row[f"{label}_us{column}"] = round(series.quantile(q), 2)
        if isinstance(entrant, Plain):
            row["bytes_per_parameter"] = round(held(entrant.optimizer, entrant.model), 2)
        rows.append({"model": name, **row})
    return rows


def compile_times(stacks: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    """Seconds to compile a step for the MLP: with an empty cache, and from the cache on disk.

    Each is measured in a process of its own, the import of the compiler included. The very first
    compilation on a machine also finds out what the processor and the C++ compiler can do; that one
    is made beforehand, and reported as height -1.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}

        def run(family: str, height: int) -> float:
            command = [
                *(sys.executable, "-m", "experiments.studies", "step_time"),
                *("compile", family, str(height)),
            ]
            output = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, check=True, text=True
            )
            return round(float(output.stdout.split()[-1]), 2)

        rows.append({"family": "SGD", "height": -1, "cold_s": run("SGD", 0)})
        for family, height in stacks:
            cold = run(family, height)
            rows.append(
                {"family": family, "height": height, "cold_s": cold, "warm_s": run(family, height)}
            )
    return [{"model": "mlp", "optimizer": "compiled", **row} for row in rows]


def compile_once(family: str, height: int) -> float:
    torch.set_num_threads(1)
    model = MLP()
    optimizer = HyperOptimizer(model.parameters(), tower(family, height), compile=True)
    entrant = Plain(model, None, optimizer)
    start = time.perf_counter()
    entrant.bare()
    return time.perf_counter() - start


STACKS_TO_COMPILE = [("SGD", 1), ("Adam / SGD", 1), ("Adam", 1), ("SGD", 50), ("Adam", 50)]


def environment() -> str:
    """The processor, the threads and the versions, for captions."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    where = of_process()
    commit = (where["commit"] or "unknown")[:10] + (" and changes" if where["dirty"] else "")
    python = platform.python_version()
    return f"{cpu}, one thread, torch {torch.__version__}, Python {python}, commit {commit}"


def main(arguments: Sequence[str]) -> int:
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return 0
    if arguments[:1] == ["compile"]:
        print(compile_once(arguments[1], int(arguments[2])))
        return 0
    if arguments[:1] == ["measure"]:
        print(json.dumps(measure(arguments[1])))
        return 0
    if arguments[:1] == ["first-once"]:
        print(json.dumps(first_steps.measure(arguments[1])))
        return 0
    unknown = set(arguments) - {*LABELS, "compiling", "first"}
    if unknown:
        known = ", ".join([*LABELS, "compiling", "first"])
        raise ValueError(f"there is no {unknown.pop()!r} to benchmark; there are {known}")
    rows = []
    for model in [name for name in LABELS if name in (arguments or LABELS)]:
        print(f"{LABELS[model]} ...", flush=True)
        command = [sys.executable, "-m", "experiments.studies", "step_time", "measure", model]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        rows += json.loads(output.splitlines()[-1])
    times, path = pd.DataFrame(rows), FOLDER / "times.csv"
    if arguments and path.exists():
        old = pd.read_csv(path)
        times = pd.concat([old[~old.model.isin(arguments)], times])
    write_text(path, times.to_csv(index=False))
    if not arguments or "compiling" in arguments:
        print("compile times ...", flush=True)
        seconds = pd.DataFrame(compile_times(STACKS_TO_COMPILE))
        write_text(FOLDER / "compile.csv", seconds.to_csv(index=False))
    if not arguments or "first" in arguments:
        found = pd.DataFrame(first_steps.cold_and_warm([*first_steps.CASES]))
        write_text(FOLDER / "first_steps.csv", found.to_csv(index=False))
    write_text(FOLDER / "machine.txt", environment() + "\n")
    for path in report.draw(FOLDER):
        print(path)
    return 0


STUDY = Measurement("step_time", main, __doc__, kept="times.csv")
