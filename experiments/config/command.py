"""Build the command line of a single run."""

from __future__ import annotations

import functools
import shlex
import string
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from experiments.config.compose import compose
from experiments.config.schema import CONFIGS, Config

# Keys that a single run does not need.
ELSEWHERE = ("workers", "progress", "trainer.processes", "experiment")

WORD = string.ascii_letters + string.digits + "_-./"


def command_of(config: Config) -> str:
    """Return the shortest command for a config: only the keys that differ from the defaults.

    A group's file with the run's values (`model=char_rnn`) replaces the single keys.
    """
    flat = dict(_flat(config))
    overrides: list[str] = []
    for group in ("experiment", *(f.name for f in fields(Config))):
        name = flat.get(f"{group}.name", flat.get(group))
        is_file = isinstance(name, str) and (CONFIGS / group / f"{name}.yaml").exists()
        with suppress(ValueError):  # the file needs a value from the command line
            if is_file and name != _composed(tuple(overrides)).get(f"{group}.name"):
                _composed((*overrides, f"{group}={name}"))
                overrides.append(f"{group}={name}")
    if config.stack.notation is not None:
        overrides.append(f"stack={config.stack.notation}")
    known = _composed(tuple(overrides))
    left = [key for key in flat if flat[key] != known[key] and key not in ELSEWHERE]
    overrides += [f"{key}={_quoted(flat[key])}" for key in left]
    return shlex.join(["python", "-m", "experiments.run", *dict.fromkeys(overrides)])


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return dict(_flat(compose(overrides)))


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def _quoted(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_quoted, value))}]"
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    text = str(value)
    if text and not set(text) - set(WORD):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
