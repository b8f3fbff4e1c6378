"""Weights & Biases logger: a run's records on a dashboard.

The W&B run has the hash as its id, so that a resumed run continues the same W&B run. A thread sends
the rows, so training does not wait. The store has all rows, so none is lost. At the start and the
end of a run, the logger asks the server how many rows it has. It sends missing rows at once, or
`experiments.records.push_wandb` sends them later. `wandb.json` in the run's directory has the
state. Offline, a finished run writes all rows to one file.

W&B's own variables keep their meaning: WANDB_MODE, WANDB_DIR, WANDB_PROJECT (if `logger.project` is
not set), WANDB_ENTITY, WANDB_TAGS and WANDB_RUN_GROUP.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import queue
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config.baselines import parse
from experiments.config.identity import identity, identity_hash
from experiments.config.schema import Config
from experiments.files import locked, write_json
from experiments.records.loggers.logger import Logger, Row, made_by, results
from experiments.records.store import RunDirectory

NOTE = "wandb.json"
SERVER = "wandb-server.json"  # in the store: whether the server has answered this command
PROJECT = "hyperopt"
LONGEST, LONGEST_TAG = 128, 64  # characters of a name and of a tag
PROBE = 3.0  # seconds for the one attempt to reach the server
PATIENCE = 60.0  # seconds that the end of a run waits for unsent rows
ASKING = 0.5  # seconds between two queries whether all rows have arrived
# Few retries: `push_wandb` can send the rest later.
RETRIES: Any = {
    "x_file_stream_retry_max": 3,
    "x_file_stream_retry_wait_max_seconds": 2.0,
    "x_file_stream_timeout_seconds": 10.0,
    "x_graphql_retry_max": 2,
    "x_graphql_retry_wait_max_seconds": 2.0,
    "x_graphql_timeout_seconds": 10.0,
    "init_timeout": 30.0,
    "finish_timeout": PATIENCE,
    "finish_timeout_raises": True,
}


class WandbLogger(Logger):
    """A W&B run. It never prompts, and its errors never fail the training run.

    Args:
        settings: the run's identity.
        made_by: see `made_by`.
        project: None is WANDB_PROJECT, or else `PROJECT`.
    """

    def __init__(
        self,
        directory: RunDirectory,
        settings: dict[str, Any],
        made_by: dict[str, Any],
        project: str | None,
    ) -> None:
        self.directory = directory
        self.described = describe(directory.hash, settings, made_by)
        self.project = project or os.environ.get("WANDB_PROJECT") or PROJECT
        self.offline = offline()
        self.rows: list[Row] = []
        self.queue: queue.Queue[Any] = queue.Queue()
        self.thread = threading.Thread(target=self._send, daemon=True)
        if not self.offline:
            self.thread.start()

    @classmethod
    def prepare(cls) -> None:
        if mode() == "disabled":
            return
        try:
            import wandb

            wandb.setup(wandb.Settings(silent=True))
        except Exception as error:  # each run tries again
            print(f"wandb could not be prepared: {error}", file=sys.stderr)

    @classmethod
    def publish(cls, results: Path, config: Config) -> None:
        if mode() != "disabled":
            push_results(results, Path(config.store), config.logger.project)
            say_how_to_sync(config.store)

    @classmethod
    def say_where(cls, config: Config) -> None:
        say_how_to_sync(config.store)

    @classmethod
    def of(cls, config: Config, directory: RunDirectory) -> Logger:
        if mode() == "disabled":
            return Logger()
        return cls(directory, identity(config), made_by(config), config.logger.project)

    def log(self, rows: Sequence[Row]) -> None:
        if self.offline:
            self.rows += rows
        elif rows:
            self.queue.put(list(rows))

    def finish(self, summary: dict[str, Any]) -> None:
        self._end("finished", summary)

    def fail(self) -> None:
        self._end("failed")

    def interrupt(self) -> None:
        self._end("interrupted")

    def _end(self, state: str, summary: dict[str, Any] | None = None) -> None:
        if self.offline:
            if summary is not None:
                self._write_file(summary)
            return
        self.queue.put((state, summary))
        self.thread.join(timeout=PATIENCE + 10)

    def _write_file(self, summary: dict[str, Any]) -> None:
        """Write the whole run to one offline file, and remove files of earlier attempts."""
        run: Any = None
        try:
            for folder in offline_files(self.directory):
                shutil.rmtree(folder)
            run = self._open(mode="offline")
            self._log(run, self.rows)
            run.summary.update({metric(k): v for k, v in results(summary).items()})
            run.finish(exit_code=0)
            self._note(state="kept")
        except Exception as error:  # the training run continues
            _abandon(run)
            self._complain(error)

    def _send(self) -> None:
        """Main function of the thread: send rows until the run ends."""
        if not is_reachable(self.directory.path.parent):
            self._note(state="unreachable")
            return
        try:
            run = self._open(mode=None)
        except Exception as error:
            forget_server(self.directory.path.parent)
            self._complain(error)
            return
        try:
            self._note(state="running", run=f"{run.entity}/{run.project}/{run.id}")
            first, last = run.starting_step, -1  # the server has all steps before `first`
            while not isinstance(item := self.queue.get(), tuple):
                last = max([last, *(int(row["step"]) for row in item)])
                self._log(run, [row for row in item if row["step"] >= first])
            state, summary = item
            if summary is not None:
                run.summary.update({metric(k): v for k, v in results(summary).items()})
            if state == "interrupted":
                run.mark_preempting()
            run.finish(exit_code=0 if state == "finished" else 1)
            complete = has(read_note(self.directory)["run"], last)
            self._note(state=state if complete else "incomplete")
        except Exception as error:
            _abandon(run)
            self._note(state="incomplete")
            self._complain(error)

    def _open(self, mode: str | None) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            id=self.directory.hash,
            resume="allow",
            **self.described,
            dir=os.environ.get("WANDB_DIR") or str(self.directory.path),
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",  # an earlier run of this process may have failed
            # A run's provenance already has the machine and the commit.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                **RETRIES,
            ),
        )

    def _log(self, run: Any, rows: Sequence[Row]) -> None:
        for row in rows:
            told = {"_timestamp": row["time"]} if "time" in row else {}
            told |= {metric(name): value for name, value in row.items() if name != "time"}
            run.log(told, step=int(row["step"]))

    def _note(self, **news: Any) -> None:
        write_json(self.directory.path / NOTE, read_note(self.directory) | news)

    def _complain(self, error: Exception) -> None:
        reason = str(error).partition("\n")[0]
        print(f"wandb failed and is left out of this run: {reason}", file=sys.stderr)


def _abandon(run: Any) -> None:
    with contextlib.suppress(Exception):
        run.finish(exit_code=1)


def describe(name: str, settings: dict[str, Any], made_by: dict[str, Any]) -> dict[str, Any]:
    """The name, group, tags and config of a run; runs of a group differ in the seed only."""
    stack = parse(settings["stack"])
    rule, trainer = stack.levels[0].name, settings["trainer"]
    model, data = settings["model"]["name"], settings["data"]
    setting = identity_hash({k: v for k, v in settings.items() if k != "seed"})[:6]
    schedule = settings.get("schedule", {}).get("name")
    sizes = f"{trainer['epochs']} epochs, batch {trainer['batch_size']}"
    where = f"{model} on {data}, {sizes}{f', {schedule}' if schedule else ''}"
    row = made_by.get("row") or str(stack)
    group = f"{made_by.get('experiment') or 'run'}: {stack}, {where}"
    tags = [rule, f"height {stack.height}", data, model, schedule, made_by.get("preset")]
    tags += [f"{trainer['epochs']} epochs", f"batch {trainer['batch_size']}", f"setting {setting}"]
    tags += (os.environ.get("WANDB_TAGS") or "").split(",")
    own = {name: value for name, value in made_by.items() if value is not None}
    return {
        "name": _short(f"{row}, {where}", f", seed {settings['seed']} ({name[:6]})"),
        "group": os.environ.get("WANDB_RUN_GROUP") or _short(group, f" ({setting})"),
        "job_type": f"seed {settings['seed']}",
        "tags": list(dict.fromkeys(tag[:LONGEST_TAG] for tag in tags if tag)),
        "config": {
            **{**settings, **own, "rule": rule, "height": stack.height, "setting": setting},
            "lr": stack.levels[0].values.get("lr"),
        },
    }


def _short(text: str, end: str) -> str:
    return text[: LONGEST - len(end)] + end


def metric(name: str) -> str:
    """Convert a metric's name to W&B's letters, digits and underscores: 0.lr becomes level0_lr."""
    text = re.sub(r"(^|\.)(\d+)\.", lambda found: f"{found[1]}level{found[2]}.", name)
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")


def read_note(directory: RunDirectory) -> dict[str, Any]:
    """Read the W&B state of a run.

    `state` is "finished" if the server has confirmed all rows, and "kept" if an offline file has
    them; otherwise, rows must be pushed. `run` is the run's entity, project and id.
    """
    try:
        return json.loads((directory.path / NOTE).read_text())
    except (OSError, ValueError):
        return {}


def is_there(directory: RunDirectory) -> bool:
    """Whether W&B has the whole run: on the server or, in offline mode, in a file."""
    note = read_note(directory)
    state = note.get("state")
    return (state == "finished" and "run" in note) or (state == "kept" and offline())


def offline_files(directory: RunDirectory) -> list[Path]:
    """The folders of a run's offline files."""
    root = Path(os.environ.get("WANDB_DIR") or directory.path)
    return sorted(root.glob(f"wandb/offline-run-*-{directory.hash}"))


def has(run: str, step: int) -> bool:
    """Whether the server has the history of a run up to a step; it asks for a few seconds."""
    import wandb

    for _ in range(5):
        if wandb.Api(timeout=5).run(run).lastHistoryStep >= step:
            return True
        time.sleep(ASKING)
    return False


def is_reachable(store: Path) -> bool:
    """Whether the server answers; all runs of a command share one attempt through a file."""
    import wandb

    command = os.environ.get("HYPEROPT_COMMAND") or str(os.getpid())
    url = wandb.setup().settings.base_url
    asked = {"command": command, "url": url}
    with locked(store):
        try:
            known = json.loads((store / SERVER).read_text())
            if {name: known[name] for name in asked} == asked:
                return known["reachable"]
        except (OSError, ValueError, KeyError):
            pass
        try:
            urllib.request.urlopen(url, timeout=PROBE).close()
            reachable = True
        except urllib.error.HTTPError as error:
            reachable = error.code < 500
        except (OSError, ValueError):
            reachable = False
        write_json(store / SERVER, {**asked, "reachable": reachable})
    if not reachable:
        print(f"W&B at {url} does not answer; {LATER.format(store)}", file=sys.stderr)
    return reachable


def forget_server(store: Path) -> None:
    """Mark the server as unreachable for the other runs of this command."""
    known = json.loads((store / SERVER).read_text())
    write_json(store / SERVER, {**known, "reachable": False})


LATER = "the rows are kept; to send them: python -m experiments.records.push_wandb store={}"


def mode() -> str:
    """W&B's mode: "online", "offline" or "disabled"; offline without a key."""
    if (given := os.environ.get("WANDB_MODE")) is not None:
        return {"dryrun": "offline"}.get(given, given)
    return "online" if has_key() else "offline"


def offline() -> bool:
    """Whether W&B writes local files only."""
    return mode() == "offline"


@functools.lru_cache(maxsize=1)
def has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def say_how_to_sync(store: str | Path) -> None:
    """If W&B is offline and has written files, print on standard error how to upload them."""
    if not offline():
        return
    if os.environ.get("WANDB_DIR"):
        kept = [f"{os.environ['WANDB_DIR']}/wandb/offline-run-*"]
    else:
        kept = [str(Path(store, f"{folder}wandb/offline-run-*")) for folder in ("*/", "")]
    found = [files for files in kept if any(Path("/").glob(str(Path(files).absolute())[1:]))]
    if found:
        why = "WANDB_MODE is offline" if "WANDB_MODE" in os.environ else "W&B has no key"
        print(
            f"{why}, so its files are kept here; to upload them: wandb sync {' '.join(found)}",
            file=sys.stderr,
        )


def push_results(folder: Path, store: Path, project: str | None) -> list[str]:
    """Upload a folder's tables and figures, an artifact for each study; returns the new ones.

    `wandb-results.json` in the store has the checksums of earlier uploads.
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
            project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name="tables and figures",
            job_type="results",
            dir=os.environ.get("WANDB_DIR") or str(store),
            mode="offline" if offline() else None,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", **RETRIES),
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
    except Exception as error:  # the results exist without W&B
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
