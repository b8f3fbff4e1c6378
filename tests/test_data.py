"""The sources of the data, their order, and the errors for wrong files."""

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10 as CIFAR10Folder

from experiments.config.compose import compose
from experiments.config.resolve import resolve_all
from experiments.data import images as data
from experiments.data.catalog import load, resolve
from experiments.data.images import (
    CIFAR10_MEAN,
    CIFAR10_SD,
    CIFAR10_SHA256,
    MNIST_SHA256,
    Dataset,
    pixels,
)

FULL = Path(os.environ.get("HYPEROPT_DATA", "data"), "mnist.npz")
needs_mnist = pytest.mark.skipif(not FULL.is_file(), reason="needs the full MNIST")
CIFAR10 = FULL.with_name("cifar10.npz")
needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_file(), reason="needs CIFAR-10")


@pytest.fixture(autouse=True)
def nothing_in_memory() -> None:
    load.cache_clear()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Downloads fail, and are counted."""
    tried: list[Path] = []

    def fail(name: str, root: Path) -> bool:
        tried.append(root)
        return False

    monkeypatch.setattr(data, "_download", fail)
    return tried


def test_the_embedded_digits_are_a_stratified_fixed_split() -> None:
    digits = load("mnist-5k", "nowhere")
    assert digits.name == "mnist-5k"
    assert digits.x_train.shape == (4000, 28, 28) and digits.x_train.dtype == torch.uint8
    assert digits.x_test.shape == (1000, 28, 28) and digits.y_test.dtype == torch.int64
    assert digits.y_train.bincount().tolist() == [400] * 10
    assert digits.y_test.bincount().tolist() == [100] * 10
    assert digits.sha256.startswith("6f1dec24eae41a25")
    train = {row.numpy().tobytes() for row in digits.x_train}
    assert sum(row.numpy().tobytes() in train for row in digits.x_test) == 0


def test_pixels_are_in_the_unit_interval() -> None:
    x = pixels(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(x, torch.tensor([0.0, 0.2, 1.0]))


@needs_mnist
def test_the_full_mnist_is_known_by_its_checksum() -> None:
    digits = load("mnist", FULL.parent)
    assert (len(digits.x_train), len(digits.x_test)) == (60_000, 10_000)
    assert (digits.sha256, digits.source) == (MNIST_SHA256, "mnist.npz")
    assert digits.y_train[:5].tolist() == [5, 0, 4, 1, 9]  # as in the original files


@needs_mnist
def test_torchvisions_folder_holds_the_same_digits(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    with np.load(FULL) as arrays:
        for part, name in (("train", "train"), ("test", "t10k")):
            for kind, array in (
                ("images-idx3", arrays[f"x_{part}"]),
                ("labels-idx1", arrays[f"y_{part}"]),
            ):
                head = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
                (raw / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())
    digits = load("mnist", tmp_path)
    assert (digits.sha256, digits.source) == (MNIST_SHA256, "torchvision's MNIST folder")


@needs_cifar10
def test_the_full_cifar10_is_known_by_its_checksum() -> None:
    """The colours' means and deviations, and the sizes of the classes."""
    images = load("cifar10", CIFAR10.parent)
    assert (images.sha256, images.source) == (CIFAR10_SHA256, "cifar10.npz")
    assert images.x_train.shape == (50_000, 32, 32, 3) and images.x_test.dtype == torch.uint8
    assert images.y_train.bincount().tolist() == [5000] * 10
    assert images.y_test.bincount().tolist() == [1000] * 10
    levels = torch.arange(256).double() / 255
    for colour, mean, sd in zip(images.x_train.unbind(-1), CIFAR10_MEAN, CIFAR10_SD, strict=True):
        share = colour.flatten().bincount(minlength=256).double() / colour.numel()
        assert (share @ levels).item() == pytest.approx(mean, abs=1e-7)
        assert (share @ (levels - mean) ** 2).sqrt().item() == pytest.approx(sd, abs=1e-7)


def test_cifar10_does_not_depend_on_order_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few images, in an npz file and, in another order, in torchvision's folder."""
    x = torch.randint(256, (30, 32, 32, 3), dtype=torch.uint8)
    y = torch.arange(30, dtype=torch.uint8) % 10
    parts = {"x_train": x[:20], "y_train": y[:20], "x_test": x[20:], "y_test": y[20:]}
    arrays: dict[str, Any] = {name: part.numpy() for name, part in parts.items()}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    with pytest.raises(ValueError, match=r"not hold CIFAR-10: .* expected 6b6ac4d8") as refused:
        load("cifar10", tmp_path)
    train, test = (data._sorted(arrays[f"x_{p}"], arrays[f"y_{p}"]) for p in ("train", "test"))
    known = data._dataset("", "", [*train, *test])
    assert f"have sha256 {known.sha256[:16]}" in str(refused.value)
    monkeypatch.setitem(data.SHA256, "cifar10", known.sha256)
    from_npz = load("cifar10", tmp_path)

    folder = tmp_path / "torchvision" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    reversed_batches = {"data_batch_1": (x[10:20], y[10:20]), "data_batch_2": (x[:10], y[:10])}
    lists: dict[str, list[list[str]]] = {}
    for name, (images, labels) in (reversed_batches | {"test_batch": (x[20:], y[20:])}).items():
        planes = images.permute(0, 3, 1, 2).reshape(len(images), -1).numpy()
        batch = pickle.dumps({"data": planes, "labels": labels.tolist()})
        (folder / name).write_bytes(batch)
        which = "test_list" if name == "test_batch" else "train_list"
        lists.setdefault(which, []).append([name, hashlib.md5(batch).hexdigest()])
    names = pickle.dumps({"label_names": [str(label) for label in range(10)]})
    (folder / "batches.meta").write_bytes(names)
    for which, files in lists.items():
        monkeypatch.setattr(CIFAR10Folder, which, files)
    monkeypatch.setitem(CIFAR10Folder.meta, "md5", hashlib.md5(names).hexdigest())
    again = load("cifar10", tmp_path / "torchvision")
    assert again.source == "torchvision's CIFAR10 folder" and from_npz.source == "cifar10.npz"
    for part in ("x_train", "y_train", "x_test", "y_test"):
        assert getattr(again, part).equal(getattr(from_npz, part))
    labelled = {row.numpy().tobytes(): int(label) for row, label in zip(x, y, strict=True)}
    for row, label in zip(again.x_train, again.y_train, strict=True):
        assert labelled[row.numpy().tobytes()] == label


def test_without_cifar10_the_error_names_the_file(tmp_path: Path, offline: list[Path]) -> None:
    for download, tried in ((False, 0), (True, 1)):
        with pytest.raises(ValueError) as caught:
            resolve("cifar10", tmp_path, download)
        said = str(caught.value)
        assert said.startswith(f"CIFAR-10 is not under '{tmp_path}'") and "\n" not in said
        assert ("could not be downloaded" in said) == download and len(offline) == tried
        for word in ("put cifar10.npz", "cifar-10-batches-py", "data.root", "HYPEROPT_DATA"):
            assert word in said


def save_npz(path: Path, digits: Dataset) -> None:
    np.savez(
        path,
        x_train=digits.x_train.numpy(),
        y_train=digits.y_train.byte().numpy(),
        x_test=digits.x_test.numpy(),
        y_test=digits.y_test.byte().numpy(),
    )


def test_an_npz_of_other_digits_is_refused(tmp_path: Path) -> None:
    save_npz(tmp_path / "mnist.npz", load("mnist-5k", "nowhere"))
    with pytest.raises(ValueError, match=r"mnist.npz .* does not hold MNIST: .* expected 06b0d1f1"):
        load("mnist", tmp_path)


def test_a_truncated_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    save_npz(path, load("mnist-5k", "nowhere"))
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=r"mnist.npz cannot be read .* set data.root to another"):
        load("mnist", tmp_path)


def test_without_mnist_the_embedded_digits_are_used(tmp_path: Path, offline: list[Path]) -> None:
    assert resolve("mnist", tmp_path, download=False) == "mnist-5k"
    assert offline == []
    assert resolve("mnist", tmp_path, download=True) == "mnist-5k"
    assert offline == [tmp_path]


def test_a_banner_warns_of_other_digits(
    tmp_path: Path, offline: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([f"data.root={tmp_path}"])
    assert [c.data.name for c in resolve_all([config, config])] == ["mnist-5k"] * 2
    said = capsys.readouterr().err
    assert said.count("NOT comparable") == 1 and "MNIST-5k" in said


def test_an_unknown_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no data set 'mnits'; known are .*mnist, mnist-5k, cifar10"
    ):
        resolve("mnits", tmp_path)
