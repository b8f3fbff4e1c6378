"""What a hyperoptimizer costs, beside `torch.optim` and the published package.

    make benchmark                          everything, about twenty minutes of one core
    python -m scripts.benchmark mlp         some of mlp, resnet20, char_rnn, transformer, compiling
    python -m scripts.benchmark report      draw the tables and figures again from the CSV

All contenders of a model stand beside each other in one process, on one thread, and take turns:
every round each of them makes a few steps, and what is reported is the median over the rounds with
its quartiles. Times of another run, or of another machine, compare as ratios only.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.store import write_bytes
from experiments.train import provenance
from hyperopt import HyperOptimizer
from hyperopt import compile_graph, trace
from hyperopt._engine.shards import LARGE
from models.char_rnn import CharRNN
from models.mlp import MLP
from models.resnet import ResNet

from . import style

RESULTS = Path("results")
HEIGHTS = (0, 1, 2, 5, 10, 20, 50)
ROUNDS = {"mlp": 50, "resnet20": 11, "char_rnn": 40, "transformer": 15}

TRAFFIC = "reads and writes alone"

# Steps that move next to nothing, so that no contender diverges while it is timed.
FAMILIES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "SGD": ("SGD(1e-6)", "SGD(1e-12)", HEIGHTS),
    "SGD momentum": ("SGD(1e-6, momentum=0.9)", "SGD(1e-12)", (0, 1)),
    "Adam": ("Adam(1e-6)", "Adam(1e-9)", HEIGHTS),
    "Adam / SGD": ("Adam(1e-6)", "SGD(1e-12)", (1,)),
}


def tower(family: str, height: int) -> str:
    lowest, above, _ = FAMILIES[family]
    return " / ".join([lowest, *[above] * height])


# The models, each with a function that gives the loss of a fixed batch.


class Blocks(nn.Module):
    """Eight transformer encoder blocks of width 512: 25.2 M parameters in 96 tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 8)


def setting(name: str) -> tuple[Callable[[], nn.Module], Callable[[Any], Tensor] | None]:
    """How to make a model, and the loss of one batch given its forward pass; None for no loss."""
    torch.manual_seed(0)
    if name == "mlp":
        images, labels = torch.rand(256, 28, 28), torch.randint(10, (256,))
        return MLP, lambda forward: F.nll_loss(forward(images), labels)
    if name == "resnet20":
        images, labels = torch.rand(128, 3, 32, 32), torch.randint(10, (128,))
        return ResNet, lambda forward: F.nll_loss(forward(images), labels)
    if name == "char_rnn":
        text = torch.randint(82, (50, 51))

        def loss(forward: Any) -> Tensor:
            predictions, _ = forward(text[:, :-1])
            return F.nll_loss(predictions.flatten(0, 1), text[:, 1:].flatten())

        return lambda: CharRNN(82), loss
    return Blocks, None


# The contenders: each makes whole training steps, and all but the published one a bare `step()`.


class Plain:
    """A model under any `torch.optim.Optimizer`, ours among them."""

    def __init__(self, model: nn.Module, loss: Any, optimizer: Any) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.inside: list[float] = []  # the seconds of each `step()` of a whole step
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3

    def whole(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model).backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.inside.append(time.perf_counter() - start)

    def bare(self) -> None:
        self.optimizer.step()


class Published:
    """A model under the published package, used as its README says."""

    def __init__(self, model: nn.Module, loss: Any, optimizer: Any) -> None:
        from gradient_descent_the_ultimate_optimizer import gdtuo

        self.wrapper = gdtuo.ModuleWrapper(model, optimizer=optimizer)
        self.wrapper.initialize()
        self.loss = loss

    def whole(self) -> None:
        self.wrapper.begin()
        loss = self.loss(self.wrapper.forward)
        self.wrapper.zero_grad()
        loss.backward(create_graph=True)
        self.wrapper.step()


class Traffic:
    """What Adam / Adam reads and writes of the large vectors, with next to no arithmetic.

    A bound on its time: the hypergradients need all gradients of a step, and the weights need the
    hyperparameters that come of them, so that a step goes over its vectors twice.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [p for p in parameters if p.numel() >= LARGE]
        self.state = [[torch.zeros(p.numel()) for _ in range(3)] for p in self.parameters]
        self.kernels: dict[tuple[str, int], Callable[..., Any]] = {}

    @torch.no_grad()
    def step(self) -> None:
        vectors = [
            (p.view(-1), p.grad.view(-1), *state)  # type: ignore[union-attr]
            for p, state in zip(self.parameters, self.state, strict=True)
        ]
        for _, g, m, v, last in vectors:
            self.run(self.replay, m, v, last, g, m, v)
        for w, g, m, v, last in reversed(vectors):
            self.run(self.advance, w, g, m, v, w, last)

    def run(self, half: Callable[..., list[Tensor]], *vectors: Tensor) -> None:
        key = half.__name__, len(vectors[0])
        if key not in self.kernels:
            apart = [vector.clone() for vector in vectors]
            self.kernels[key] = compile_graph(trace(half, apart), apart)
        self.kernels[key](*vectors)

    @staticmethod
    def replay(
        m: Tensor, v: Tensor, last: Tensor, g: Tensor, new_m: Tensor, new_v: Tensor
    ) -> list[Tensor]:
        new_m.copy_(m + last)
        new_v.copy_(v + g)
        return []

    @staticmethod
    def advance(
        w: Tensor, g: Tensor, m: Tensor, v: Tensor, new_w: Tensor, last: Tensor
    ) -> list[Tensor]:
        new_w.copy_(w + g * m * v)
        last.copy_(g)
        return []


def published(family: str, height: int) -> Any:
    from gradient_descent_the_ultimate_optimizer import gdtuo

    above: dict[str, Any] = {}
    for _ in range(height):
        rule = gdtuo.Adam(1e-9, **above) if family == "Adam" else gdtuo.SGD(1e-12, **above)
        above = {"optimizer": rule}
    if family.startswith("Adam"):
        return gdtuo.Adam(1e-6, **above)
    return gdtuo.SGD(1e-6, mu=0.9 * (family == "SGD momentum"), **above)


def reference(family: str, parameters: Iterable[Tensor], **how: Any) -> torch.optim.Optimizer:
    if family == "Adam":
        return torch.optim.Adam(parameters, 1e-6, **how)
    return torch.optim.SGD(parameters, 1e-6, momentum=0.9 * (family == "SGD momentum"), **how)


def contenders(name: str) -> dict[tuple[str, str, int], Any]:
    """All contenders of a model by (optimizer, rule, height)."""
    make, loss = setting(name)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return make()

    found: dict[tuple[str, str, int], Any] = {}
    for family, (_, _, heights) in FAMILIES.items():
        for how in ("foreach", "fused") if 0 in heights else ():
            m = model()
            plain = reference(family, m.parameters(), **{how: True})
            found[f"torch.optim {how}", family, 0] = Plain(m, loss, plain)
        for height in heights:
            if loss is None and height > 1:
                continue
            kinds = {"compiled": True, "eager": False} if height <= 2 else {"compiled": True}
            for kind, compile in kinds.items():
                m = model()
                ours = HyperOptimizer(m.parameters(), tower(family, height), compile=compile)
                found[kind, family, height] = Plain(m, loss, ours)
            if loss is not None and (name == "mlp" or height <= 2):
                found["published", family, height] = Published(
                    model(), loss, published(family, height)
                )
    if name == "transformer":
        m = model()
        found[TRAFFIC, "Adam", 1] = Plain(m, None, Traffic(m.parameters()))
    return found


# Measuring.


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
            command = [sys.executable, "-m", "scripts.benchmark", "compile", family, str(height)]
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
    entrant = Plain(model, None, HyperOptimizer(model.parameters(), tower(family, height)))
    start = time.perf_counter()
    entrant.bare()
    return time.perf_counter() - start


# Reporting.

STACKS_TO_COMPILE = [("SGD", 1), ("Adam / SGD", 1), ("Adam", 1), ("SGD", 50), ("Adam", 50)]


def environment() -> str:
    """The processor, the threads and the versions, for captions."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    where = provenance()
    commit = (where["commit"] or "unknown")[:10] + (" and changes" if where["dirty"] else "")
    python = platform.python_version()
    return f"{cpu}, one thread, torch {torch.__version__}, Python {python}, commit {commit}"


def bars(times: pd.DataFrame, compiling: pd.DataFrame) -> list[tuple[str, str, float, float]]:
    """What a hyperoptimizer may cost: what is compared, the bound, its value, what was measured."""
    table = times.set_index(["model", "optimizer", "family", "height"])
    seconds = compiling.set_index(["family", "height"])

    def of(column: str, model: str, optimizer: str, family: str, height: int) -> float:
        return float(table.loc[(model, optimizer, family, height), column])

    found: list[tuple[str, str, float, float]] = []

    def ratio(what: str, bar: float, model: str, ours: tuple, theirs: tuple) -> None:
        value = of("step_us", model, *ours) / of("step_us", model, *theirs)
        found.append((what, "≤", bar, value))

    def faster(what: str, bar: float, model: str, family: str, height: int) -> None:
        ours = of("whole_us", model, "compiled", family, height)
        found.append((what, "≥", bar, of("whole_us", model, "published", family, height) / ours))

    foreach, fused = "torch.optim foreach", "torch.optim fused"
    momentum = ("compiled", "SGD momentum", 1)
    ratio(
        "`step()`, Adam / SGD, MLP, over torch Adam (foreach)",
        1.0,
        "mlp",
        ("compiled", "Adam / SGD", 1),
        (foreach, "Adam", 0),
    )
    for model, bar in (("mlp", 2.0), ("resnet20", 1.5)):
        ratio(
            f"`step()`, SGD(momentum) / SGD, {LABELS[model]}, over torch SGD(momentum) (foreach)",
            bar,
            model,
            momentum,
            (foreach, "SGD momentum", 0),
        )
    for model, bar in (("mlp", 1.06), ("resnet20", 1.005), ("char_rnn", 1.01)):
        family = "Adam" if model == "char_rnn" else "SGD momentum"
        ours, theirs = (model, "compiled", family, 1), (model, foreach, family, 0)
        more = of("inside_us", *ours) - of("inside_us", *theirs)
        what = f"whole step, {tower_label(family, 1)}, {LABELS[model]}, over torch (foreach)"
        found.append((what, "≤", bar, 1 + more / of("whole_us", *theirs)))
    per_level = (
        of("step_us", "mlp", "compiled", "Adam", 50) - of("step_us", "mlp", "compiled", "Adam", 10)
    ) / 40
    found.append(("each further level, tower of Adam, MLP, in µs", "≤", 10.0, per_level))
    faster(
        "whole step, tower of Adam of height 50, MLP, times faster than the published package",
        15.0,
        "mlp",
        "Adam",
        50,
    )
    faster(
        "whole step, Adam / SGD, MLP, times faster than the published package",
        2.0,
        "mlp",
        "Adam / SGD",
        1,
    )
    faster(
        "whole step, Adam / Adam, char-RNN, times faster than the published package",
        2.5,
        "char_rnn",
        "Adam",
        1,
    )
    extra = of("bytes_per_parameter", "transformer", "compiled", "Adam", 1) - 8
    found.append(
        ("25 M parameters, Adam / Adam: bytes per parameter beyond Adam's moments", "≤", 8.0, extra)
    )
    ratio(
        "25 M parameters, `step()`, Adam / Adam, over torch Adam (fused)",
        1.8,
        "transformer",
        ("compiled", "Adam", 1),
        (fused, "Adam", 0),
    )
    for (family, height), bar, column in (
        (("Adam", 1), 8.0, "cold_s"),
        (("Adam", 1), 2.0, "warm_s"),
        (("Adam", 50), 40.0, "cold_s"),
    ):
        how = "cold" if column == "cold_s" else "from the cache on disk"
        found.append(
            (
                f"seconds to compile {tower_label(family, height)}, {how}",
                "≤",
                bar,
                float(seconds.loc[(family, height), column]),
            )
        )
    return found


LABELS = {
    "mlp": "MLP, 101,770 parameters, batch 256",
    "resnet20": "ResNet-20, 269,722 parameters, batch 128",
    "char_rnn": "char-RNN, 2 x 128 LSTM, batch 50, sequence 50",
    "transformer": "8 transformer blocks, 25 M parameters",
}


def tower_label(family: str, height: int) -> str:
    if height > 2:
        return f"tower of {family} of height {height}"
    return re.sub(r"\(1e-\d+\)", "", tower(family, height)).replace("(1e-6, ", "(")


def report() -> None:
    """Draw `results/benchmark.md` and the two figures from `results/benchmark*.csv`."""
    times = pd.read_csv(RESULTS / "benchmark.csv")
    compiling = pd.read_csv(RESULTS / "benchmark_compile.csv")
    about = (RESULTS / "benchmark.txt").read_text().strip()
    lines = [
        "# What a hyperoptimizer costs",
        "",
        f"{about}.",
        "Medians over rounds in which all contenders of a model take turns, with the quartiles.",
        "Whole steps vary by more than optimizers differ, so that what a tower adds to one is",
        "measured within it: `step()` is timed there too, where the model has had the caches.",
        "Made by `make benchmark`; ratios carry over to other machines, times do not.",
        "",
        "| what | bound | measured | |",
        "|---|---|---|---|",
    ]
    for what, bound, bar, value in bars(times, compiling):
        met = value <= bar if bound == "≤" else value >= bar
        lines.append(
            f"| {what} | {bound} {bar:g} | {value:#.4g} | {'met' if met else '**not met**'} |"
        )
    steps = times[times.model == "transformer"].set_index(["optimizer", "family", "height"]).step_us
    bound = steps[TRAFFIC, "Adam", 1] / steps["torch.optim fused", "Adam", 0]
    lines += [
        "",
        f"With 25 M parameters, two loops that read and write what Adam / Adam has to ({TRAFFIC})",
        f"take {bound:.2f} times as long as torch Adam (fused), which goes over its vectors once.",
    ]
    lines += ["", "## Compiling", "", "| stack | cold | from the cache on disk |", "|---|---|---|"]
    for row in compiling.itertuples():
        if row.height < 0:
            lines.append(f"| the first compilation on a machine | {row.cold_s:.1f} s | |")
        else:
            label = tower_label(row.family, row.height)
            lines.append(f"| {label} | {row.cold_s:.1f} s | {row.warm_s:.1f} s |")
    for model, label in LABELS.items():
        lines += [
            "",
            f"## {label}",
            "",
            "| stack | optimizer | `step()` µs | in a whole step µs | whole step µs "
            "| bytes held per parameter |",
            "|---|---|---|---|---|---|",
        ]
        for row in times[times.model == model].itertuples():
            cells = [tower_label(row.family, row.height), row.optimizer]
            for name in ("step", "inside", "whole"):
                middle, low, high = (getattr(row, f"{name}_us{q}") for q in ("", "_q25", "_q75"))
                cells.append(
                    "" if pd.isna(middle) else f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"
                )
            held_bytes = row.bytes_per_parameter
            cells.append("" if pd.isna(held_bytes) else f"{held_bytes:.1f}")
            lines.append("| " + " | ".join(cells) + " |")
    write_bytes(RESULTS / "benchmark.md", ("\n".join(lines) + "\n").encode())
    draw_heights(times, about)
    draw_peers(times, about)


def draw_heights(times: pd.DataFrame, about: str) -> None:
    """Time of a training step against the height of the tower (the paper's Figure 3b)."""
    models = [model for model in LABELS if times[times.model == model].whole_us.notna().any()]
    figure, axes = plt.subplots(1, len(models), figsize=(style.WIDTH, 2.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        plot_heights(axis, times, model)
        axis.set_title(LABELS[model].split(",")[0])
    axes[0][0].set_ylabel("ms per training step")
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, fontsize=6, ncols=4, loc="outside upper center")
    figure.supxlabel(f"{about}. Medians with quartiles.", fontsize=5, color="#555555")
    style.save(figure, RESULTS / "benchmark_height")


def plot_heights(axis: plt.Axes, times: pd.DataFrame, model: str) -> None:
    """Time of a training step of one model against height, ours and the published package."""
    looks = {"compiled": (style.BLUE, "o", "ours"), "published": (style.ORANGE, "s", "published")}
    for (kind, look), (family, line) in itertools.product(
        looks.items(), (("SGD", "--"), ("Adam", "-"))
    ):
        rows = times[
            (times.model == model) & (times.optimizer == kind) & (times.family == family)
        ].sort_values("height")
        color, marker, name = look
        axis.errorbar(
            rows.height,
            rows.whole_us / 1000,
            [
                (rows.whole_us - rows.whole_us_q25) / 1000,
                (rows.whole_us_q75 - rows.whole_us) / 1000,
            ],
            linestyle=line,
            color=color,
            marker=marker,
            markersize=4,
            elinewidth=0.8,
            markerfacecolor="white" if family == "SGD" else color,
            label=f"{name}, towers of {family}",
        )
    axis.set(ylim=(0, None), xlabel="height")


def draw_peers(times: pd.DataFrame, about: str) -> None:
    """Time of `step()` alone and of the whole training step, beside all peers."""
    kinds = {
        "torch.optim foreach": ("#bbbbbb", "foreach"),
        "torch.optim fused": ("#dddddd", "fused"),
        "published": (style.ORANGE, "published"),
        "compiled": (style.BLUE, "ours"),
    }
    stacks = ("SGD momentum", 0), ("SGD momentum", 1), ("Adam", 0), ("Adam / SGD", 1), ("Adam", 1)
    shown = [
        (kind, family, height)
        for family, height in stacks
        for kind in kinds
        if height == 0 or not kind.startswith("torch")
    ]
    figure, axes = plt.subplots(2, len(LABELS), figsize=(style.WIDTH, 4.4), sharey=True)
    for column, (model, label) in enumerate(LABELS.items()):
        rows = times[times.model == model].set_index(["optimizer", "family", "height"])
        rows = rows.reindex(shown)
        for axis, name, unit in (axes[0][column], "step", 1), (axes[1][column], "whole", 1000):
            middle, low, high = (rows[f"{name}_us{q}"] / unit for q in ("", "_q25", "_q75"))
            if middle.isna().all():
                axis.set_visible(False)
                continue
            if name == "step":
                axis.set_title(label.split(",")[0])
            axis.barh(
                range(len(shown)),
                middle,
                xerr=[middle - low, high - middle],
                color=[kinds[kind][0] for kind, _, _ in shown],
                error_kw={"linewidth": 0.6},
            )
            axis.set_xlabel("µs per step()" if unit == 1 else "ms per training step", fontsize=7)
            axis.tick_params(axis="x", labelsize=6)
    names = [f"{tower_label(family, height)} · {kinds[kind][1]}" for kind, family, height in shown]
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(shown)), names, fontsize=6)
    axes[0][0].invert_yaxis()
    figure.supxlabel(
        f"{about}. Medians with quartiles.\nOf the published package only whole "
        "steps are timed, as its backward pass is a part of the price.",
        fontsize=5,
        color="#555555",
    )
    style.save(figure, RESULTS / "benchmark_peers")


def main(arguments: list[str]) -> None:
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return
    if arguments[:1] == ["compile"]:
        print(compile_once(arguments[1], int(arguments[2])))
        return
    if arguments[:1] == ["measure"]:
        print(json.dumps(measure(arguments[1])))
        return
    unknown = set(arguments) - {*LABELS, "compiling", "report"}
    if unknown:
        known = ", ".join([*LABELS, "compiling", "report"])
        sys.exit(f"there is no {unknown.pop()!r} to benchmark; there are {known}")
    if arguments != ["report"]:
        rows = []
        for model in [name for name in LABELS if name in (arguments or LABELS)]:
            print(f"{LABELS[model]} ...", flush=True)
            command = [sys.executable, "-m", "scripts.benchmark", "measure", model]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            rows += json.loads(output.splitlines()[-1])
        times, path = pd.DataFrame(rows), RESULTS / "benchmark.csv"
        if arguments and path.exists():
            old = pd.read_csv(path)
            times = pd.concat([old[~old.model.isin(arguments)], times])
        write_bytes(path, times.to_csv(index=False).encode())
        if not arguments or "compiling" in arguments:
            print("compile times ...", flush=True)
            seconds = pd.DataFrame(compile_times(STACKS_TO_COMPILE))
            write_bytes(RESULTS / "benchmark_compile.csv", seconds.to_csv(index=False).encode())
        write_bytes(RESULTS / "benchmark.txt", (environment() + "\n").encode())
    report()
    print(
        f"{RESULTS / 'benchmark.md'}, {RESULTS / 'benchmark_height.pdf'} and _peers.pdf are written"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
