"""What a training run asks of its task: batches, the gradient on one of them, how it is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from experiments.tasks.compiled_gradient import Gradient


@dataclass(frozen=True)
class Measure:
    """What the runs of a task are judged by.

    Attributes:
        name: in summaries.
        words: for axes and captions.
        text: of a value, as a format.
    """

    name: str
    words: str
    text: str


class Task(Protocol):
    """Data on a device, and what is done with them.

    A class of tasks is the `TASK` of a module in this folder, and is found there.

    Attributes:
        kinds: of the data that it is for.
        keys: the keys of a config that not every task reads, with the value that leaves each out.
        required: those of them that must be 1 or more.
        distributed: whether several processes can do it together.
        judged_by: what runs are judged by.
        metrics: the names of what `evaluate` returns, the one that a run is judged by last.
        model_arguments: what a model has to know of the data, for its constructor.
        steps_per_epoch: the batches of an epoch.
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
        """The task of a resolved config on its data."""
        ...

    @classmethod
    def check(cls, config: Any, kind: str) -> None:
        """Raise a ValueError, in one line, for a value that data of some kind cannot have."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a new epoch; all that is random comes from `generator`."""
        ...

    def gradient(self, model: nn.Module, compile: bool, autocast: bool) -> Gradient:
        """A function of a batch that sets `grad` and returns the mean loss in nats."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """How `model` does, in evaluation mode, on what is held out."""
        ...

    def renew_averages(self, model: nn.Module) -> None:
        """Let what a model keeps beside its weights follow them, where they were changed."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What an epoch under way carries from one batch to the next."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def kept(self, model: nn.Module) -> dict[str, Any] | None:
        """What is kept of a finished run's model; None for nothing."""
        ...
