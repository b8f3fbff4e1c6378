"""What a training run asks of its task: batches, the gradient on one of them, how it is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from experiments.tasks.compiled_gradient import Gradient


class Task(Protocol):
    """Data on a device, and what is done with them.

    Attributes:
        metrics: the names of what `evaluate` returns, the one that a run is judged by last.
        model_arguments: what a model has to know of the data, for its constructor.
        steps_per_epoch: the batches of an epoch.
    """

    metrics: tuple[str, ...]
    model_arguments: dict[str, Any]

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


def headline(metrics: Mapping[str, Any]) -> str:
    """What a run is judged by, in words, from its summary or the last row of its curves."""
    if "test_error" in metrics:
        return f"error {metrics['test_error']:.2f}%"
    perplexity = metrics["test_perplexity"]
    return f"perplexity {'infinite' if perplexity is None else f'{perplexity:.3f}'}"
