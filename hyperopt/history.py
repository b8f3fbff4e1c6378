"""Record the hyperparameters of a tower at each step, plot them, and log them.

Plots need matplotlib. The rest needs only torch. The callbacks for Lightning and Hugging Face use
the framework that the caller has imported.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from .optimizer import HyperOptimizer

COLUMNS = 3  # panels side by side in a figure


class History:
    """A record of the hyperparameters of all levels after each step.

    It is a hook of ``optimizer.step``, so the training loop stays as it is. Copies and checkpoints
    of the optimizer do not contain the history.

    Args:
        optimizer: a `HyperOptimizer`, such as `Auto`.
        every: record the values of every n-th step.
        show_every: show the values after every n-th step; 0 means never. A notebook shows a figure
            and updates it in place. Elsewhere one line is printed.

    Raises:
        TypeError: the optimizer is not a `HyperOptimizer`, or is a wrapper around one.
        ValueError: ``every`` is below 1 or ``show_every`` below 0.
    """

    def __init__(self, optimizer: HyperOptimizer, every: int = 1, show_every: int = 0) -> None:
        if not isinstance(optimizer, HyperOptimizer):
            raise TypeError(f"History needs a HyperOptimizer, not a {type(optimizer).__name__}")
        if every < 1 or show_every < 0:
            raise ValueError(f"every={every} must be 1 or more, show_every={show_every} 0 or more")
        self.every, self.show_every = every, show_every
        self.step = 0
        self._records: list[tuple[int, tuple[str, ...], Tensor]] = []
        self._figure: Any = None  # in a notebook, the handle of the figure
        self._hook = optimizer.register_step_post_hook(self._listen)

    def stop(self) -> None:
        """Stop recording. The recorded values stay."""
        self._hook.remove()

    @property
    def steps(self) -> list[int]:
        """The recorded steps, counted from 1."""
        return [step for step, _, _ in self._records]

    def values(self) -> dict[str, list[float]]:
        """The recorded values by the optimizer's `names`, one value for each of `steps`.

        A value is NaN if its name did not exist yet, as for a param group that was added later.
        """
        found: defaultdict[str, list[float]] = defaultdict(lambda: [math.nan] * len(self._records))
        for i, (_, names, snapshot) in enumerate(self._records):
            for name, value in zip(names, snapshot.tolist(), strict=True):
                found[name][i] = value
        return dict(found)

    def plot(self, file: str | Path | None = None, names: Sequence[str] = ()) -> Any:
        """Plot hyperparameters over the steps, one panel for each level and hyperparameter.

        Args:
            file: save the figure to this path, as ``"learned.png"``.
            names: the hyperparameters to plot, as ``["0.lr"]``; by default all that changed.

        Returns:
            A matplotlib figure. A notebook shows it if the call is the last line of a cell.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no steps were recorded, or a name is unknown.
        """
        from matplotlib.figure import Figure

        class Shown(Figure):
            def _repr_png_(self) -> bytes:  # notebooks call this
                self.savefig(png := BytesIO(), format="png", bbox_inches="tight")
                return png.getvalue()

        panels = self._panels(names)
        rows, columns = -(-len(panels) // COLUMNS), min(len(panels), COLUMNS)
        figure = Shown(figsize=(4 * columns, 2.6 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
        for axis, (title, lines) in zip(axes, panels.items(), strict=False):
            for name, values in lines.items():
                axis.plot(self.steps, values, label=name.partition("[")[2].rstrip("]"))
            known = [value for values in lines.values() for value in values if value == value]
            if min(known) > 0 and max(known) > 3 * min(known):
                axis.set_yscale("log")
            level, _, hyper = title.partition(".")
            axis.set_title(f"{hyper} of level {level}", fontsize="medium")
            axis.set_xlabel("step")
            if 1 < len(lines) <= 10:
                axis.legend(fontsize="small")
        for axis in list(axes)[len(panels) :]:
            axis.remove()
        if file is not None:
            figure.savefig(file)
        return figure

    def _panels(self, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """The values to plot, by panel and name."""
        if not self._records:
            raise ValueError(
                "there is nothing to draw: the optimizer has made no step since this History was "
                "made; make it before the training loop"
            )
        values = self.values()
        moved = [name for name, own in values.items() if len({v for v in own if v == v}) > 1]
        panels: dict[str, dict[str, list[float]]] = {}
        for name in names or moved or [name for name in values if ".lr" in name]:
            if name not in values:
                raise ValueError(f"there is no {name!r}; the names are {', '.join(values)}")
            panels.setdefault(name.partition("[")[0], {})[name] = values[name]
        return panels

    def _listen(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.step += 1
        if self.step % self.every == 0:
            self._records.append((self.step, optimizer.names, optimizer.snapshot()))
        if self.show_every and self.step % self.show_every == 0 and self._records:
            self._show()

    def _show(self) -> None:
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        if shell is None or not hasattr(shell, "kernel"):
            _, names, snapshot = self._records[-1]
            pairs = zip(names, snapshot.tolist(), strict=True)
            print(f"step {self.step}:", *(f"{name} {value:.4g}" for name, value in pairs))
        elif self._figure is None:
            self._figure = ipython.display.display(self.plot(), display_id=True)  # type: ignore[union-attr]
        else:
            self._figure.update(self.plot())


def lightning_callback(every: int = 1) -> Any:
    """Make a Lightning callback that logs the hyperparameters of all levels.

        trainer = lightning.Trainer(callbacks=[lightning_callback()])

    If a module has several `HyperOptimizer`s, the names begin with ``optimizer0.``, and so on.

    Args:
        every: log after every n-th batch.

    Raises:
        ImportError: neither ``lightning.pytorch`` nor ``pytorch_lightning`` was imported.
    """
    base = _imported("lightning.pytorch", "pytorch_lightning").Callback

    class LogHyperparameters(base):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            if trainer.global_step % every == 0:
                module.log_dict(dict(_readings(trainer.optimizers)))

    return LogHyperparameters()


def trainer_callback(trainer: Any) -> Any:
    """Make a Hugging Face Trainer callback that logs the hyperparameters of all levels.

        trainer.add_callback(trainer_callback(trainer))

    It logs when the Trainer logs, so ``logging_steps`` sets how often.

    Raises:
        ImportError: ``transformers`` was not imported.
    """
    base = _imported("transformers").TrainerCallback

    class LogHyperparameters(base):  # type: ignore[misc, valid-type]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if control.should_log:
                trainer.log({k: float(v) for k, v in _readings([trainer.optimizer])})

    return LogHyperparameters()


def _imported(*names: str) -> Any:
    """The framework that the caller uses: the first of these modules that is imported."""
    for name in names:
        if name in sys.modules:
            return sys.modules[name]
    raise ImportError(f"import {' or '.join(names)} first: the callback belongs to it")


def _readings(optimizers: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """The names and values of all optimizers that are, or wrap, a `HyperOptimizer`."""
    found = []
    for optimizer in optimizers:
        while not isinstance(optimizer, HyperOptimizer) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, HyperOptimizer):
            found.append(optimizer)
    for i, optimizer in enumerate(found):
        prefix = f"optimizer{i}." if len(found) > 1 else ""
        for name, value in zip(optimizer.names, optimizer.snapshot().float(), strict=True):
            yield prefix + name, value
