"""The cost of a hyperoptimizer, compared with `torch.optim` and the published package.

    make benchmark                                everything, about twenty minutes of one core
    python -m experiments.studies step_time mlp   some of the models, or compiling, first, peers

All contenders of a model take turns in one process on one thread. In every round, each makes a few
steps. The result is the median over the rounds, with quartiles. Compare times of different runs or
machines as ratios only.
"""

from __future__ import annotations

import gc
import json
import os
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
from experiments.records.provenance import device_name, of_process
from experiments.studies.step_time import first_steps, peers
from experiments.studies.step_time.contenders import LABELS, ROUNDS, Plain, contenders, tower
from experiments.studies.study import Measurement
from hyperopt import HyperOptimizer
from models.mlp import MLP

FOLDER = Path("results", "step_time")


def rounds(actions: dict[Any, Callable[[], None]], count: int, at_least: float) -> dict[Any, list]:
    """Seconds per call, a number for each action and round; actions take turns in random order."""
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
    """Bytes of an optimizer's tensors per parameter, without weights and gradients."""
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


def apart(*words: str, cache: str | None = None) -> Any:
    """The result of this command in a new process, with `cache` as the folder of kernels."""
    command = [sys.executable, "-m", "experiments.studies", "step_time", *words]
    environment = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compile_times(stacks: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    """Seconds to compile a step for the MLP: with an empty cache, and from the cache on disk.

    The first compilation on a machine also probes the processor and the C++ compiler. So one
    compilation comes first, and is reported as height -1.
    """
    with tempfile.TemporaryDirectory() as cache:
        rows = [
            {"family": "SGD", "height": -1, "cold_s": apart("compile", "SGD", "0", cache=cache)}
        ]
        for family, height in stacks:
            cold, warm = (apart("compile", family, str(height), cache=cache) for _ in range(2))
            rows.append({"family": family, "height": height, "cold_s": cold, "warm_s": warm})
    return [{"model": "mlp", "optimizer": "compiled", **row} for row in rows]


def compile_once(family: str, height: int) -> float:
    torch.set_num_threads(1)
    model = MLP()
    optimizer = HyperOptimizer(model.parameters(), tower(family, height), compile=True)
    entrant = Plain(model, None, optimizer)
    start = time.perf_counter()
    entrant.bare()
    return round(time.perf_counter() - start, 2)


def cold_and_warm(cases: Iterable[str]) -> list[dict[str, Any]]:
    """The first steps of each case: with an empty cache, then with it."""
    rows = []
    for case in cases:
        print(f"first steps, {case} ...", flush=True)
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (apart("first-once", case, cache=cache) for _ in range(2))
        rows.append({**cold, "first_warm_s": warm["first_s"]})
    return rows


def beside_peers() -> list[dict[str, Any]]:
    """The steps of all optimizers of each group, a group in a process of its own."""
    rows = []
    for group in peers.GROUPS:
        print(f"peers, {group} ...", flush=True)
        rows += apart("peers-once", group)
    return rows


STACKS_TO_COMPILE = [("SGD", 1), ("Adam / SGD", 1), ("Adam", 1), ("SGD", 50), ("Adam", 50)]


def environment() -> str:
    """The processor, the threads and the versions, for captions."""
    where, cpu = of_process(), device_name(torch.device("cpu"))
    commit = (where["commit"] or "unknown")[:10] + (" and changes" if where["dirty"] else "")
    versions = f"torch {where['torch']}, Python {where['python']}"
    return f"{cpu}, one thread, {versions}, commit {commit}"


# Commands of the new processes.
INNER: dict[str, Callable[..., Any]] = {
    "compile": lambda family, height: compile_once(family, int(height)),
    "measure": measure,
    "first-once": first_steps.measure,
    "peers-once": lambda group: peers.measure(group, rounds),
}


def main(arguments: Sequence[str]) -> int:
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return 0
    if arguments and arguments[0] in INNER:
        print(json.dumps(INNER[arguments[0]](*arguments[1:])))
        return 0
    known = [*LABELS, "compiling", "first", "peers"]
    if unknown := set(arguments) - {*known}:
        raise ValueError(f"{unknown.pop()!r} is not a benchmark; give some of {', '.join(known)}")
    asked = arguments or known
    rows = []
    for model in [name for name in LABELS if name in asked]:
        print(f"{LABELS[model]} ...", flush=True)
        rows += apart("measure", model)
    times, path = pd.DataFrame(rows), FOLDER / "times.csv"
    if arguments and path.exists():
        old = pd.read_csv(path)
        times = pd.concat([old[~old.model.isin(arguments)], times])
    found = {"times.csv": times}
    if "compiling" in asked:
        print("compile times ...", flush=True)
        found["compile.csv"] = pd.DataFrame(compile_times(STACKS_TO_COMPILE))
    if "first" in asked:
        found["first_steps.csv"] = pd.DataFrame(cold_and_warm(first_steps.CASES))
    if "peers" in asked:
        found["peers.csv"] = pd.DataFrame(beside_peers())
    for name, table in found.items():
        write_text(FOLDER / name, table.to_csv(index=False))
    write_text(FOLDER / "machine.txt", environment() + "\n")
    from experiments.studies.step_time import report  # matplotlib takes a second to import

    for path in report.draw(FOLDER):
        print(path)
    return 0


STUDY = Measurement("step_time", main, __doc__, kept="times.csv")
