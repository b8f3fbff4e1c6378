"""The interface of a task: its batches, the gradient of a batch, and the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from experiments.tasks.compiled_gradient import Gradient


@dataclass(frozen=True)
class Measure:
    """The main metric of a task.

    Attributes:
        name: in summaries.
        words: for axes and captions.
        text: the format of a value.
    """

    name: str
    words: str
    text: str


class Task(Protocol):
    """Data on a device, with their batches, gradient and evaluation.

    To add a task, make its class the `TASK` of a module in this folder.

    Attributes:
        kinds: the kinds of data that it supports.
        keys: the config keys that only some tasks read, each with the value that disables it.
        required: the keys that must be 1 or more.
        distributed: whether several processes can do a run together.
        judged_by: the main metric.
        metrics: the names of the results of `evaluate`, in order.
        model_arguments: arguments of the model's constructor that depend on the data.
        steps_per_epoch: the number of batches in an epoch.
    """

    kinds: ClassVar[tuple[str, ...]]
    keys: ClassVar[dict[str, Any]]
    required: ClassVar[tuple[str, ...]] = ()
    distributed: ClassVar[bool]
    judged_by: ClassVar[Measure]
    metrics: tuple[str, ...]
    model_arguments: dict[str, Any]

    @classmethod
    def of(cls, config: Any, data: Any, device: torch.device) -> Task:
        """Make the task of a resolved config from its data."""
        ...

    @classmethod
    def check(cls, config: Any, kind: str) -> None:
        """Raise a ValueError, in one line, for a config that does not fit this kind of data."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a new epoch; all that is random comes from `generator`."""
        ...

    def gradient(self, model: nn.Module, compile: bool, autocast: bool) -> Gradient:
        """Return a function of a batch that sets `grad` and returns the mean loss in nats."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics of `model`, in evaluation mode, on held-out data."""
        ...

    def renew_averages(self, model: nn.Module) -> None:
        """Recompute a model's batch statistics after its weights have changed."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The state that an epoch carries from one batch to the next."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def kept(self, model: nn.Module) -> dict[str, Any] | None:
        """The part of a finished run's model to store; None for nothing."""
        ...
