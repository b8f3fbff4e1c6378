"""The hash that identifies a run. It covers exactly the settings that decide the result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from experiments.config.lr_schedules import schedule_identity
from experiments.config.schema import Config


def identity(config: Config) -> dict[str, Any]:
    """Return the part of a resolved config that decides the run's result.

    Newer options are left out at their default, so that a new option keeps the hashes of earlier
    runs.
    """
    trainer = asdict(config.trainer)
    del trainer["checkpoint_every"]  # resuming does not change the result
    if config.precision != "float32":
        trainer["autocast"] = True  # the name in earlier versions, so that hashes stay
    for name in ("steps", "record_loss", "sequence_length", "clip_value", "l2"):
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
    if config.stack.matrices is not None:
        found["matrices"] = config.stack.matrices
    for name in ("augment", "validation"):
        if getattr(config.data, name):
            found[name] = True
    if not config.data.shuffle:
        found["shuffle"] = False
    if config.schedule.name != "constant":
        found["schedule"] = schedule_identity(config.schedule)
    return found


def run_hash(config: Config) -> str:
    """The hash of the run of a resolved config."""
    return identity_hash(identity(config))


def identity_hash(identity: dict[str, Any]) -> str:
    """16 hex digits of the sha256 of an identity's canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
