"""The run store: one directory for each run, named by the hash of its resolved config.

    runs/0f3c.../config.json            the run's identity and hash
                 curves.csv             one row for each epoch
                 hyperparameters.csv    their values, every few steps
                 hypergradients.csv     their hypergradients, at the same steps
                 checkpoint.pt          until the run is finished
                 model.pt               the weights, if the task keeps them
                 summary.json           written last; it marks the run as finished
                 lock                   held by the process that works on the run

All writes are atomic, except the rows appended to the curves.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from experiments.files import csv_text, named, write_json, write_tensors, write_text


class RunDirectory:
    """The files of one run. Only the process that has claimed the run writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hash = path.name

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None for any other."""
        try:
            summary = json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):
            return None
        whole = isinstance(summary, dict) and summary.keys() >= {"stack", "seed", "hyperparameters"}
        return summary if whole and summary.get("hash") == self.hash else None

    def checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, tensors on the CPU, or None if none exists.

        Raises:
            ValueError: the checkpoint is damaged or belongs to another run.
        """
        path = self.path / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, OSError):
            raise ValueError(f"{path} cannot be read as a checkpoint") from None
        if not isinstance(state, dict) or state.get("hash") != self.hash:
            raise ValueError(f"{path} is not a checkpoint of run {self.hash}")
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        state = {"hash": self.hash, **state}
        write_tensors(self.path / "checkpoint.pt", state)

    def save_config(self, identity: dict[str, Any]) -> None:
        write_json(self.path / "config.json", {"hash": self.hash, **identity})

    def save_curves(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write the whole file `name`.csv."""
        write_text(self.path / f"{name}.csv", csv_text([header, *rows]))

    def append_curves(self, name: str, rows: Sequence[Sequence[Any]]) -> None:
        """Append rows to `name`.csv; a resumed run first writes the whole file again."""
        path = self.path / f"{name}.csv"
        try:
            with open(path, "a") as file:
                file.write(csv_text(rows))
        except OSError as error:
            raise named(error, path) from None

    def save_model(self, kept: dict[str, Any]) -> None:
        write_tensors(self.path / "model.pt", kept)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished, and drop the checkpoint."""
        write_json(self.path / "summary.json", {"hash": self.hash, **summary})
        (self.path / "checkpoint.pt").unlink(missing_ok=True)


class RunStore:
    """The folder of all runs."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def run(self, run_hash: str) -> RunDirectory:
        return RunDirectory(self.root / run_hash)

    def summary(self, run_hash: str) -> dict[str, Any] | None:
        return self.run(run_hash).summary()

    def finished(self, run_hash: str) -> dict[str, Any] | None:
        """As `summary`; it also removes the stale lock of a process killed after its summary."""
        summary = self.summary(run_hash)
        if summary is not None and (self.root / run_hash / "lock").exists():
            with suppress(OSError), self.claim(run_hash):
                pass
        return summary

    @contextmanager
    def claim(self, run_hash: str) -> Iterator[RunDirectory]:
        """Lock a run; wait for other processes. Then check whether one of them has finished it.

        The kernel releases the lock when the process ends, for any reason. The owner also removes
        the lock file, so a process that has waited must check that it locked the current file.
        """
        directory = self.run(run_hash)
        path = directory.path / "lock"
        while True:
            try:
                directory.path.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
            except OSError as error:
                raise named(error, directory.path) from None
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            os.close(descriptor)
        try:
            for cut_short in directory.path.glob("*.tmp"):  # left by a killed process
                cut_short.unlink()
            yield directory
        finally:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


class NoRecords(RunDirectory):
    """The directory of a run whose records another process writes."""

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...
    def save_config(self, identity: dict[str, Any]) -> None: ...
    def save_curves(self, name: str, header: Any, rows: Any) -> None: ...
    def append_curves(self, name: str, rows: Any) -> None: ...
    def save_model(self, state: Any) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...


@contextmanager
def no_records(store: RunStore, run_hash: str) -> Iterator[RunDirectory]:
    """Replaces `claim` in all processes except the first."""
    yield NoRecords(store.run(run_hash).path)
