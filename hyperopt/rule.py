"""What a rule is: its hyperparameters, its options and one pure ``update``.

The rules themselves, and what their ``update`` may rely on, are in `hyperopt.rules`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, overload

from torch import Tensor

from .domains import DOMAINS, LOG, REAL, SQUARE, Domain

if TYPE_CHECKING:
    from .stack import Stack

State: TypeAlias = dict[str, Tensor]
Values: TypeAlias = Any  # a namespace: h.lr, h.momentum, ...
Number: TypeAlias = float | dict[str, float]  # the dict: one for each hyperparameter below

RULES: dict[str, type[Rule]] = {}


@dataclass(frozen=True)
class Hyper:
    """Declares a hyperparameter of a rule; on an instance, reads as its initial value.

    Attributes:
        default: its value where none is given.
        domain: how the level above moves it.
        tuned: whether the level above moves it where the stack names no subset. One that is off by
            default (0) is moved only if it was given a value.
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

    @overload
    def __get__(self, rule: None, owner: type) -> Hyper: ...
    @overload
    def __get__(self, rule: Rule, owner: type) -> float: ...
    def __get__(self, rule: Rule | None, owner: type) -> Any:
        return self if rule is None else rule.values.get(self.name, self.default)


SCOPES = ("run", "group", "tensor")


@dataclass(frozen=True)
class Tuning:
    """How the level above moves a hyperparameter.

    Attributes:
        domain: the domain in which it is moved.
        low, high: bounds of its value, beside those of the domain.
        per: what has a value of its own: the whole run, each param group, or each tensor.
    """

    domain: Domain
    low: float = -math.inf
    high: float = math.inf
    per: str = "run"

    @classmethod
    def parse(cls, text: str, otherwise: Domain) -> Tuning:
        """The tuning that ``"log from 1e-6 to 1 per tensor"`` stands for; all of it is optional.

        Raises:
            ValueError: one line that says what is wrong.
        """
        words = text.split()
        domain = otherwise
        if words and words[0] not in ("from", "to", "per"):
            if words[0] not in DOMAINS:
                raise ValueError(f"there is no domain {words[0]!r}; {near(words[0], DOMAINS)}")
            domain = DOMAINS[words.pop(0)]
        given = dict(zip(words[::2], words[1::2], strict=False))
        try:
            low, high = float(given.get("from", -math.inf)), float(given.get("to", math.inf))
            if len(given) * 2 != len(words) or given.keys() - {"from", "to", "per"}:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{text!r} does not say how to tune; it is a domain, then from and to with a "
                "number, and per with run, group or tensor, each where wanted and once"
            ) from None
        per = given.get("per", "run")
        if per not in SCOPES:
            raise ValueError(f"there is no scope {per!r}; {near(per, SCOPES)}")
        if not low < high:
            raise ValueError(f"from {low:g} to {high:g} leaves nothing between")
        for number in (low, high):
            if math.isfinite(number) and number not in domain:
                raise ValueError(f"{number:g} is not in the {domain.name} domain")
        return cls(domain, low, high, per)

    def __contains__(self, value: float) -> bool:
        return value in self.domain and self.low <= value <= self.high

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest raw value."""
        reach = self.domain.reach
        high = min(reach, self.domain.raw(self.high)) if math.isfinite(self.high) else reach
        if math.isfinite(self.low):
            return max(-reach, self.domain.raw(self.low)), high
        return (-high if self.domain is SQUARE else -reach), high

    def write(self, otherwise: Domain) -> str:
        """The inverse of `parse`."""
        words = [] if self.domain is otherwise else [self.domain.name]
        words += [f"from {write(self.low)}"] if math.isfinite(self.low) else []
        words += [f"to {write(self.high)}"] if math.isfinite(self.high) else []
        words += [f"per {self.per}"] if self.per != "run" else []
        return " ".join(words)


@dataclass(frozen=True)
class Option:
    """Declares a constant of a rule that no level moves: a switch, or how the state starts.

    Attributes:
        default: its value where none is given; others are of its type.
        low: the lowest legal value, of a number.
    """

    default: Any
    low: float = -math.inf
    name: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __get__(self, rule: Rule | None, owner: type) -> Any:
        return self if rule is None else rule.settings[self.name]


def near(word: str, known: Iterable[str]) -> str:
    """The rest of an error message: what there is, and what was probably meant."""
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), folded)
    if not close:
        return f"known are {', '.join(folded.values())}"
    # The letters of Adma are those of Adam and of Adamax, but letters are swapped more than lost.
    best = min(close, key=lambda name: abs(len(name) - len(word)))
    return f"did you mean {folded[best]!r}?"


class Rule:
    """An update rule with the initial values of its hyperparameters: one level of a stack.

    Positional arguments are the hyperparameters in the order of their declaration. A value is a
    number or, above another level, a dict with a number for each hyperparameter that is moved:
    ``SGD({"lr": 1e-5, "momentum": 1e-6})``. As in torch, ``betas`` may give beta1 and beta2.

    ``rule["lr", "beta1: log"]`` is the rule whose ``lr`` and ``beta1`` alone are moved by the level
    above, ``beta1`` in the log domain; `Tuning` says what else may stand there. ``rule / other``
    puts ``other`` on top.

    The notation knows a subclass by its name, unless it is declared with ``known=False``.

    Raises:
        ValueError: a value outside its domain.
        TypeError: an argument that the rule does not have.
    """

    hypers: Mapping[str, Hyper] = MappingProxyType({})
    options: ClassVar[dict[str, Option]] = {}
    arguments: ClassVar[list[str]] = []  # the names of both, in the order of the notation

    # How any rule moves hyperparameters: their gradient, over so many steps, as a cosine, clipped
    # by value and by norm, in every so many steps, until so many steps were made; and to what share
    # of the weights, by norms, it lets the lowest rule's updates grow. Where that is given, it is
    # one of the rule's hyperparameters.
    horizon = Option(1.0, low=1)
    normalize = Option(False)
    trust = Hyper(math.inf, LOG, tuned=False)
    clip_value = Option(math.inf, low=0)
    clip_norm = Option(math.inf, low=0)
    every = Option(1, low=1)
    until = Option(math.inf, low=0)

    def __init_subclass__(cls, known: bool = True) -> None:
        members = {name: member for c in reversed(cls.__mro__) for name, member in vars(c).items()}
        cls.options = {n: m for n, m in members.items() if isinstance(m, Option)}
        own = {n: m for n, m in members.items() if isinstance(m, Hyper)}
        cls.hypers = {n: m for n, m in own.items() if n not in vars(Rule)}
        others = (n for n in members if n in {**own, **cls.options} and n not in cls.hypers)
        cls.arguments = [*cls.hypers, *others]
        for name in vars(cls):
            if name in (*own, *cls.options) and hasattr(Rule, name):
                raise TypeError(
                    f"{cls.__name__}: a hyperparameter or option cannot be called {name!r}, which "
                    "every rule has already"
                )
        if known:
            if RULES.get(cls.__name__, cls).__module__ == f"{__package__}.rules" != cls.__module__:
                raise TypeError(
                    f"there is a rule {cls.__name__} already, which the notation means by this "
                    f"name; call yours otherwise, or declare it as class {cls.__name__}(Rule, "
                    "known=False)"
                )
            RULES[cls.__name__] = cls

    def __init__(self, *args: Number, **kwargs: Any) -> None:
        if len(args) > len(self.hypers):
            raise TypeError(
                f"{self.name} has {len(self.hypers)} hyperparameters "
                f"({', '.join(self.hypers)}), not {len(args)}"
            )
        given = dict(zip(self.hypers, args, strict=False))
        joint = split(betas(self), kwargs.pop("betas")) if betas(self) and "betas" in kwargs else {}
        for name, value in [*kwargs.items(), *joint.items()]:
            if name in given:
                raise TypeError(f"{self.name} got {name} twice")
            if name not in self.arguments:
                hint = near(name, self.arguments)
                raise TypeError(f"{self.name} has no argument {name!r}; {hint}")
            given[name] = value
        if given.get("trust", math.inf) != math.inf:
            self.hypers = {**self.hypers, "trust": Rule.trust}
        self.values: dict[str, Number] = {}
        for name, hyper in self.hypers.items():
            value = given.get(name, hyper.default)
            self.values[name] = (
                {str(key): self._number(hyper, one) for key, one in value.items()}
                if isinstance(value, Mapping)
                else self._number(hyper, value)
            )
        self.settings = {n: given.get(n, option.default) for n, option in self.options.items()}
        for name, setting in self.settings.items():
            expected = type(self.options[name].default)
            # The notation has one kind of number.
            number = isinstance(setting, Real) and not isinstance(setting, bool)
            whole = number and float(setting).is_integer()
            if (number and expected is float) or (whole and expected is int):
                self.settings[name] = expected(setting)
            elif expected in (int, float) or not isinstance(setting, expected):
                kind = "an int" if expected is int else f"a {expected.__name__}"
                raise ValueError(f"{self.name}: {name} must be {kind}, not {setting!r}")
        for name, option in self.options.items():
            if option.low > -math.inf and not self.settings[name] >= option.low:
                raise ValueError(
                    f"{self.name}: {name} must be {option.low:g} or more, but is "
                    f"{self.settings[name]!r}"
                )
        trust = self.values.get("trust", math.inf)
        if 0 in (trust.values() if isinstance(trust, dict) else (trust,)):
            raise ValueError(f"{self.name}: trust must be above 0; with 0 no weight could move")
        self.subset: dict[str, Tuning] | None = None
        self.used = frozenset(n for n, h in self.hypers.items() if h.default or self.values[n] != 0)

    def _number(self, hyper: Hyper, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several
            raise ValueError(f"{self.name}: {hyper.name} must be a number, not {value!r}") from None
        if not hyper.low <= number < hyper.high:
            interval = f"[{hyper.low:g}, {hyper.high:g})"
            raise ValueError(f"{self.name}: {hyper.name} must lie in {interval}, but is {number:g}")
        return number

    # What the level above moves.

    def __getitem__(self, names: str | tuple[str, ...]) -> Rule:
        subset = {}
        items = names if isinstance(names, tuple) else (names,)
        for item in items:
            if not isinstance(item, str):
                known = ", ".join(map(repr, self.hypers))
                raise TypeError(f"{self.name}[...] takes the names {known}, not {item!r}")
            name, _, how = (part.strip() for part in item.partition(":"))
            if name not in self.hypers:
                raise ValueError(
                    f"{self.name} has no hyperparameter {name!r}; {near(name, self.hypers)}"
                )
            if name in subset:
                raise ValueError(f"{self.name}: {name} is named twice")
            subset[name] = Tuning.parse(how, self.hypers[name].domain)
        chosen = self._copy()
        chosen.subset = {name: subset[name] for name in self.hypers if name in subset}
        return chosen

    @property
    def tuned(self) -> dict[str, Tuning]:
        """The hyperparameters that a level above this one moves, and how."""
        if self.subset is not None:
            return self.subset
        return {
            name: Tuning(hyper.domain)
            for name, hyper in self.hypers.items()
            if hyper.tuned and name in self.used
        }

    def on(self, name: str) -> bool:
        """Whether a hyperparameter takes part: all do but those that are 0, as is their default.

        One that a subset asks for by name takes part in any case.
        """
        return name in self.used or name in (self.subset or ())

    def with_values(self, values: Mapping[str, Number]) -> Rule:
        """This rule with other initial values; hyperparameters that take part still do."""
        twin = self._copy()
        twin.values = type(self)(**{**self.values, **values}).values
        twin.used = self.used | {name for name in values if twin.values[name] != 0}
        return twin

    def _copy(self) -> Rule:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    # The algorithm.

    def init(self, w: Tensor) -> State:
        """The state before the first update of ``w``."""
        return {}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        """One step: the new weights and the new state. Pure; changes none of its arguments."""
        raise NotImplementedError

    # Notation.

    @property
    def name(self) -> str:
        return type(self).__name__

    def __truediv__(self, above: Rule | Stack) -> Stack:
        from .stack import Stack

        return Stack(self) / above

    def __str__(self) -> str:
        first, *others = self.arguments
        arguments = [write(self.values[first])]
        arguments += [
            f"{name}={write(value)}"
            for name in others
            if (value := getattr(self, name)) != getattr(type(self), name).default
        ]
        text = f"{self.name}({', '.join(arguments)})"
        if self.subset is not None:
            hows = (
                (name, how.write(self.hypers[name].domain)) for name, how in self.subset.items()
            )
            text += f"[{', '.join(f'{name}: {how}' if how else name for name, how in hows)}]"
        return text

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(str(self))


def write(value: Any) -> str:
    """A number, a truth value or a dict of numbers, as the notation writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {write(one)}" for name, one in value.items()) + "}"
    return repr(value).replace("e-0", "e-")


def betas(rule: Rule | type[Rule]) -> list[str]:
    """The hyperparameters that ``betas`` stands for."""
    return [name for name in rule.hypers if re.fullmatch(r"beta\d", name)]


def split(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The hyperparameters that a value of ``betas`` gives.

    Raises:
        ValueError: it is not one number for each.
    """
    if not isinstance(values, Sequence) or len(values) != len(names):
        raise ValueError(f"betas stands for {', '.join(names)}, and cannot be {values}")
    return dict(zip(names, values, strict=True))
