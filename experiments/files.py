"""Atomic writes, so that no file is ever half written; folders, locks, CSV text."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file, then replace `path` with it.

    Raises:
        OSError: it cannot be written. See `named` for the advice in the message.
    """
    # The process id keeps two writers of one file apart. Nothing reads a leftover .tmp file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise named(error, path) from None


def named(error: OSError, path: Path) -> OSError:
    """Add advice to an error from writing `path`, if the cause is known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(
            f"the disk is full, so {path} is not written; free space and give the command again"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.ENOTDIR):
        return OSError(f"{path} cannot be written: {error.strerror}; give a writable folder")
    return error


def make_folder(folder: Path) -> None:
    """Make a folder if it does not exist, and check that it is writable.

    Raises:
        OSError: it is not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise named(error, folder) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; wait for other processes."""
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    content = io.BytesIO()  # torch.save reports a full disk as an internal error
    torch.save(state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """RFC 4180 with bare newlines; floats at full precision, None as an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
