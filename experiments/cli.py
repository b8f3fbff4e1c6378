"""Shared by all commands: help, `key=value` options, one-line errors."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import HydraException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

ROOT = Path(__file__).resolve().parents[1]

Options = TypeVar("Options")


@dataclass(frozen=True)
class ResultsOptions:
    """Options of a command that only needs the folder of results."""

    results: str = "results"


def asked_for_help(
    doc: str | None,
    kind: type,
    settable: Sequence[str] = (),
    arguments: Sequence[str] | None = None,
) -> bool:
    """Print `doc` and all options if the command line asks for help; returns whether it does.

    Args:
        kind, settable: see `split`.
        arguments: by default, those of the command line.
    """
    if not set(sys.argv[1:] if arguments is None else arguments) & {"-h", "--help"}:
        return False
    print(doc)
    defaults = vars(kind()).items()
    options = (f"{key}={value if value.isprintable() else repr(value)}" for key, value in defaults)
    told = {"Options, with their defaults": " ".join(options)}
    if settable:
        told["Keys of its runs, as in python -m experiments.run --help"] = ", ".join(settable)
    for head, text in told.items():
        print(f"{head}:")
        print(textwrap.indent(textwrap.fill(text, 90, break_on_hyphens=False), "    "))
    return True


def split(
    arguments: Sequence[str], kind: type[Options], settable: Sequence[str]
) -> tuple[Options, list[str]]:
    """Split a command line into the command's own options and the overrides of its runs.

    Args:
        kind: a dataclass of strings, the options with their defaults.
        settable: the keys of the runs' config that the command line may set.

    Raises:
        ValueError: an unknown option, in one line.
    """
    own, overrides = {}, []
    known = [*(f.name for f in fields(kind)), *settable]  # type: ignore[arg-type]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            hint = did_you_mean(key, known)
            raise ValueError(f"{argument!r} is not an option of this command, as key=value; {hint}")
        if key in settable:
            overrides.append(argument)
        else:
            own[key] = value
    return kind(**own), overrides


def number(options: Any, name: str, kind: type = int) -> Any:
    """Return an option as an int or a float.

    Raises:
        ValueError: its text is not such a number.
    """
    text = getattr(options, name)
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}={text!r} is not {what}") from None


def choose(name: str, value: str, known: Sequence[str]) -> str:
    """Return `value`.

    Raises:
        ValueError: it is not in `known`.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    return value


def choose_all(name: str, text: str, known: Sequence[str]) -> list[str]:
    """Split a text such as "a,b" into values, which must be in `known`; an empty text is all."""
    return [choose(name, one, known) for one in text.split(",")] if text else list(known)


def seed_list(text: str) -> list[int]:
    """Parse seeds such as "0,1,2"."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds={text!r} is not a list of numbers such as 0,1,2") from None
    if len({*seeds}) < len(seeds):
        raise ValueError(f"seeds={text!r} has a seed twice; give each seed once")
    return seeds


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which is handled like Ctrl-C."""


def _terminate(*_: object) -> None:
    raise Terminated


def guarded(main: Callable[[], int]) -> int:
    """Call `main` and return the exit status.

    A user error prints one line and returns 2. Ctrl-C prints a hint and returns 130; SIGTERM does
    the same and returns 143. The environment variable HYPEROPT_COMMAND identifies this command in
    all its processes.
    """
    os.environ["HYPEROPT_COMMAND"] = f"{time.time_ns():x}-{os.getpid()}"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return main()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # for example `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(
            "\nInterrupted. Finished work is kept; give the same command again to continue.",
            file=sys.stderr,
        )
        return 143 if isinstance(interrupt, Terminated) else 130


def one_line(error: Exception) -> str:
    """Turn an error of Hydra or OmegaConf into one line with its reason and a suggestion."""
    reasons = [error, *([error.__cause__] if error.__cause__ else [])]
    text = ": ".join(str(reason).splitlines()[0] for reason in reasons)
    if "INTERVAL_SWEEP" in text:
        return f"{text}; give hydra/sweeper=optuna"
    if "Ambiguous value" in text or "requires --multirun" in text:
        return f"{text}; for a sweep over several values give -m, as in: experiments.run -m ..."
    node = getattr(reasons[-1], "parent_node", None)  # set if the key is unknown
    if isinstance(reasons[-1], (ConfigAttributeError, ConfigKeyError)) and node is not None:
        return f"{text}; {did_you_mean(str(reasons[-1].key), list(node))}"
    _, _, files = str(error).partition("Available options in")
    if files:
        name = text.rpartition("/")[2].strip("'")
        listed, _, _ = files.partition("Config search path")
        return f"{text}; {did_you_mean(name, listed.split()[1:])}"
    return text


def did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
