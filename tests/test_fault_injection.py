"""Machine failures during runs: kills, a full disk, damaged files.

More of it is in `fault_injection.py`.
"""

import random
from pathlib import Path

import numpy as np
import pytest
from fault_injection import Faults, NoMount, tmpfs

from experiments.config.compose import compose
from experiments.config.identity import run_hash
from experiments.config.resolve import resolve, resolve_all
from experiments.records.store import RunStore
from experiments.training.trainer import train

SHORT = ("trainer.epochs=2", "trainer.compile=false", "trainer.compile_model=false", "device=cpu")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_a_sweep_that_is_killed_ends_with_the_same_csv(tmp_path: Path) -> None:
    faults = Faults(tmp_path, runs=4, epochs=10)
    found, words = faults.killed(2, random.Random(0))
    assert found == faults.left_alone()
    assert words.startswith("2 kills")


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path: Path) -> None:
    """With room for a finished run, but not for the checkpoint of the next."""

    def config(seed: int, store: Path):
        fixed = ("data=mnist-5k", f"store={store}", f"seed={seed}")
        return resolve(compose([*SHORT, *fixed]), "mnist-5k")

    try:
        with tmpfs(tmp_path / "disk", "4m") as disk:
            first = train(config(0, disk))
            (disk / "ballast").write_bytes(bytes(7 << 19))
            with pytest.raises(
                OSError, match=r"^the disk is full, .*/checkpoint.pt is not written"
            ):
                train(config(1, disk))
            second = RunStore(disk).run(run_hash(config(1, disk)))
            assert not list(second.path.glob("*.tmp"))
            assert RunStore(disk).summary(first["hash"]) == first
            (disk / "ballast").unlink()
            again = train(config(1, disk))
    except NoMount as error:
        pytest.skip(f"cannot mount: {error}")
    whole = train(config(1, tmp_path / "whole"))
    assert {**again, "provenance": 0} == {**whole, "provenance": 0}


@pytest.mark.parametrize("harm", ["cut short", "not a file of arrays", "other digits"])
def test_a_damaged_data_file_is_one_clear_line(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "mnist.npz"
    images = np.zeros((60_000, 28, 28), np.uint8)
    labels = np.zeros(60_000, np.uint8)
    x_test, y_test = images[:10_000], labels[:10_000]
    np.savez_compressed(path, x_train=images, y_train=labels, x_test=x_test, y_test=y_test)
    if harm == "cut short":
        path.write_bytes(path.read_bytes()[:5000])
    if harm == "not a file of arrays":
        path.write_bytes(random.Random(0).randbytes(5000))
    wanted = compose([*SHORT, f"data.root={tmp_path}", "data.download=false"])
    with pytest.raises(ValueError, match=r"mnist\.npz") as caught:
        resolve_all([wanted])
    assert "\n" not in str(caught.value)
