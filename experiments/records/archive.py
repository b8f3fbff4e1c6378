"""Archives of finished runs, so that a long experiment can continue on another machine.

An archive has a line of JSON for each run: its hash, and the text of each of its files.

A study reads all archives in its folder of records. New runs go to a new archive, so that git
stores each archive once.
"""

from __future__ import annotations

import gzip
import json
import secrets
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from experiments.config.identity import identity_hash
from experiments.files import locked, write_bytes, write_text
from experiments.records.store import RunStore

# In the order of writing: summary.json marks the run as finished, so it is last.
FILES = ("config.json", "curves.csv", "hyperparameters.csv", "hypergradients.csv", "summary.json")
LATER = {"hypergradients.csv"}  # missing in older records

Record = dict[str, str]  # the text of each file of a run


def read_records(path: Path) -> dict[str, Record]:
    """Read the runs in an archive, or in all archives of a folder, by hash.

    The result is empty if `path` does not exist.

    Raises:
        ValueError: a file is damaged, or a run's config does not match its hash.
    """
    if path.is_dir():
        parts = [read_records(part) for part in sorted(path.glob("*.jsonl.gz"))]
        return {name: files for part in parts for name, files in part.items()}
    if not path.exists():
        return {}
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        records = {line["hash"]: line["files"] for line in map(json.loads, lines)}
        for name, files in records.items():
            config = json.loads(files["config.json"])
            named = config.pop("hash") == name == identity_hash(config)
            if not named or set(files) | LATER != set(FILES):
                raise ValueError(f"run {name} is incomplete")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as records of runs: {error}") from None
    return records


def archive_name() -> str:
    """The name of a new archive: the date and a random suffix."""
    return f"{datetime.now(timezone.utc):%Y-%m-%d}-{secrets.token_hex(4)}.jsonl.gz"


def setting(run: dict[str, Any]) -> dict[str, Any]:
    """The settings that the runs of one table share, by key, from an identity or a summary."""
    groups = {
        f"{group}.{key}": run[group][key] for group in ("model", "trainer") for key in run[group]
    }
    return {**groups, "data": run["data"], "device": run["device"]}


def export_runs(store: RunStore, hashes: Iterable[str], path: Path) -> int:
    """Add the finished runs to an archive, and return how many it then has.

    Without finished runs, no file is written.
    """
    with locked(path.parent):  # another process may export its own runs to it
        records = read_records(path)
        for name in hashes:
            if store.summary(name) is not None:
                folder = store.run(name).path
                own = [file for file in FILES if file not in LATER or (folder / file).exists()]
                records[name] = {file: (folder / file).read_text() for file in own}
        if records:
            lines = [json.dumps({"hash": name, "files": records[name]}) for name in sorted(records)]
            text = "".join(f"{line}\n" for line in lines)
            write_bytes(path, gzip.compress(text.encode(), mtime=0))
    return len(records)


def import_runs(path: Path, store: RunStore) -> int:
    """Copy the runs of an archive into a store; returns how many the store did not have."""
    new = 0
    for name, files in read_records(path).items():
        with store.claim(name) as directory:
            if directory.summary() is not None:
                continue
            for file in FILES:
                if file in files:
                    write_text(directory.path / file, files[file])
            (directory.path / "checkpoint.pt").unlink(missing_ok=True)
            new += 1
    return new
