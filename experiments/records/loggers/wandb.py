"""Weights & Biases: the same records on a dashboard.

It has a run under its hash, so that one which goes on after a kill goes on there too.
What it was given of a run stands in `wandb.json` in the run's directory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config.baselines import parse
from experiments.config.identity import identity
from experiments.config.schema import Config
from experiments.files import write_json
from experiments.records.loggers.logger import Logger, Row, made_by
from experiments.records.store import RunDirectory

NOTE = "wandb.json"
LONGEST, LONGEST_TAG = 128, 64  # characters of a name and of a tag


class WandbLogger(Logger):
    """Weights & Biases. Offline where no key is set; it never asks, and never fails a run.

    Args:
        made_by: what `made_by` says of the run's config.
        settings: what identifies the run.
    """

    def __init__(
        self,
        directory: RunDirectory,
        settings: dict[str, Any],
        made_by: dict[str, Any],
        project: str,
    ) -> None:
        self.directory = directory
        self.run: Any = None
        self._try(self._open, settings, made_by, project)

    @classmethod
    def prepare(cls) -> None:
        try:
            import wandb

            wandb.setup(wandb.Settings(silent=True))
        except Exception as error:  # each run will try for itself
            print(f"wandb could not be prepared: {error}", file=sys.stderr)

    @classmethod
    def publish(cls, results: Path, config: Config) -> None:
        push_results(results, Path(config.store), config.logger.project)
        say_how_to_sync(config.store)

    @classmethod
    def say_where(cls, config: Config) -> None:
        say_how_to_sync(config.store)

    @classmethod
    def of(cls, config: Config, directory: RunDirectory) -> WandbLogger:
        return cls(directory, identity(config), made_by(config), config.logger.project)

    def _open(self, settings: dict[str, Any], made_by: dict[str, Any], project: str) -> None:
        import wandb

        self.note = read_note(self.directory)
        stack = parse(settings["stack"])
        rule = stack.levels[0].name
        tags = [rule, f"height {stack.height}", settings["data"], made_by.get("preset")]
        self.run = wandb.init(
            project=project,
            id=self.directory.hash,
            resume="allow",
            name=f"{made_by.get('row') or stack}, seed {settings['seed']}"[:LONGEST],
            group=f"{made_by.get('experiment') or 'run'}: {stack}"[:LONGEST],
            job_type=f"seed {settings['seed']}",
            tags=[tag[:LONGEST_TAG] for tag in tags if tag],
            config={
                **{**settings, **made_by, "rule": rule, "height": stack.height},
                "lr": stack.levels[0].values.get("lr"),
            },
            dir=str(self.directory.path),
            mode="offline" if offline() else None,
            reinit="create_new",  # not one that has failed before in this process
            # A run's provenance has the machine, the commit and the like, at no cost for each run.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self._remember(state="running")

    def log(self, rows: Sequence[Row]) -> None:
        def log() -> None:
            for row in rows:
                if row["step"] > self.note.get("step", -1):
                    time = {"_timestamp": row["time"]} if "time" in row else {}
                    values = {name: value for name, value in row.items() if name != "time"}
                    self.run.log({**values, **time}, step=int(row["step"]))
            if rows:
                self._remember(step=rows[-1]["step"])

        self._try(log)

    def finish(self, summary: dict[str, Any]) -> None:
        def finish() -> None:
            self.run.summary.update(results(summary))
            self._close("finished", 0)

        self._try(finish)

    def fail(self) -> None:
        self._try(lambda: self._close("failed", 1))

    def interrupt(self) -> None:
        self._try(lambda: self._close("interrupted", 1))

    def _close(self, state: str, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)
        self.run = None
        self._remember(state=state)

    def _remember(self, **news: Any) -> None:
        self.note |= news
        write_json(self.directory.path / NOTE, self.note)

    def _try(self, do: Any, *arguments: Any) -> None:
        """Do something with wandb; at its first failure say so, and leave it alone from then on."""
        if self.run is None and do != self._open:
            return
        try:
            do(*arguments)
        except Exception as error:  # whatever it is, the run matters more
            with contextlib.suppress(Exception):
                self.run.finish(exit_code=1)
            self.run = None
            reason = str(error).partition("\n")[0]
            print(f"wandb failed and is left out of this run: {reason}", file=sys.stderr)


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """What of a run's summary goes to the summary there."""
    made = summary["provenance"]
    found = {k: v for k, v in summary.items() if k.startswith("test_") or k == "objective"}
    found |= {name: summary[name] for name in ("train_loss", "diverged")}
    for level, values in enumerate(summary["hyperparameters"]):
        found |= {f"learned.{level}.{name}": value for name, value in values.items()}
    return found | {name: made[name] for name in ("seconds_per_step", "seconds", "finished")}


def read_note(directory: RunDirectory) -> dict[str, Any]:
    """What W&B was given of a run: how far it is (`state`), and the last `step`."""
    try:
        return json.loads((directory.path / NOTE).read_text())
    except (OSError, ValueError):
        return {}


@functools.lru_cache(maxsize=1)
def offline() -> bool:
    """Whether W&B keeps its files here: where it would otherwise have to ask for a key."""
    if (mode := os.environ.get("WANDB_MODE")) is not None:
        return mode == "offline"
    if os.environ.get("WANDB_API_KEY"):
        return False
    import wandb

    return not wandb.login(prompt=False, verify=False)


def say_how_to_sync(store: str | Path) -> None:
    """One line on standard error where W&B keeps its files in the store."""
    kept = [f"{folder}wandb/offline-run-*" for folder in ("*/", "")]
    there = [str(Path(store, files)) for files in kept if any(Path(store).glob(files))]
    if there and offline():
        print(
            "W&B has no key here and keeps its files; to upload them: "
            f"wandb sync {' '.join(there)}",
            file=sys.stderr,
        )


def push_results(folder: Path, store: Path, project: str) -> list[str]:
    """Put a folder's tables and figures there, an artifact for each study; returns the new ones.

    Which were put there before stands in `wandb-results.json` in the store.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/**/*.*")):
        study = path.relative_to(folder).parts[0]
        if path.is_file() and path.suffix != ".tmp" and study != "report":
            files.setdefault(study, []).append(path)
    digests = {name: _digest(paths) for name, paths in files.items()}
    try:
        known = json.loads((store / "wandb-results.json").read_text())
    except (OSError, ValueError):
        known = {}
    new = [name for name, digest in digests.items() if known.get(name) != digest]
    if not new:
        return []
    try:
        import wandb

        run = wandb.init(
            project=project,
            name="tables and figures",
            job_type="results",
            dir=str(store),
            mode="offline" if offline() else None,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        for name in new:
            artifact = wandb.Artifact(name, type="results")
            for path in files[name]:
                artifact.add_file(str(path), path.relative_to(folder / name).as_posix())
            run.log_artifact(artifact)
            pictures = [path for path in files[name] if path.suffix == ".png"]
            for path in pictures:
                shown = path.relative_to(folder).with_suffix("").as_posix()
                run.log({shown: wandb.Image(str(path))})
        run.finish()
    except Exception as error:  # whatever it is, the results are made
        print(f"wandb failed and has no artifacts of {folder}: {error}", file=sys.stderr)
        return []
    write_json(store / "wandb-results.json", digests)
    return new


def _digest(paths: Sequence[Path]) -> str:
    every = hashlib.sha256()
    for path in paths:
        every.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return every.hexdigest()


LOGGERS = {"wandb": WandbLogger}
