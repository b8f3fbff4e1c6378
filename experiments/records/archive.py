"""Finished runs in one compact file, so that a long experiment can go on on another machine.

A file has a line of JSON for each run: its hash, and the text of each of its files.

A study reads all files of its folder of records. New runs are added as a new file, so that git
stores each file once.
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

# In the order in which they are written: the mark comes last.
FILES = ("config.json", "curves.csv", "hyperparameters.csv", "hypergradients.csv", "summary.json")
LATER = {"hypergradients.csv"}  # which earlier records do not have

Record = dict[str, str]  # the text of each file of a run


def read_records(path: Path) -> dict[str, Record]:
    """The runs in a file, or in all files of a folder, by their hash; nothing where there is none.

    Raises:
        ValueError: a file is damaged, or a run's config is not that of its hash.
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
                raise ValueError(f"run {name} is not whole")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as records of runs: {error}") from None
    return records


def archive_name() -> str:
    """The name of a new file of records: when it was begun, and something that no other has."""
    return f"{datetime.now(timezone.utc):%Y-%m-%d}-{secrets.token_hex(4)}.jsonl.gz"


def setting(run: dict[str, Any]) -> dict[str, Any]:
    """What the runs of one table have in common, key by key, from an identity or a summary."""
    groups = {
        f"{group}.{key}": run[group][key] for group in ("model", "trainer") for key in run[group]
    }
    return {**groups, "data": run["data"], "device": run["device"]}


def export_runs(store: RunStore, hashes: Iterable[str], path: Path) -> int:
    """Put those of the runs that are finished into a file, and return how many it then has.

    Where there is none, no file is written.
    """
    with locked(path.parent):  # another process may export its own runs to it
        records = read_records(path)
        for name in hashes:
            if store.summary(name) is not None:
                folder = store.run(name).path
                there = [file for file in FILES if file not in LATER or (folder / file).exists()]
                records[name] = {file: (folder / file).read_text() for file in there}
        if records:
            lines = [json.dumps({"hash": name, "files": records[name]}) for name in sorted(records)]
            text = "".join(f"{line}\n" for line in lines)
            write_bytes(path, gzip.compress(text.encode(), mtime=0))
    return len(records)


def import_runs(path: Path, store: RunStore) -> int:
    """Put the runs of a file into a store as finished; returns how many were not."""
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
