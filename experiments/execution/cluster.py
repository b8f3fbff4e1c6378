"""Run a sweep on a Slurm cluster: queue its jobs, watch each one, adopt them in a later command.

submitit writes the jobs' scripts and runs them. The state of a job comes from its note and from
Slurm. `jobs.json` in the sweep's folder lists the jobs and their runs.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from omegaconf import open_dict

from experiments.cli import Terminated
from experiments.config.identity import run_hash
from experiments.config.resolve import resolve_all
from experiments.config.schema import Config, to_config
from experiments.execution.outcome import Outcome, here, note_of, read_note, returned
from experiments.files import write_json
from experiments.records.store import RunStore

JOBS = "jobs.json"
POLL = 2.0  # seconds between two queries to Slurm
TOLD = 30.0  # seconds, at most, between two progress lines
GRACE = 10.0  # seconds to wait for the note of a job that has ended
# Slurm's final states, in words.
ENDED = {
    "BOOT_FAIL": "its node did not boot",
    "CANCELLED": "it was cancelled",
    "COMPLETED": "it ended without a result",
    "DEADLINE": "its deadline passed",
    "FAILED": "its process failed",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it ran out of memory",
    "TIMEOUT": "it reached its time limit",
}
GONE = "GONE"


@dataclass
class Job:
    """A job with one run.

    Attributes:
        key: see `request_key`.
        folder, number: the place of its note; see `note_of`.
        log: the file of its standard error.
    """

    id: str
    key: str
    folder: str
    number: int
    log: str


def request_key(config: Config) -> str:
    """A hash of a requested run, before a machine resolves its device and data."""
    asked = asdict(config)
    for name in ("workers", "progress", "logger", "experiment", "preset", "row"):
        del asked[name]
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def launch(launcher: Any, overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Queue the jobs of a sweep that are neither finished nor queued, and wait for all jobs."""
    configs = [_config(launcher, one) for one in overrides]
    folder = Path(str(launcher.config.hydra.sweep.dir))
    outcomes = [Outcome(config) for config in configs]
    jobs = dict(enumerate(_adopted(configs, folder)))
    known = {k: job for k, job in jobs.items() if job is not None}
    for k, outcome in enumerate(outcomes):
        if k not in known:
            outcome.summary = _finished(outcome.config, launcher.params)
    new = [k for k, outcome in enumerate(outcomes) if k not in known and not outcome.summary]
    if known:
        told = ", ".join(job.id for job in known.values())
        print(f"{len(known)} queued jobs already have these runs: {told}", file=sys.stderr)
    if new:
        queued = _submit(launcher, [(overrides[k], first + k) for k in new])
        keys = {k: request_key(configs[k]) for k in new}
        for k, job in zip(new, queued, strict=True):
            log = str(job.paths.stderr)
            known[k] = Job(str(job.job_id), keys[k], str(folder), first + k, log)
        write_json(folder / JOBS, [asdict(known[k]) for k in new])
        _name({known[k].id: configs[k] for k in new})
        for k in new:
            print(f"job {known[k].id}: {_label(configs[k])}, log {known[k].log}", file=sys.stderr)
    here.extend(outcomes)
    _Watch({k: (job, outcomes[k]) for k, job in known.items()}, outcomes).run()
    (folder / JOBS).unlink(missing_ok=True)
    for note in folder.glob("job-*.json"):
        note.unlink()
    return returned(outcomes, overrides)


def is_live(folder: Path) -> bool:
    """Whether a job of a sweep's folder is waiting or running."""
    with suppress(OSError, ValueError):
        jobs = [Job(**job) for job in json.loads((folder / JOBS).read_text())]
        return any(state not in (*ENDED, GONE) for state, _ in states(jobs).values())
    return False


def states(jobs: Iterable[Job]) -> dict[str, tuple[str, str]]:
    """Slurm's state of each job, and the reason; GONE for a job that Slurm no longer lists."""
    ids = [job.id for job in jobs]
    known = {id: (GONE, "") for id in ids}
    if ids:
        form = ["--states=all", "--array", "--noheader", "--format=%i|%T|%r"]
        asked = ["squeue", *form, f"--jobs={','.join({id.partition('_')[0] for id in ids})}"]
        for line in _call(asked).splitlines():
            id, state, reason = line.split("|", 2)
            known |= {id: (state, reason)} if id in known else {}
    return known


def _call(command: Sequence[str], text: str | None = None) -> str:
    """The output of a Slurm command; empty if it fails, for example for an unlisted job."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _config(launcher: Any, overrides: Sequence[str]) -> Config:
    composed = launcher.hydra_context.config_loader.load_sweep_config(
        launcher.config, list(overrides)
    )
    with open_dict(composed):
        del composed["hydra"]
    return to_config(composed)


def _finished(config: Config, params: Any) -> dict[str, Any] | None:
    """The summary of a finished run, if this machine can resolve the run; else None."""
    gpus = any(params.get(name) for name in ("gpus_per_node", "gpus_per_task", "gres"))
    if config.device == "auto" and gpus:
        return None
    with suppress(Exception):  # this machine may lack data that the cluster has
        (resolved,) = resolve_all([config])
        return RunStore(config.store).finished(run_hash(resolved))
    return None


def _adopted(configs: Sequence[Config], folder: Path) -> list[Job | None]:
    """For each run, the waiting or running job of an earlier command; else None."""
    jobs: list[Job] = []
    for path in folder.parent.glob(f"*/{JOBS}"):
        with suppress(OSError, ValueError):
            jobs += [Job(**job) for job in json.loads(path.read_text())]
    now = states(jobs)
    live = {job.key: job for job in jobs if now[job.id][0] not in (*ENDED, GONE)}
    return [live.get(request_key(config)) for config in configs]


def _submit(launcher: Any, asked: Sequence[tuple[Sequence[str], int]]) -> list[Any]:
    import submitit

    own = ("max_num_timeout", "submitit_folder")
    base = ["timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes"]
    base += ["name", "stderr_to_stdout"]
    params = {
        name if name in base else f"slurm_{name}": value
        for name, value in launcher.params.items()
        if name not in own
    }
    folder = Path(str(launcher.config.hydra.sweep.dir))
    try:
        executor = submitit.AutoExecutor(
            cluster="slurm",
            folder=launcher.params["submitit_folder"],
            slurm_max_num_timeout=launcher.params["max_num_timeout"],
        )
        executor.update_parameters(**params)
        folder.mkdir(parents=True, exist_ok=True)
        state = Singleton.get_state()
        jobs = [(list(one), "hydra.sweep.dir", k, f"job_id_for_{k}", state) for one, k in asked]
        with redirect_stderr(io.StringIO()):  # the exception has sbatch's message
            return executor.map_array(launcher, *zip(*jobs, strict=True))
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        text = str(error)
        if 'detect "srun"' in text or isinstance(error, FileNotFoundError):
            text = "sbatch is not installed; give the command on a machine of the cluster"
        lines = [line for line in text.splitlines() if "error:" in line] or text.splitlines()[:1]
        raise ValueError(f"Slurm took no job: {lines[0].removeprefix('sbatch: error: ')}") from None


def _label(config: Config) -> str:
    stack = config.stack
    name = stack.notation or f"{stack.rule}({stack.lr}) height {stack.height}"
    return f"{config.row or name}, seed {config.seed}"


def _name(jobs: dict[str, Config]) -> None:
    """Name jobs after the sweep and the run."""
    lines = []
    for id, config in jobs.items():
        label = re.sub(r"[^\w.()-]+", "_", f"{config.experiment or 'sweep'}:{_label(config)}")
        lines.append(f"update JobId={id} JobName={label[:100]}")
    _call(["scontrol"], "\n".join([*lines, "quit", ""]))


class _Watch:
    """Waits for jobs, and prints their progress."""

    def __init__(self, jobs: dict[int, tuple[Job, Outcome]], outcomes: Sequence[Outcome]) -> None:
        self.left = dict(jobs)
        self.outcomes = outcomes
        self.ended: dict[int, float] = {}  # when a job without a note was first seen ended
        self.began = time.monotonic()
        self.told, self.told_at = "", 0.0

    def run(self) -> None:
        try:
            while self.left:
                self._look()
                if self.left:
                    time.sleep(POLL)
        except KeyboardInterrupt as interrupt:
            self._leave(interrupt)
            raise

    def _look(self) -> None:
        now = states(job for job, _ in self.left.values())
        for k, (job, outcome) in list(self.left.items()):
            state, reason = now[job.id]
            outcome.started |= state not in ("PENDING", "CONFIGURING")
            if _read_note(job, outcome):
                del self.left[k]
            elif state in (*ENDED, GONE):
                since = self.ended.setdefault(k, time.monotonic())
                if time.monotonic() - since > GRACE:
                    outcome.error = _why(job, state, reason)
                    del self.left[k]
            else:  # for example requeued
                self.ended.pop(k, None)
        counts = Counter(now[job.id][0].lower() for job, _ in self.left.values())
        finished = sum(outcome.summary is not None for outcome in self.outcomes)
        failed = sum(outcome.error is not None for outcome in self.outcomes)
        parts = [f"{finished} of {len(self.outcomes)} runs are finished"]
        parts += [f"{failed} failed"] * bool(failed)
        parts += [f"{n} {state}" for state, n in sorted(counts.items())]
        self._say(", ".join(parts))

    def _say(self, text: str) -> None:
        now = time.monotonic()
        show = all(outcome.config.progress for outcome in self.outcomes)
        if show and (text != self.told or now - self.told_at > TOLD):
            minutes, seconds = divmod(int(now - self.began), 60)
            print(f"[{minutes}:{seconds:02d}] {text}", file=sys.stderr, flush=True)
            self.told, self.told_at = text, now

    def _leave(self, interrupt: KeyboardInterrupt) -> None:
        """On an interrupt, cancel the jobs if the user wants it; else print how to cancel them."""
        ids = [job.id for job, _ in self.left.values()]
        cancel = f"scancel {' '.join(ids)}"
        if sys.stdin.isatty() and not isinstance(interrupt, Terminated):
            asked = f"\n{len(ids)} jobs are queued or running. Cancel them? [y/N] "
            with suppress(EOFError, KeyboardInterrupt):
                if input(asked).strip().lower().startswith("y"):
                    _call(["scancel", *ids])
                    for folder in {job.folder for job, _ in self.left.values()}:
                        Path(folder, JOBS).unlink(missing_ok=True)
                    print("The jobs are cancelled.", file=sys.stderr)
                    return
        print(
            f"\n{len(ids)} jobs continue without this command. To wait for them, give the same "
            f"command again. To cancel them: {cancel}",
            file=sys.stderr,
        )


def _read_note(job: Job, outcome: Outcome) -> bool:
    """Copy a job's final note into its outcome; returns whether the job has left one."""
    try:
        noted = read_note(note_of(Path(job.folder), job.number))
    except (OSError, ValueError):
        return False
    if noted.summary is None and noted.error is None:
        return False
    outcome.config, outcome.summary, outcome.error = noted.config, noted.summary, noted.error
    return True


def _why(job: Job, state: str, reason: str) -> str:
    """Slurm's reason for the end of a job, in words."""
    if state == GONE:  # Slurm's accounting, if enabled, remembers longer
        command = ["sacct", "-X", "--noheader", "--parsable2", "--format=State", "--jobs", job.id]
        state = _call(command).strip().partition(" ")[0] or GONE
    words = ENDED.get(state, "Slurm no longer lists it")
    with suppress(OSError):  # without control groups, Slurm reports out-of-memory as FAILED
        if state == "FAILED" and "memory limit" in Path(job.log).read_text():
            words = ENDED["OUT_OF_MEMORY"]
    more = f", {reason}" if reason not in ("", "None", "NonZeroExitCode") else ""
    return f"{words} (Slurm job {job.id}: {state}{more}); log {job.log}"
