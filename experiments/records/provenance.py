"""Provenance of results: commit, versions and machine, of one run or of many."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from experiments.cli import ROOT
from experiments.data.catalog import label


@functools.lru_cache(maxsize=1)
def of_process() -> dict[str, Any]:
    """The commit and the versions that this process runs; commit None outside of a repository.

    Call it when the process begins to work: later commits are not the code that it runs.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # Commands write to results/, and no computation reads it.
    status = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/results")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    """The model name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def provenance(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The provenance of a table's numbers, with all distinct values of its runs."""

    def values(key: str) -> list[Any]:
        mades = [summary["provenance"] for summary in summaries]
        mades += [earlier for made in mades for earlier in made.get("earlier", [])]
        return sorted({made[key] for made in mades if key in made}, key=str)

    keys = ("commit", "dirty", "python", "torch", "numpy", "platform", "device", "compiled")
    steps: dict[str, list[float]] = {}
    for summary in summaries:
        steps.setdefault(summary["stack"], []).append(summary["provenance"]["seconds_per_step"])
    return {
        "data": ", ".join(sorted({label(summary["data"]) for summary in summaries})),
        "data_sha256": ", ".join(
            sorted({summary["data_sha256"] or "none" for summary in summaries})
        ),
        "runs": len(summaries),
        "steps": sum(summary["steps"] for summary in summaries),
        **{key: values(key) for key in keys},
        "runs_resumed": sum(summary["provenance"]["resumed"] > 0 for summary in summaries),
        "training_seconds": sum(summary["provenance"]["seconds"] for summary in summaries),
        "seconds_per_step": {stack: fmean(seconds) for stack, seconds in steps.items()},
    }
