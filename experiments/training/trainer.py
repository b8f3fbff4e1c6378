"""The training run: it takes a config and writes a finished directory to the run store."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.config.baselines import BaselineOptimizer, judged, make_optimizer
from experiments.config.identity import identity, identity_hash
from experiments.config.lr_schedules import make_schedule
from experiments.config.processes import is_first
from experiments.config.schema import Config
from experiments.data.catalog import find, load
from experiments.records.loggers.catalog import make_logger
from experiments.records.loggers.logger import Logger, Row, history, made_by
from experiments.records.provenance import device_name, of_process
from experiments.records.store import RunDirectory, RunStore, no_records
from experiments.tasks.base import Task
from experiments.tasks.catalog import task_for
from experiments.training import distributed
from experiments.training.interrupt import Interrupts
from models import MODELS

# Without a GPU, compiling logs a warning in each process.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

EFFECTIVE_LR = "0.effective_lr"  # the tuned lr times the factor of its schedule


@dataclass
class Progress:
    """Progress of a run; losses and lr are of the last finished epoch, None before the first."""

    epoch: int  # finished epochs
    epochs: int
    step: int
    steps: int
    train_loss: float | None = None  # nats, mean over the epoch
    test: dict[str, float] | None = None  # the task's metrics on held-out data
    lr: float | None = None


Report = Callable[[Progress], None]


def train(config: Config, report: Report = lambda progress: None) -> dict[str, Any]:
    """Do or resume the run of a resolved config, and return its summary.

    A finished run is only read. If another process works on the run, this call waits. An
    interrupted run resumes from its last checkpoint and ends bit for bit as an uninterrupted one.
    Checkpoints are written after each epoch, every `trainer.checkpoint_every` steps, and after the
    step in which Ctrl-C or SIGTERM came.
    A loss or a weight that is not finite ends the run; the run is recorded as diverged.

    Raises:
        FileNotFoundError: the data are missing.
        ValueError: for example, the stack does not fit the model.
    """
    store = RunStore(config.store)
    identified = identity(config)  # only once, as a replayed file may change during the run
    name = identity_hash(identified)
    if (summary := distributed.agreed(lambda: store.finished(name))) is not None:
        return summary
    with store.claim(name) if is_first() else no_records(store, name) as directory:
        if (summary := distributed.agreed(directory.summary)) is not None:
            return summary
        with Interrupts() as interrupts:
            return _Run(config, identified, directory, interrupts).finish(report)


@dataclass
class _Epoch:
    """Records of an unfinished epoch. They stay on the device until the epoch ends."""

    shuffle: Tensor  # the generator's state at the beginning
    losses: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    snapshots: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # of the snapshots

    def state_dict(self) -> dict[str, Any]:
        lists = {name: getattr(self, name) for name in ("losses", "snapshots")}
        return {**vars(self), **{name: torch.stack(list) for name, list in lists.items() if list}}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> _Epoch:
        lists = {name: [row.to(device) for row in state[name]] for name in ("losses", "snapshots")}
        return cls(**{**state, **lists})


class _Run:
    """The state of a run: model, optimizer, generator, curves."""

    def __init__(
        self,
        config: Config,
        identified: dict[str, Any],
        directory: RunDirectory,
        interrupts: Interrupts,
    ) -> None:
        self.config = config
        self.interrupts = interrupts
        self.identity = identified
        self.directory = directory
        torch.set_num_threads(config.trainer.threads)
        self.device = torch.device(config.device)
        trainer = config.trainer
        self.data = load(config.data.name, config.data.root)
        kind = find(config.data.name).kind
        self.task: Task = task_for(kind).of(config, self.data, self.device)
        whole = trainer.epochs * self.task.steps_per_epoch
        self.steps = min(whole, trainer.steps or whole)
        self._start()

    def _start(self) -> None:
        """Set the state before the first step; initialisation and shuffling have separate seeds."""
        init_seed, shuffle_seed = np.random.SeedSequence(self.config.seed).generate_state(2)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(init_seed))
            sizes = {k: v for k, v in asdict(self.config.model).items() if v is not None}
            make = MODELS[sizes.pop("name")].make
            self.model = make(**self.task.model_arguments, **sizes)
        # Convolutions are faster in the channels_last format.
        self.model.to(self.device).to(memory_format=torch.channels_last)
        trainer = self.config.trainer
        self.optimizer = make_optimizer(
            self.model,
            self.config.stack.notation or "",
            trainer.compile,
            self.config.stack.matrices,
        )
        self.shares = distributed.Shares(self.model)
        self.gradient = self.task.gradient(
            self.shares.model, trainer.compile_model, self.config.precision == "bf16"
        )
        if isinstance(self.optimizer, BaselineOptimizer):
            self.gradient = self.optimizer.watch(self.gradient)
        start = self.optimizer.hyperparameters()[0]
        self.schedule = make_schedule(self.config.schedule, start, self.steps)
        # A schedule scales a tuned lr; see `HyperOptimizer`.
        stack = self.optimizer.stack
        self.scales_lr = stack.height > 0 and "lr" in stack.levels[0].tuned
        self.scales_lr &= "lr" in self.schedule(0)
        if self.scales_lr:
            for group in self.optimizer.param_groups:
                group["initial_lr"] = start["lr"]
        if identity(self.config) != self.identity:
            raise ValueError(
                f"{self.config.schedule.file} has changed since the command began; give the "
                "command again for a run with the new file"
            )
        self.shuffle = torch.Generator().manual_seed(int(shuffle_seed))
        self.epoch = 0
        self.step = 0
        self.under_way: _Epoch | None = None
        self.seconds = 0.0  # spent training, evaluation not counted
        self.resumed = 0
        self.diverged = False
        self.curves: list[list[float]] = []  # epoch, step, train loss, the task's metrics
        self.trajectory: list[list[float]] = []  # step, values in the order of _recorded
        self.hypergradients: list[list[float]] = []  # step, values in the order of _tuned
        self.times: list[float] = []  # since 1970, of the start and of each epoch's end
        peer = self.optimizer.version if isinstance(self.optimizer, BaselineOptimizer) else None
        made = {**of_process(), "device": device_name(self.device)}
        # Provenance of this process, then of earlier processes of this run that differ.
        self.made: list[dict[str, Any]] = [{**made, "peer": peer} if peer else made]

    def finish(self, report: Report) -> dict[str, Any]:
        """Train to the end and record everything."""
        config, directory = self.config, self.directory
        directory.save_config(self.identity)
        self._resume()
        self._write_curves()
        logger = make_logger(config, directory)
        logger.log(self._history(0))  # the logger skips rows that it already has
        report(self._progress())
        try:
            while self.step < self.steps and not self.diverged:
                self._do_epoch(report, logger)
                self.interrupts.check()
        except Exception:
            logger.fail()
            raise
        except BaseException:
            logger.interrupt()
            raise
        self._write_curves()
        summary = self._summary()
        with judged(self.optimizer):
            if (kept := self.task.kept(self.model)) is not None:
                directory.save_model(kept)
        # The logger first: a run killed between the two resumes and logs again.
        logger.finish(summary)
        directory.finish(summary)
        return {"hash": directory.hash, **summary}

    def _do_epoch(self, report: Report, logger: Logger) -> None:
        """Train for an epoch and record it."""
        directory = self.directory
        recorded = len(self.trajectory), len(self.hypergradients)
        self.times = self.times or [time.time()]
        self._train_epoch(report)
        self.times.append(round(time.time(), 3))
        directory.save_checkpoint(self._state())
        directory.append_curves("curves", [list(self._last_row().values())])
        directory.append_curves("hyperparameters", self.trajectory[recorded[0] :])
        directory.append_curves("hypergradients", self.hypergradients[recorded[1] :])
        logger.log(self._history(len(self.curves) - 1))
        report(self._progress())

    def _train_epoch(self, report: Report) -> None:
        """Train for one pass over the data, or the rest of a pass."""
        trainer = self.config.trainer
        model, optimizer = self.model, self.optimizer
        began = time.perf_counter()
        epoch, batches = self._batches()
        for batch in batches:
            self._follow_schedule()
            share = self.shares.of(*batch)
            epoch.losses.append(self.gradient(*share))
            epoch.sizes.append(len(share[0]))
            if trainer.clip_value is not None:
                nn.utils.clip_grad_value_(model.parameters(), trainer.clip_value)
            optimizer.step()
            self.step += 1
            if self.step % trainer.record_every == 0:
                epoch.snapshots.append(self._snapshot(epoch.losses[-1]))
                epoch.steps.append(self.step)
                report(self._progress())
            if self.step < self.steps:
                if trainer.checkpoint_every and self.step % trainer.checkpoint_every == 0:
                    began = self._save_under_way(began)
                self.interrupts.check(functools.partial(self._save_under_way, began))
                self.interrupts.armed = trainer.processes == 1
        if not epoch.steps or epoch.steps[-1] != self.step:
            epoch.snapshots.append(self._snapshot(epoch.losses[-1]))
            epoch.steps.append(self.step)
        weights = torch.tensor(epoch.sizes, dtype=torch.float64)
        losses = torch.stack(epoch.losses).double()
        weights = weights.to(losses.device)
        train_loss = float(distributed.summed(losses @ weights) / distributed.summed(weights.sum()))
        count = len(self._recorded())
        for step, values in zip(epoch.steps, torch.stack(epoch.snapshots).tolist(), strict=True):
            self.trajectory.append([step, *values[:count]])
            self.hypergradients.append([step, *values[count:]])
        self.under_way = None
        self.seconds += time.perf_counter() - began
        finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
        self.diverged = not (math.isfinite(train_loss) and bool(finite))
        self.epoch += 1
        with judged(self.optimizer, lambda: self.task.renew_averages(model)):
            measured = self.task.evaluate(model)
        self.curves.append([self.epoch, self.step, train_loss, *measured.values()])

    def _save_under_way(self, began: float) -> float:
        """Save a checkpoint within an epoch; returns the time afterwards."""
        self.seconds += time.perf_counter() - began
        self.directory.save_checkpoint(self._state())
        return time.perf_counter()

    def _batches(self) -> tuple[_Epoch, Iterator[tuple[Tensor, Tensor]]]:
        """The unfinished epoch, or a new one, and its remaining batches."""
        carried = self.task.state_dict()
        if self.under_way is None:
            self.under_way = _Epoch(self.shuffle.get_state())
        self.shuffle.set_state(self.under_way.shuffle)
        batches = self.task.epoch(self.shuffle)
        if done := len(self.under_way.losses):
            for _ in itertools.islice(batches, done):
                pass
            self.task.load_state_dict(carried)
        return self.under_way, itertools.islice(batches, self.steps - self.step)

    def _snapshot(self, loss: Tensor) -> Tensor:
        """The values to record, in the order of `_recorded` and then of `_tuned`."""
        values, hypergradients = self.optimizer.snapshot(), self.optimizer.hypergradients()
        if len(values) < len(self._hyperparameters()):  # effective lr = learned lr so far
            values = torch.cat([values, values[self.optimizer.names.index("0.lr")].view(1)])
        if self.config.trainer.record_loss:
            return torch.cat([values, loss.to(values).view(1), hypergradients])
        return torch.cat([values, hypergradients])

    def _hyperparameters(self) -> list[str]:
        names = [*self.optimizer.names]
        return names + [EFFECTIVE_LR] * (self.scales_lr and EFFECTIVE_LR not in names)

    def _recorded(self) -> list[str]:
        return [*self._hyperparameters(), *["loss"] * self.config.trainer.record_loss]

    def _tuned(self) -> list[str]:
        """The columns of the hypergradients."""
        count = len(self.optimizer.hypergradients())
        return [f"hypergradient.{name}" for name in self.optimizer.names[:count]]

    def _follow_schedule(self) -> None:
        """Set the scheduled hyperparameters of the next step."""
        for name, value in self.schedule(self.step).items():
            for group in self.optimizer.param_groups:
                if group[name] != value:
                    group[name] = value

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "resumed": self.resumed,
            "diverged": self.diverged,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "shuffle": self.shuffle.get_state(),
            "curves": self.curves,
            "trajectory": self.trajectory,
            "hypergradients": self.hypergradients,
            "times": self.times,
            "made": self.made,
            "under_way": self.under_way and self.under_way.state_dict(),
            "task": self.task.state_dict(),
        }

    def _resume(self) -> None:
        """Restore the checkpoint, if a valid one exists."""
        try:
            state = distributed.agreed(self.directory.checkpoint)
            if state is None:
                return
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.shuffle.set_state(state["shuffle"])
            for name in ("epoch", "step", "seconds", "diverged", "curves", "trajectory"):
                setattr(self, name, state[name])
            for name in ("hypergradients", "times"):  # missing in older checkpoints
                setattr(self, name, state.get(name, []))
            if state["under_way"] is not None:
                self.under_way = _Epoch.from_state_dict(state["under_way"], self.device)
                self.task.load_state_dict(state["task"])
            self.made += [made for made in state.get("made", []) if made not in self.made]
            self.resumed = state["resumed"] + 1
        except Exception as error:  # a damaged checkpoint can raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if is_first():
                print(
                    f"run {self.directory.hash}: {reason}; the run starts again from the beginning",
                    file=sys.stderr,
                )
            self._start()

    def _progress(self) -> Progress:
        progress = Progress(self.epoch, self.config.trainer.epochs, self.step, self.steps)
        if self.curves:
            row = self._last_row()
            progress.train_loss = row["train_loss"]
            progress.test = {name: row[name] for name in self.task.metrics}
            progress.lr = row.get("0.lr")  # None if groups or tensors have their own lr
        return progress

    def _last_row(self) -> dict[str, float]:
        """The values of the last finished epoch, by name."""
        values = [*self.curves[-1], *self.trajectory[-1][1:]]
        return dict(zip(self._curve_names(), values, strict=True))

    def _curve_names(self) -> list[str]:
        return ["epoch", "step", "train_loss", *self.task.metrics, *self._recorded()]

    def _curve_rows(self, epoch: int = 0) -> list[list[float]]:
        """A row for each epoch, from `epoch` on, with the hyperparameters at the epoch's end."""
        values = {row[0]: row[1:] for row in self.trajectory}
        return [[*row, *values[row[1]]] for row in self.curves[epoch:]]

    def _history(self, epoch: int) -> list[Row]:
        """The rows to log, from `epoch` on; epochs count from 0."""
        start = self.curves[epoch - 1][1] if epoch else 0

        def named(names: list[str], rows: list[list[float]]) -> list[Row]:
            return [dict(zip(("step", *names), row, strict=True)) for row in rows if row[0] > start]

        return history(
            self.config.stack.notation or "",
            start,
            [dict(zip(self._curve_names(), row, strict=True)) for row in self._curve_rows(epoch)],
            named(self._recorded(), self.trajectory),
            named(self._tuned(), self.hypergradients),
            self.times[epoch:],
        )

    def _write_curves(self) -> None:
        self.directory.save_curves("curves", self._curve_names(), self._curve_rows())
        self.directory.save_curves("hyperparameters", ["step", *self._recorded()], self.trajectory)
        self.directory.save_curves("hypergradients", ["step", *self._tuned()], self.hypergradients)

    def _summary(self) -> dict[str, Any]:
        _, _, train_loss, *tested = self.curves[-1]
        metrics = dict(zip(self.task.metrics, tested, strict=True))
        stack = self.optimizer.stack
        made, *earlier = self.made
        return {
            **self.identity,
            **{name: finite_or_none(value) for name, value in metrics.items()},
            "train_loss": finite_or_none(train_loss),
            "diverged": self.diverged,
            "epochs": self.epoch,
            "steps": self.step,
            "hyperparameters": [
                {name: finite_or_none(value) for name, value in level.items()}
                for level in self.optimizer.hyperparameters()
            ],
            "tuned": list(stack.levels[0].tuned) if stack.height else [],
            "data_source": self.data.source,
            "data_sha256": self.data.sha256,
            "provenance": {
                **made,
                **({"earlier": earlier} if earlier else {}),
                "compiled": self.optimizer.compiled,
                "resumed": self.resumed,
                "seconds": self.seconds,
                "seconds_per_step": self.seconds / self.step,
                "times": self.times,
                "made_by": made_by(self.config),
                "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        }


def finite_or_none(value: float) -> float | None:
    """Replace infinity and NaN, which JSON lacks, by None."""
    return value if math.isfinite(value) else None
