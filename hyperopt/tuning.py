"""Declarations of a rule: hyperparameters, options, and how the level above moves them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .domains import DOMAINS, REAL, SQUARE, Domain


@dataclass(frozen=True)
class Hyper:
    """Declare a hyperparameter of a rule. The attribute of an instance is its initial value.

    Attributes:
        default: its value if none is given.
        domain: the domain in which the level above moves it.
        tuned: whether the level above moves it if the stack names no subset. A hyperparameter that
            is 0 by default is moved only if it was given a value.
        low, high: legal values are low <= value < high.
    """

    default: float
    domain: Domain = REAL
    tuned: bool = True
    low: float = 0.0
    high: float = math.inf
    name: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __get__(self, rule: Any, owner: type) -> Any:
        return self if rule is None else rule.values.get(self.name, self.default)

    def check(self, rule: str, value: Any) -> float:
        """Convert a value to a legal number.

        Raises:
            ValueError: it is not a number, or is outside the legal range.
        """
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
            raise ValueError(f"{rule}: {self.name} must be a number, not {value!r}") from None
        if not self.low <= number < self.high:
            interval = f"[{self.low:g}, {self.high:g})"
            raise ValueError(f"{rule}: {self.name} must lie in {interval}, but is {number:g}")
        return number


@dataclass(frozen=True)
class Option:
    """Declare a constant that no level moves: a switch, or an initial value of the state.

    Attributes:
        default: its value if none is given. Other values must have the same type.
        low: the lowest legal value of a number.
        choices: the legal values of a string; if empty, all strings are legal.
    """

    default: Any
    low: float = -math.inf
    name: str = ""
    choices: tuple[str, ...] = ()

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __get__(self, rule: Any, owner: type) -> Any:
        return self if rule is None else rule.settings[self.name]

    def check(self, rule: str, value: Any) -> Any:
        """Convert a value to the type of the default.

        Raises:
            ValueError: it has another type, is too low, or is not one of the choices.
        """
        expected = type(self.default)
        # The notation does not distinguish int from float.
        number = isinstance(value, Real) and not isinstance(value, bool)
        whole = number and float(value).is_integer()
        if (number and expected is float) or (whole and expected is int):
            value = expected(value)
        elif expected in (int, float) or not isinstance(value, expected):
            kind = "an int" if expected is int else f"a {expected.__name__}"
            raise ValueError(f"{rule}: {self.name} must be {kind}, not {value!r}")
        if self.low > -math.inf and not value >= self.low:
            raise ValueError(f"{rule}: {self.name} must be {self.low:g} or more, but is {value!r}")
        if self.choices and value not in self.choices:
            hint = did_you_mean(value, self.choices)
            raise ValueError(f"{rule}: {self.name} cannot be {value!r}; {hint}")
        return value


SCOPES = ("run", "group", "tensor", "element")


@dataclass(frozen=True)
class Tuning:
    """How the level above moves a hyperparameter.

    Attributes:
        domain: the domain in which it is moved.
        low, high: bounds of its value, in addition to those of the domain.
        per: its scope: one value for the whole run, for each param group, for each tensor, or for
            each element of each tensor.
    """

    domain: Domain
    low: float = -math.inf
    high: float = math.inf
    per: str = "run"

    @classmethod
    def parse(cls, text: str, default: Domain) -> Tuning:
        """Read a tuning such as ``"log from 1e-6 to 1 per tensor"``. Every part is optional.

        Args:
            text: the tuning.
            default: the domain if ``text`` names none.

        Raises:
            ValueError: the text has an error. The message is one line.
        """
        words = text.split()
        domain = default
        if words and words[0] not in ("from", "to", "per"):
            if words[0] not in DOMAINS:
                raise ValueError(
                    f"there is no domain {words[0]!r}; {did_you_mean(words[0], DOMAINS)}"
                )
            domain = DOMAINS[words.pop(0)]
        given = dict(zip(words[::2], words[1::2], strict=False))
        try:
            low, high = float(given.get("from", -math.inf)), float(given.get("to", math.inf))
            if len(given) * 2 != len(words) or given.keys() - {"from", "to", "per"}:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{text!r} does not say how to tune; expected "
                "[domain] [from NUMBER] [to NUMBER] [per run|group|tensor|element]"
            ) from None
        per = given.get("per", "run")
        if per not in SCOPES:
            raise ValueError(f"there is no scope {per!r}; {did_you_mean(per, SCOPES)}")
        if not low < high:
            raise ValueError(f"from {low:g} to {high:g} leaves no values between")
        for number in (low, high):
            if math.isfinite(number) and number not in domain:
                raise ValueError(f"{number:g} is not in the {domain.name} domain")
        return cls(domain, low, high, per)

    def __contains__(self, value: float) -> bool:
        return value in self.domain and self.low <= value <= self.high

    @property
    def raw_bounds(self) -> tuple[float, float]:
        """The lowest and the highest raw value."""
        reach = self.domain.reach
        high = min(reach, self.domain.raw(self.high)) if math.isfinite(self.high) else reach
        if math.isfinite(self.low):
            return max(-reach, self.domain.raw(self.low)), high
        return (-high if self.domain is SQUARE else -reach), high

    def format(self, default: Domain) -> str:
        """Write the tuning for `parse`, without ``default``, the default domain."""
        words = [] if self.domain is default else [self.domain.name]
        words += [f"from {format_value(self.low)}"] if math.isfinite(self.low) else []
        words += [f"to {format_value(self.high)}"] if math.isfinite(self.high) else []
        words += [f"per {self.per}"] if self.per != "run" else []
        return " ".join(words)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: a guess at the word that was meant, or all known words."""
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), folded)
    if not close:
        return f"known are {', '.join(folded.values())}"
    # "Adma" is as near to Adamax as to Adam, but people swap letters more often than they drop two.
    best = min(close, key=lambda name: abs(len(name) - len(word)))
    return f"did you mean {folded[best]!r}?"


def likely_typo(word: str, known: Iterable[str]) -> str | None:
    """The known word that this word probably misspells, or None."""
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), folded, cutoff=0.8)
    return next((folded[name] for name in close if abs(len(name) - len(word)) <= 2), None)


def format_value(value: Any) -> str:
    """Write a number, a bool, a word or a dict of numbers in the notation."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {format_value(one)}" for name, one in value.items()) + "}"
    return repr(value).replace("e-0", "e-")
