"""Resolve a config: choose the device, the data and the canonical stack, or raise an error."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel

from experiments.config import processes
from experiments.config.baselines import Baseline, parse
from experiments.config.lr_schedules import check_schedule
from experiments.config.schema import PRECISIONS, Config, StackConfig, TrainerConfig
from experiments.data import catalog
from experiments.tasks.catalog import task_for, tasks
from models import MODELS


def resolve_all(configs: list[Config]) -> list[Config]:
    """Find the data of all configs, then resolve the configs.

    It prints a banner if it finds other data than the config names.

    Raises:
        ValueError: an invalid value, in one line.
    """
    found: dict[tuple, str] = {}
    for config in configs:
        check_store(config.store)
        wanted = (config.data.name, config.data.root, config.data.download)
        if wanted not in found:
            found[wanted] = catalog.resolve(*wanted)
            if found[wanted] != config.data.name:
                banner(config, found[wanted])
    return [
        resolve(config, found[config.data.name, config.data.root, config.data.download])
        for config in configs
    ]


def banner(config: Config, found: str) -> None:
    """Print a banner: the run uses other data than its config names."""
    data = config.data
    text = catalog.find(data.name).warning(found, data.root, data.download)
    title = catalog.label(found)
    Console(stderr=True).print(Panel(text, title=title, border_style="bold red", expand=False))


def resolve(config: Config, data: str) -> Config:
    """Return `config` with the canonical stack, the kind of device, and the data set found.

    Args:
        data: the name of the data set, from `experiments.data.catalog.resolve`.

    Raises:
        ValueError: an invalid value, in one line.
    """
    if config.model.name not in MODELS:
        raise ValueError(f"model.name={config.model.name!r} is not one of {', '.join(MODELS)}")
    for name in ("epochs", "batch_size", "record_every", "threads"):
        if getattr(config.trainer, name) < 1:
            raise ValueError(f"trainer.{name}={getattr(config.trainer, name)} must be 1 or more")
    for name in ("steps", "checkpoint_every"):
        if (value := getattr(config.trainer, name)) is not None and value < 1:
            raise ValueError(f"trainer.{name}={value} must be 1 or more, or null")
    for name in ("clip_value", "l2"):
        value = getattr(config.trainer, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"trainer.{name}={value} must be a number above 0, or null")
    if config.workers is not None and config.workers < 1:
        raise ValueError(
            f"workers={config.workers} must be 1 or more, or null for a worker on each core"
        )
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must be 0 or more")
    stack = StackConfig(notation(config.stack), matrices(config))
    check_schedule(config.schedule, parse(stack.notation or ""))
    if config.precision not in PRECISIONS:
        raise ValueError(
            f"precision={config.precision!r} is not known; give {' or '.join(PRECISIONS)}"
        )
    kind = catalog.find(data).kind
    check_kind(config, kind)
    trainer = _trainer_of_processes(config, task_for(kind))
    return replace(
        config,
        trainer=trainer,
        stack=stack,
        data=replace(config.data, name=data),
        device=device_kind(config.device),
    )


def device_kind(device: str) -> str:
    """Choose the device; no other code does. "auto" is a GPU if torch sees one.

    Raises:
        ValueError: an unknown device, or no GPU for device=cuda.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r} is not known; give auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU; give device=cpu or device=auto")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def notation(stack: StackConfig) -> str:
    """The canonical notation of a config's stack.

    Raises:
        ValueError: the stack is given twice or incompletely, or its notation does not parse.
    """
    parts = {"stack.rule": stack.rule, "stack.height": stack.height, "stack.lr": stack.lr}
    given = [name for name, value in parts.items() if value is not None]
    if stack.notation is not None:
        if given:
            raise ValueError(
                f"stack={stack.notation!r} and {' and '.join(given)} are both given; give the "
                "notation, or stack.rule, stack.height and stack.lr"
            )
        return str(parse(stack.notation))
    if stack.rule is None or stack.height is None or stack.lr is None:
        missing = [name for name in parts if name not in given]
        raise ValueError(
            f"{' and '.join(missing)} of the stack is not set; give it, or a notation such as "
            "stack='Adam(0.001) / SGD(1e-5)'"
        )
    if stack.height < 0:
        raise ValueError(f"stack.height={stack.height} must be 0 (a plain optimizer) or more")
    return str(parse(" / ".join([f"{stack.rule}({stack.lr!r})"] * (stack.height + 1))))


def matrices(config: Config) -> str | None:
    """The canonical notation of the hidden matrices' own stack; None if they have none.

    Raises:
        ValueError: a schedule or a peer: neither supports param groups of different stacks.
    """
    if config.stack.matrices is None:
        return None
    for text in (config.stack.matrices, config.stack.notation):
        if isinstance(parse(text or "").levels[0], Baseline):
            raise ValueError(
                f"stack.matrices needs stacks of this project, but {text} is of another package"
            )
    if config.schedule.name != "constant":
        raise ValueError(
            f"stack.matrices needs schedule=constant, not schedule={config.schedule.name}"
        )
    return str(parse(config.stack.matrices))


def _trainer_of_processes(config: Config, task: Any) -> TrainerConfig:
    """The trainer's config with the number of processes that torchrun has started."""
    count, trainer = processes.size(), config.trainer
    if trainer.processes not in (1, count):
        raise ValueError(
            f"trainer.processes={trainer.processes}, but {count} are running; leave it out and "
            f"start with torchrun --nproc-per-node {trainer.processes} -m experiments.run"
        )
    if count == 1:
        return trainer
    if not task.distributed or trainer.checkpoint_every or trainer.record_loss:
        raise ValueError(
            "several processes can train on images only, and without trainer.checkpoint_every and "
            "trainer.record_loss; start without torchrun"
        )
    # DistributedDataParallel needs autograd's own backward pass.
    return replace(trainer, processes=count, compile_model=False)


def check_kind(config: Config, kind: str) -> None:
    """Raise a ValueError for a model or a value that does not fit data of this kind."""
    able = [name for name, model in MODELS.items() if model.reads == kind]
    if config.model.name not in able:
        raise ValueError(
            f"model.name={config.model.name!r} does not read {kind}; give model={' or '.join(able)}"
        )
    task = task_for(kind)
    sizes = [f"model.{name}" for name in MODELS[config.model.name].sizes]
    every = {f"model.{f.name}": None for f in fields(config.model) if f.name != "name"}
    for other in tasks():
        every |= other.keys
    for key, off in every.items():
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        if key in sizes or key in task.required:
            if value is None or value < 1:
                raise ValueError(f"{key}={value} must be 1 or more for {kind}")
        elif key not in task.keys and value != off:
            given, left_out = (str(v).lower() if isinstance(v, bool) else v for v in (value, off))
            hint = "leave it out" if off is None else f"give {key}={left_out}"
            raise ValueError(f"{key}={given} does not apply to {kind}; {hint}")
    task.check(config, kind)


def check_store(store: str) -> None:
    if not store:
        raise ValueError("store= is empty; give the folder of the runs, as in store=runs")
