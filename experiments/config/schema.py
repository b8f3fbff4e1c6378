"""Typed configuration of a run. The files under configs/ have the values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from experiments.config.lr_schedules import ScheduleConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRECISIONS = ("float32", "bf16")


@dataclass
class ModelConfig:
    name: str = MISSING
    hidden: int | None = None  # units of each layer
    layers: int | None = None


@dataclass
class DataConfig:
    name: str = MISSING
    root: str = MISSING  # not part of the identity
    download: bool = MISSING  # not part of the identity
    shuffle: bool = True  # a new order of the images in every epoch; false keeps the file's order
    augment: bool = False  # random crops and flips; see experiments/tasks/classification.py
    validation: bool = False  # evaluate on a part of the training text, not on the test part


@dataclass
class StackConfig:
    """Either the notation of a stack, or a rule, a height and an lr that all its levels share."""

    notation: str | None = None  # of a stack or a peer; see experiments/config/baselines.py
    matrices: str | None = None  # a stack for the hidden matrices; see hyperopt.split_matrices
    rule: str | None = None
    height: int | None = None
    lr: float | None = None


@dataclass
class TrainerConfig:
    epochs: int = MISSING
    batch_size: int = MISSING
    record_every: int = MISSING  # steps between two records of the hyperparameters
    record_loss: bool = False  # record the batch's loss too
    compile: bool = MISSING  # the optimizer's step; compiled and eager differ in rounding
    compile_model: bool = MISSING  # the gradient; see experiments/tasks/compiled_gradient.py
    threads: int = MISSING  # of one run on a CPU; the number changes the rounding of sums
    steps: int | None = None  # of the whole run, at most; null is all of the epochs
    processes: int = 1  # that torchrun has started for this run
    sequence_length: int | None = None  # characters that a step reads from each stream of a text
    clip_value: float | None = None  # bound on each element of the gradient
    l2: float | None = None  # adds l2 / 2 times the squared norm of the weights to the loss
    checkpoint_every: int | None = None  # steps; null: only after each epoch. Not in the identity


@dataclass
class LoggerConfig:
    name: str = MISSING
    project: str | None = None  # of W&B and MLflow; null is WANDB_PROJECT or hyperopt


@dataclass
class Config:
    """The configuration of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stack: StackConfig = field(default_factory=StackConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = MISSING
    device: str = MISSING  # auto, cpu or cuda
    experiment: str | None = None  # the table or figure that this run belongs to
    preset: str | None = None  # of the experiment
    row: str | None = None  # of the table, or curve of the figure
    store: str = MISSING  # folder of the runs
    workers: int | None = None  # parallel runs; null is one for each core
    precision: str = "float32"  # or bf16: the forward pass in bfloat16, weights in float32
    progress: bool = True


ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: Any) -> Config:
    """Hydra's composed config as a `Config`."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config
