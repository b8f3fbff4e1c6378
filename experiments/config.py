"""What a run is: its typed configuration, and the hash that identifies it.

The dataclasses give the types, the files under configs/ the values. What decides a run's result
(model, data, stack, trainer, seed, kind of device) is hashed; what does not (folders, logger,
progress, number of workers) is not, so that a result is found again wherever it was computed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from models import MODELS

from . import together
from .book import is_book
from .peers import parse
from .schedule import ScheduleConfig, check_schedule, schedule_identity

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass
class ModelConfig:
    name: str = MISSING
    hidden: int | None = None  # units of each layer of char_rnn
    layers: int | None = None  # of char_rnn


@dataclass
class DataConfig:
    name: str = MISSING
    root: str = MISSING  # not part of the identity
    download: bool = MISSING  # not part of the identity
    shuffle: bool = True  # images in a new order in every epoch; else in that of the file
    augment: bool = False  # random crops and flips; see experiments/images.py
    validation: bool = False  # judge on a part of the training text, not on the test part


@dataclass
class StackConfig:
    """Either the notation of a stack, or a rule, a height and an lr that all its levels share."""

    notation: str | None = None  # or that of a peer; see experiments/peers.py
    rule: str | None = None
    height: int | None = None
    lr: float | None = None


@dataclass
class TrainerConfig:
    epochs: int = MISSING
    batch_size: int = MISSING
    record_every: int = MISSING  # steps between two records of the hyperparameters
    record_loss: bool = False  # beside them, that of the batch of the step
    compile: bool = MISSING  # the optimizer's step; compiled and eager differ in rounding
    compile_model: bool = MISSING  # the gradient; see experiments/gradient.py
    threads: int = MISSING  # of one run on a CPU; their number changes the rounding of sums
    steps: int | None = None  # where the last epoch ends early; null is at the end of the data
    processes: int = 1  # that do the run together; torchrun says how many
    autocast: bool = False  # the model in bfloat16, as torch.autocast has it
    sequence_length: int | None = None  # characters of a text that a step reads of each stream
    clip_value: float | None = None  # what no element of the gradient exceeds
    l2: float | None = None  # times half the squared norm of the weights is added to the loss
    checkpoint_every: int | None = None  # steps; null is at the end of an epoch alone. Not identity


@dataclass
class LoggerConfig:
    name: str = MISSING
    project: str = "hyperopt"


@dataclass
class Config:
    """Everything about one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stack: StackConfig = field(default_factory=StackConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = MISSING
    device: str = MISSING  # auto, cpu or cuda
    experiment: str | None = None  # the table or figure that this run belongs to
    preset: str | None = None  # the one of its presets
    row: str | None = None  # the row or curve in it
    store: str = MISSING  # folder of the runs
    workers: int | None = None  # runs side by side; null is one for each core
    progress: bool = True


ConfigStore.instance().store(name="schema", node=Config)


def compose(overrides: Sequence[str]) -> Config:
    """The config that the command line `overrides` would give.

    Raises:
        ValueError: an unknown key or value, in one line.
    """
    GlobalHydra.instance().clear()
    overrides = protect_notation(overrides)
    check_overrides(overrides)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return to_config(hydra_compose("config", overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from None


def one_line(error: Exception) -> str:
    """What Hydra or OmegaConf has against a command line, with its reason and what is near."""
    reasons = [error, *([error.__cause__] if error.__cause__ else [])]
    text = ": ".join(str(reason).splitlines()[0] for reason in reasons)
    if "INTERVAL_SWEEP" in text:
        return f"{text}; give hydra/sweeper=optuna"
    node = getattr(reasons[-1], "parent_node", None)  # of a key that is not in it
    if isinstance(reasons[-1], (ConfigAttributeError, ConfigKeyError)) and node is not None:
        return f"{text}; {_meant(str(reasons[-1].key), list(node))}"
    _, _, files = str(error).partition("Available options in")
    if files:
        name = text.rpartition("/")[2].strip("'")
        there, _, _ = files.partition("Config search path")
        return f"{text}; {_meant(name, there.split()[1:])}"
    return text


def to_config(composed: Any) -> Config:
    """Hydra's composed config as a `Config`."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


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


def _trainer_of_processes(config: Config, data: str) -> TrainerConfig:
    """The trainer, with as many processes as torchrun has started."""
    count, trainer = together.size(), config.trainer
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


def identity(config: Config) -> dict[str, Any]:
    """The part of a resolved config that decides the run's result.

    What is left at a default that changes nothing is left out, so that a new option leaves the
    hashes of earlier runs alone.
    """
    trainer = asdict(config.trainer)
    del trainer["checkpoint_every"]  # a run that is resumed ends as if it had not been
    for name in ("steps", "autocast", "record_loss", "sequence_length", "clip_value", "l2"):
        if not trainer[name]:
            del trainer[name]
    if config.trainer.processes == 1:
        del trainer["processes"]
    found = {
        "model": {name: value for name, value in asdict(config.model).items() if value is not None},
        "data": config.data.name,
        "stack": config.stack.notation,
        "trainer": trainer,
        "seed": config.seed,
        "device": config.device,
    }
    for name in ("augment", "validation"):
        if getattr(config.data, name):
            found[name] = True
    if not config.data.shuffle:
        found["shuffle"] = False
    if config.schedule.name != "constant":
        found["schedule"] = schedule_identity(config.schedule)
    return found


def run_hash(config: Config) -> str:
    """The hash that names the run of a resolved config."""
    return identity_hash(identity(config))


def identity_hash(identity: dict[str, Any]) -> str:
    """16 hex digits of the sha256 of an identity's canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# The command line.

HYDRAS_GROUPS = tuple(
    f"hydra/{name}" for name in ("launcher", "sweeper", "sweeper/sampler", "help")
)


def protect_notation(arguments: Sequence[str]) -> list[str]:
    """Quote the stacks on a command line, which Hydra's grammar would read as function calls.

    ``stack=SGD(0.01) / SGD(0.01),Adam(0.001)`` becomes ``stack=notation`` (the file of the group
    that leaves the rest unset) and ``stack.notation="SGD(0.01) / SGD(0.01)","Adam(0.001)"``: commas
    outside brackets separate the values of a sweep, as elsewhere in Hydra. ``stack=tower``, which
    has no bracket, stays as it is.
    """
    protected = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in ("stack", "stack.notation") or "(" not in value:
            protected.append(argument)
            continue
        stacks, depth = [""], 0
        for character in value:
            depth += (character in "([{") - (character in ")]}")
            if character == "," and depth == 0:
                stacks.append("")
            else:
                stacks[-1] += character
        quoted = [stack if stack[:1] in ("'", '"') else f'"{stack.strip()}"' for stack in stacks]
        protected += ["stack=notation", f"stack.notation={','.join(quoted)}"]
    return protected


def check_overrides(arguments: Sequence[str]) -> None:
    """Raise a ValueError that names what is near, for a key or a file of a group that is not there.

    What Hydra knows of itself, and values in more than words and commas, are left for it to judge.
    """
    groups = {folder.name: folder for folder in CONFIGS.iterdir() if folder.is_dir()}
    known = [*_keys(Config), *HYDRAS_GROUPS]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.lstrip("+~").partition("@")[0]
        if argument.startswith("-") or not (equals or argument.startswith("~")):
            continue
        if key not in known and not key.startswith("hydra."):
            raise ValueError(f"there is no config key {key!r}; {_meant(key, known)}")
        if key in groups and re.fullmatch(r"[\w.,-]+", value):
            files = sorted(path.stem for path in groups[key].glob("*.yaml"))
            for name in value.split(","):
                if name not in (*files, "null"):
                    raise ValueError(f"there is no {key} {name!r}; {_meant(name, files)}")


def _meant(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for f in fields(cls):
        yield prefix + f.name
        if is_dataclass(hints[f.name]):
            yield from _keys(hints[f.name], f"{prefix}{f.name}.")
