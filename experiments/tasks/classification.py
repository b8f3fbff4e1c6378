"""Classification of images: batches, augmentation and evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data.catalog import find
from experiments.data.images import Dataset, ImageSet
from experiments.data.source import COLOUR, GREY
from experiments.tasks.base import Measure
from experiments.tasks.compiled_gradient import Gradient, make_gradient

PAD = 4  # pixels of zeros around an image before cropping
EVALUATION_VALUES = 2000 * 28 * 28  # pixels in a test batch; larger batches exceed the caches
RENEWING_BATCHES = 50


class Classification:
    """A data set on a device, in batches.

    Args:
        augment: whether to pad, crop and flip the training images at random; for colour images.
        shuffle: whether each epoch has a new order; otherwise, the order of the file.
        l2: adds l2 / 2 times the squared norm of all weights to the loss. `evaluate` then also
            returns the objective: this loss on the whole training set.

    Raises:
        ValueError: a batch is larger than the training set.
    """

    kinds: ClassVar[tuple[str, ...]] = (GREY, COLOUR)
    keys: ClassVar[dict[str, Any]] = {
        "data.shuffle": True,
        "data.augment": False,
        "trainer.l2": None,
        "trainer.compile_model": False,
    }
    required: ClassVar[tuple[str, ...]] = ()
    distributed: ClassVar[bool] = True
    judged_by: ClassVar[Measure] = Measure("test_error", "test error (%)", "error {:.2f}%")
    metrics: tuple[str, ...] = ("test_error",)  # percent

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        augment: bool,
        device: torch.device | str,
        shuffle: bool = True,
        l2: float | None = None,
    ) -> None:
        self.batch_size, self.augment, self.shuffle, self.l2 = batch_size, augment, shuffle, l2
        if l2 is not None:
            self.metrics = (*self.metrics, "objective")  # nats
        source = find(data.name)
        assert isinstance(source, ImageSet)
        self.inputs = source.inputs
        x = F.pad(data.x_train, (0, 0, PAD, PAD, PAD, PAD)) if augment else data.x_train
        self.x_train, self.y_train = x.to(device), data.y_train.to(device)
        self.x_test, self.y_test = data.x_test.to(device), data.y_test.to(device)
        if batch_size > len(self.x_train):
            raise ValueError(
                f"trainer.batch_size={batch_size} is more than the {len(self.x_train)} training "
                f"images of {data.name}; give that many or fewer"
            )
        self.size = data.x_train.shape[1]
        self.model_arguments: dict[str, Any] = {}

    @classmethod
    def of(cls, config: Any, data: Dataset, device: torch.device) -> Classification:
        trainer, how = config.trainer, config.data
        return cls(data, trainer.batch_size, how.augment, device, how.shuffle, trainer.l2)

    @classmethod
    def check(cls, config: Any, kind: str) -> None:
        if config.data.augment and kind != COLOUR:
            raise ValueError(f"data.augment=true is for images in colour, not for {kind}")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.x_train) // self.batch_size)

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of uint8 images (n, height, width[, 3]) and labels (n,); the last may be smaller.

        All random numbers are drawn first, from a generator on the CPU, so that they are the same
        on any device.
        """
        device = self.x_train.device
        n = len(self.x_train)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        order = order.to(device)
        if not self.augment:
            for batch in order.split(self.batch_size):
                yield self.x_train.index_select(0, batch), self.y_train.index_select(0, batch)
            return
        corners = torch.randint(2 * PAD + 1, (2, len(order), 1), generator=generator).to(device)
        flips = torch.randint(2, (len(order), 1), generator=generator).bool().to(device)
        pixels = torch.arange(self.size, device=device)
        for batch, (top, left), flip in zip(
            order.split(self.batch_size),
            zip(*(corner.split(self.batch_size) for corner in corners), strict=True),
            flips.split(self.batch_size),
            strict=True,
        ):
            rows = top + pixels
            columns = left + torch.where(flip, self.size - 1 - pixels, pixels)
            yield self._crops(batch, rows, columns), self.y_train.index_select(0, batch)

    def _crops(self, batch: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Select each image's own rows and columns, both [n, size]."""
        height, width, colours = self.x_train.shape[1:]
        places = (batch[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
        flat = self.x_train.view(-1, colours).index_select(0, places.view(-1))
        return flat.view(*places.shape, colours)

    def gradient(self, model: nn.Module, compile: bool, autocast: bool) -> Gradient:
        """A function of a batch that sets `grad` and returns the loss; see `make_gradient`."""
        gradient = make_gradient(model, self.inputs, self.batch_size, compile, autocast)
        if self.l2 is None:
            return gradient
        l2, weights = self.l2, list(model.parameters())

        def penalized(images: Tensor, labels: Tensor) -> Tensor:
            loss = gradient(images, labels)
            with torch.no_grad():
                for w in weights:
                    assert w.grad is not None
                    w.grad.add_(w, alpha=l2)
                return loss + half_square(weights) * l2

        return penalized

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The percentage of the test set that `model`, in evaluation mode, classifies wrongly.

        With `l2`, also the objective.
        """
        wrong = torch.zeros((), dtype=torch.int64, device=self.x_test.device)
        size = max(1, EVALUATION_VALUES // self.x_test[0].numel())
        model.eval()
        for x, y in zip(self.x_test.split(size), self.y_test.split(size), strict=True):
            wrong += (model(self.inputs(x)).argmax(1) != y).sum()
        found = {"test_error": 100.0 * wrong.item() / len(self.x_test)}
        if self.l2 is not None:
            losses = [
                F.nll_loss(model(self.inputs(x)), y, reduction="sum").double()
                for x, y in zip(self.x_train.split(size), self.y_train.split(size), strict=True)
            ]
            penalty = self.l2 * half_square(model.parameters())
            found["objective"] = (torch.stack(losses).sum() / len(self.x_train) + penalty).item()
        model.train()
        return found

    @torch.no_grad()
    def renew_averages(self, model: nn.Module) -> None:
        """Recompute the averages of batch normalisation at the present weights."""
        if next(model.buffers(), None) is None:
            return
        model.train()
        batches = self.epoch(torch.Generator().manual_seed(0))
        for images, _ in itertools.islice(batches, RENEWING_BATCHES):
            model(self.inputs(images))

    def state_dict(self) -> dict[str, Tensor]:
        return {}  # batches are independent

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def kept(self, model: nn.Module) -> None: ...


def half_square(weights: Iterable[Tensor]) -> Tensor:
    """Half the squared norm of all weights, 0-dim."""
    return torch.stack([w.square().sum() for w in weights]).sum() / 2


TASK = Classification
