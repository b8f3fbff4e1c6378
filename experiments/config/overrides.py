"""Prepare and check the command line of `experiments.run` before Hydra reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from experiments.cli import did_you_mean
from experiments.config.schema import CONFIGS, Config
from hyperopt import RULES

HYDRAS_GROUPS = tuple(
    f"hydra/{name}" for name in ("launcher", "sweeper", "sweeper/sampler", "help")
)

# The plugin's launcher stops at the first job that fails; ours waits for all jobs.
RENAMED = {"hydra/launcher=submitit_slurm": "hydra/launcher=slurm"}


def protect_notation(arguments: Sequence[str]) -> list[str]:
    """Quote the stacks on a command line, because Hydra's grammar reads them as function calls.

    ``stack=SGD(0.01) / SGD(0.01),Adam(0.001)`` becomes ``stack=notation`` (the config file without
    the other keys) and ``stack.notation="SGD(0.01) / SGD(0.01)","Adam(0.001)"``. As elsewhere in
    Hydra, commas outside brackets separate the values of a sweep. ``stack=tower`` has no bracket
    and stays unchanged. ``logger=[csv,wandb]`` becomes ``logger.name="csv,wandb"``.
    """
    protected = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "logger" and (several := re.fullmatch(r"\[([\w, ]+)\]", value)):
            names = ",".join(name.strip() for name in several[1].split(","))
            protected += ["logger=csv", f'logger.name="{names}"']
            continue
        if key not in ("stack", "stack.notation", "stack.matrices") or "(" not in value:
            protected.append(RENAMED.get(argument, argument))
            continue
        stacks, depth = [""], 0
        for character in value:
            depth += (character in "([{") - (character in ")]}")
            if character == "," and depth == 0:
                stacks.append("")
            else:
                stacks[-1] += character
        quoted = [stack if stack[:1] in ("'", '"') else f'"{stack.strip()}"' for stack in stacks]
        if key == "stack.matrices":
            protected.append(f"{key}={','.join(quoted)}")
        else:
            protected += ["stack=notation", f"stack.notation={','.join(quoted)}"]
    return protected


def check_overrides(arguments: Sequence[str]) -> None:
    """Raise a ValueError with a suggestion for an unknown key or an unknown file of a group.

    Hydra itself checks its own keys, and values with other characters than words and commas.
    """
    groups = {folder.name: folder for folder in CONFIGS.iterdir() if folder.is_dir()}
    known = [*_keys(Config), *HYDRAS_GROUPS]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.lstrip("+~").partition("@")[0]
        if argument.startswith("-") or not (equals or argument.startswith("~")):
            continue
        if key not in known and not key.startswith("hydra."):
            raise ValueError(f"there is no config key {key!r}; {did_you_mean(key, known)}")
        if key == "stack" and value and "(" not in value and not re.fullmatch(r"[\w.,-]+", value):
            raise ValueError(not_a_stack(value))
        if key in groups and re.fullmatch(r"[\w.,-]+", value):
            files = sorted(path.stem for path in groups[key].glob("*.yaml"))
            for name in value.split(","):
                if name not in (*files, "null"):
                    if key == "stack":
                        raise ValueError(not_a_stack(name))
                    raise ValueError(f"there is no {key} {name!r}; {did_you_mean(name, files)}")


def not_a_stack(text: str) -> str:
    """Describe how to write a stack, for a text that is not one."""
    rules = {name.lower(): name for name in RULES}
    words = re.findall(r"[a-z]\w*", text.lower())
    names = [rules[word] for word in words if word in rules] or ["SGD"]
    stack = " / ".join(f"{name}({0.01 if k == 0 else 1e-4})" for k, name in enumerate(names))
    return (
        f"there is no stack {text!r}; give each rule its learning rate, as in stack='{stack}', "
        f"or give all levels one rule and lr: stack.rule={names[0]} "
        f"stack.height={len(names) - 1} stack.lr=0.01"
    )


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for f in fields(cls):
        yield prefix + f.name
        if is_dataclass(hints[f.name]):
            yield from _keys(hints[f.name], f"{prefix}{f.name}.")
