"""The sources of MNIST, in their order, and what is said when one is not what it should be."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import data
from experiments.config import compose
from experiments.data import MNIST_SHA256, Dataset, load, pixels, resolve
from experiments.run import resolve_all

FULL = Path(os.environ.get("HYPEROPT_DATA", "data"), "mnist.npz")
needs_mnist = pytest.mark.skipif(not FULL.is_file(), reason="needs the full MNIST")


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


def test_without_mnist_the_embedded_digits_stand_in(tmp_path: Path, offline: list[Path]) -> None:
    assert resolve("mnist", tmp_path, download=False) == "mnist-5k"
    assert offline == []
    assert resolve("mnist", tmp_path, download=True) == "mnist-5k"
    assert offline == [tmp_path]


def test_a_banner_says_that_other_digits_stand_in(
    tmp_path: Path, offline: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([f"data.root={tmp_path}"])
    assert [c.data.name for c in resolve_all([config, config])] == ["mnist-5k"] * 2
    said = capsys.readouterr().err
    assert said.count("NOT comparable") == 1 and "MNIST-5k" in said


def test_an_unknown_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data set 'mnits'; known are mnist, mnist-5k, cifar10"):
        resolve("mnits", tmp_path)
