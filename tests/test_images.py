"""Image batches: whole epochs, crops and flips by the run's own generator, at little cost."""

import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.data.images import CIFAR10_MEAN, CIFAR10_SD, Dataset, normalised
from experiments.tasks.classification import Classification
from models.resnet import ResNet


def dataset(n: int) -> Dataset:
    """n random images; the label of each is its number."""
    x = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8)
    return Dataset("cifar10", "", "", x, torch.arange(n), x, torch.arange(n))


class Fed(NamedTuple):
    images: Tensor
    labels: Tensor
    sizes: list[int]


def fed(images: Classification, seed: int = 0) -> Fed:
    """A whole epoch."""
    batches = list(images.epoch(torch.Generator().manual_seed(seed)))
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    return Fed(x, y, [len(labels) for _, labels in batches])


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_has_each_image_once_in_an_order_of_its_own(augment: bool) -> None:
    images = Classification(dataset(30), 8, augment, "cpu")
    epoch = fed(images)
    assert epoch.sizes == [8, 8, 8, 6] and images.steps_per_epoch == 4
    assert sorted(epoch.labels.tolist()) == list(range(30))
    assert epoch.labels.tolist() != sorted(epoch.labels.tolist())
    assert fed(images).images.equal(epoch.images)
    assert not fed(images, seed=1).labels.equal(epoch.labels)


def test_without_augmentation_images_are_unchanged() -> None:
    data = dataset(30)
    epoch = fed(Classification(data, 8, False, "cpu"))
    assert epoch.images.equal(data.x_train[epoch.labels])


def test_augmented_images_are_crops_with_zeros_around_and_flips() -> None:
    """Each is one of 9 x 9 x 2 possible crops and flips; all corners and both sides occur."""
    data = dataset(400)
    epoch = fed(Classification(data, 64, True, "cpu"))
    padded = np.pad(data.x_train.numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)))
    seen = set()
    for image, label in zip(epoch.images.numpy(), epoch.labels.tolist(), strict=True):
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (1, -1)
            if (image == padded[label, top : top + 32, left : left + 32][:, ::flip]).all()
        ]
        assert len(found) == 1
        seen.add(found[0])
    tops, lefts, flips = (set(values) for values in zip(*seen, strict=True))
    assert (tops, lefts, flips) == (set(range(9)), set(range(9)), {1, -1})


def test_normalised_images_are_channels_last_with_the_colours_of_the_training_set() -> None:
    x = dataset(4).x_train
    found = normalised(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = (x.double() / 255 - torch.tensor(CIFAR10_MEAN)) / torch.tensor(CIFAR10_SD)
    torch.testing.assert_close(found.double(), expected.permute(0, 3, 1, 2), atol=1e-5, rtol=0)


def test_the_test_error_is_of_evaluation_mode_and_leaves_the_model_training() -> None:
    """A model that is right on every third image, but only in evaluation mode."""

    class Third(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training and not torch.is_grad_enabled()
            self.seen = getattr(self, "seen", 0) + len(x)
            labels = torch.arange(self.seen - len(x), self.seen)
            return torch.nn.functional.one_hot(labels + (labels % 3 > 0), 1200)

    model = Third()
    assert Classification(dataset(1100), 8, True, "cpu").evaluate(model) == {
        "test_error": pytest.approx(66.6364)
    }
    assert model.training and model.seen == 1100


def test_feeding_takes_little_of_a_step() -> None:
    """Less than 3 % of a ResNet-20's step at batch 128, the least of several times of both."""
    images = Classification(dataset(2560), 128, True, "cpu")
    model = ResNet().to(memory_format=torch.channels_last)
    gradient = images.gradient(model, compile=False, autocast=False)
    feeding, stepping = [], []
    epoch = images.epoch(torch.Generator())
    next(epoch)
    for _ in range(4):
        began = time.perf_counter()
        batch = next(epoch)
        images.inputs(batch[0])
        feeding.append(time.perf_counter() - began)
        began = time.perf_counter()
        gradient(batch[0], batch[1] % 10)
        stepping.append(time.perf_counter() - began)
    assert min(feeding) < 0.03 * min(stepping)
