"""The base classes: `Rule`, one level of a stack, and `Stack`, a sequence of levels.

`hyperopt.rules` has the rules themselves, and the contract of their ``update``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from .domains import LOG, SQUARE
from .estimators import KEYWORDS, TRUST, Policy
from .tuning import Hyper, Option, Tuning, did_you_mean, format_value

State: TypeAlias = dict[str, Tensor]
Values: TypeAlias = Any  # a namespace: h.lr, h.momentum, ...
Number: TypeAlias = float | dict[str, float]  # dict: one number for each hyperparameter below

RULES: dict[str, type[Rule]] = {}


class Rule:
    """An update rule with the initial values of its hyperparameters: one level of a stack.

    Positional arguments are the hyperparameters in the order of their declaration. A value is a
    number. Above the lowest level it may be a dict with a number for each hyperparameter below:
    ``SGD({"lr": 1e-5, "momentum": 1e-6})``. As in torch, ``betas`` may give beta1 and beta2. The
    keywords of a `Policy`, as in ``SGD(1e-5, clip_norm=1)``, set how the level moves the one below.

    ``rule["lr", "beta1: log"]`` is a copy of the rule in which the level above moves only ``lr``
    and ``beta1``, and ``beta1`` in the log domain; see `Tuning`. ``rule / other`` puts ``other`` on
    top.

    Declaring a subclass registers its name for the notation. ``known=False`` prevents that.

    Attributes:
        elementwise: whether ``update`` may receive any slice of the parameters as one vector. If
            not, it receives each parameter in its own shape, and the rule can only be the lowest
            level.
        linear_in_lr: whether the new weights are linear in lr. A trust region needs this.
        compiles: whether to compile ``update``. False pays if library calls take all of its time.
        ndim: for a rule that is not elementwise, the number of dimensions that a parameter must
            have; None for any.
        values: the initial values of the hyperparameters by name.
        settings: the values of the options and of the policy's keywords by name.
        policy: how the rule moves the level below.
        tuned_subset: the hyperparameters that ``rule[...]`` named, or None.

    Raises:
        ValueError: a value is outside its domain.
        TypeError: the rule does not have an argument.
    """

    hypers: Mapping[str, Hyper] = MappingProxyType({})
    options: ClassVar[dict[str, Option]] = {}
    arguments: ClassVar[list[str]] = []  # names in the notation, in its order
    elementwise: ClassVar[bool] = True
    linear_in_lr: ClassVar[bool] = True
    compiles: ClassVar[bool] = True
    ndim: ClassVar[int | None] = None

    def __init_subclass__(cls, known: bool = True) -> None:
        members = {name: member for c in reversed(cls.__mro__) for name, member in vars(c).items()}
        cls.options = {n: m for n, m in members.items() if isinstance(m, Option)}
        cls.hypers = {n: m for n, m in members.items() if isinstance(m, Hyper)}
        cls.arguments = [*cls.hypers, *KEYWORDS, *cls.options]
        for name in (*cls.hypers, *cls.options):
            if name in KEYWORDS or hasattr(Rule, name):
                raise TypeError(
                    f"{cls.__name__}: a hyperparameter or option cannot be called {name!r}, "
                    "since every rule has an attribute of this name"
                )
        if known:
            ours, taken = f"{__package__}.rules", RULES.get(cls.__name__)
            if taken and taken.__module__ == ours and cls.__module__ != ours:
                raise TypeError(
                    f"there is a rule {cls.__name__} already, and the notation needs one rule for "
                    f"each name; rename yours, or declare it as class {cls.__name__}(Rule, "
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
        joint: dict[str, Any] = {}
        if betas(self) and "betas" in kwargs:
            joint = unpack_betas(betas(self), kwargs.pop("betas"))
        for name, value in [*kwargs.items(), *joint.items()]:
            if name in given:
                raise TypeError(f"{self.name} got {name} twice")
            if name not in self.arguments:
                hint = did_you_mean(name, self.arguments)
                raise TypeError(f"{self.name} has no argument {name!r}; {hint}")
            given[name] = value
        if given.get("trust", math.inf) != math.inf:
            self.hypers = {**self.hypers, "trust": TRUST}
        self.values: dict[str, Number] = {}
        for name, hyper in self.hypers.items():
            value = given.get(name, hyper.default)
            self.values[name] = (
                {str(key): hyper.check(self.name, one) for key, one in value.items()}
                if isinstance(value, Mapping)
                else hyper.check(self.name, value)
            )
        trust = self.values.get("trust", math.inf)
        if 0 in (trust.values() if isinstance(trust, dict) else (trust,)):
            raise ValueError(f"{self.name}: trust must be above 0; with 0 no weight could move")
        self.settings = {
            name: option.check(self.name, given.get(name, option.default))
            for name, option in {**KEYWORDS, **self.options}.items()
            if isinstance(option, Option)
        }
        self.policy = Policy.of(self.settings)
        self.tuned_subset: dict[str, Tuning] | None = None
        self.active = frozenset(
            n for n, h in self.hypers.items() if h.default or self.values[n] != 0
        )

    def argument(self, name: str) -> Any:
        """The value of a hyperparameter, an option or a keyword of the policy."""
        return {"trust": TRUST.default, **self.values, **self.settings}[name]

    # The hyperparameters that the level above moves.

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
                    f"{self.name} has no hyperparameter {name!r}; {did_you_mean(name, self.hypers)}"
                )
            if name in subset:
                raise ValueError(f"{self.name}: {name} is named twice")
            subset[name] = Tuning.parse(how, self.hypers[name].domain)
        chosen = self._copy()
        chosen.tuned_subset = {name: subset[name] for name in self.hypers if name in subset}
        return chosen

    @property
    def tuned(self) -> dict[str, Tuning]:
        """The hyperparameters that the level above moves, and how it moves them."""
        if self.tuned_subset is not None:
            return self.tuned_subset
        return {
            name: Tuning(hyper.domain)
            for name, hyper in self.hypers.items()
            if hyper.tuned and name in self.active
        }

    def is_active(self, name: str) -> bool:
        """Whether the update uses a hyperparameter.

        It does not if both the value and the default are 0, unless ``rule[...]`` names it.
        """
        return name in self.active or name in (self.tuned_subset or ())

    def with_values(self, values: Mapping[str, Number]) -> Rule:
        """A copy with other initial values. Active hyperparameters stay active."""
        twin = self._copy()
        twin.values = type(self)(**{**self.values, **values}).values
        twin.active = self.active | {name for name in values if twin.values[name] != 0}
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
        """Compute the new weights and the new state. A pure function: it changes no argument."""
        raise NotImplementedError

    def example(self) -> Tensor:
        """Example weights for `update`."""
        sizes = [3] if self.elementwise else [3, *[2] * ((self.ndim or 2) - 1)]
        return torch.linspace(0.1, 0.9, math.prod(sizes), device="cpu").view(sizes)

    # Notation.

    @property
    def name(self) -> str:
        return type(self).__name__

    def __truediv__(self, above: Rule | Stack) -> Stack:
        return Stack(self) / above

    def __str__(self) -> str:
        first = next(iter(self.hypers), None)
        arguments = [format_value(self.values[first])] if first else []
        declared = {**self.hypers, **KEYWORDS, **self.options}
        arguments += [
            f"{name}={format_value(value)}"
            for name in self.arguments
            if name != first and (value := self.argument(name)) != declared[name].default
        ]
        text = f"{self.name}({', '.join(arguments)})"
        if self.tuned_subset is not None:
            hows = {n: how.format(self.hypers[n].domain) for n, how in self.tuned_subset.items()}
            text += f"[{', '.join(f'{n}: {how}' if how else n for n, how in hows.items())}]"
        return text

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(str(self))


def betas(rule: Rule | type[Rule]) -> list[str]:
    """The names of a rule's betas, which a value of ``betas`` sets together."""
    return [name for name in rule.hypers if re.fullmatch(r"beta\d", name)]


def unpack_betas(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Split a value of ``betas`` into one value for each name.

    Raises:
        ValueError: the value is not a sequence with one number for each name.
    """
    if not isinstance(values, Sequence) or len(values) != len(names):
        raise ValueError(f"betas stands for {', '.join(names)}, and cannot be {values}")
    return dict(zip(names, values, strict=True))


class Stack:
    """A sequence of levels, lowest first. Each level moves the hyperparameters of the level below.

    The lowest level moves the weights. The hyperparameters of the top level are constants. A plain
    optimizer is a stack of height 0. A *tower* is a stack of height 1 or more.

    Raises:
        ValueError: a level has nothing to move, or its dict of values does not fit the level below.
    """

    def __init__(self, *levels: Rule) -> None:
        self.levels = levels
        for below, above in itertools.pairwise(levels):
            if not below.tuned:
                raise ValueError(
                    f"{above} has nothing to move: {below} has no tuned hyperparameter"
                )
            _check_tuned(below, lowest=below is levels[0])
        _check_policies(levels)
        for name, value in levels[0].values.items():
            if isinstance(value, dict):
                raise ValueError(f"{levels[0]}: {name} must be one number on the lowest level")
        for below, above in itertools.pairwise(levels):
            for name, value in above.values.items():
                if isinstance(value, dict) and value.keys() != below.tuned.keys():
                    raise ValueError(
                        f"{above}: {name} must have one value for each of "
                        f"{', '.join(below.tuned)}, the hyperparameters that it moves"
                    )

    @property
    def height(self) -> int:
        return len(self.levels) - 1

    def __truediv__(self, above: Rule | Stack) -> Stack:
        if isinstance(above, Rule):
            return Stack(*self.levels, above)
        if isinstance(above, Stack):
            return Stack(*self.levels, *above.levels)
        raise TypeError(f"a level is a rule, as in {self} / SGD(1e-5), not {above!r}")

    def __str__(self) -> str:
        return " / ".join(map(str, self.levels))

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and self.levels == other.levels

    def __hash__(self) -> int:
        return hash(self.levels)


def _check_tuned(rule: Rule, lowest: bool) -> None:
    """Raise if a tuned hyperparameter cannot start at its initial value."""
    for name, how in rule.tuned.items():
        values = rule.values[name]
        for number in values.values() if isinstance(values, dict) else (values,):
            if number not in how.domain:
                raise ValueError(
                    f"{rule}: {name} = {number:g} cannot be moved in the "
                    f"{how.domain.name} domain, which is ({how.domain.low:g}, "
                    f"{how.domain.high:g}); start it inside, or name another domain, as in "
                    f"[{name}: real]"
                )
            if number == 0 and how.domain is SQUARE:
                raise ValueError(
                    f"{rule}: {name} = 0 would stay 0, since the derivative of a square "
                    f"is 0 there; start it above 0, or do not tune it"
                )
            if number not in how:
                raise ValueError(
                    f"{rule}: {name} = {number:g} is not within its bounds, from "
                    f"{how.low:g} to {how.high:g}"
                )
        if how.per != "run" and not lowest:
            raise ValueError(
                f"{rule}: {name} per {how.per} is for the lowest level; above it, give "
                "one number for each hyperparameter below, as in {lr: 0.1, ...}"
            )


def _check_policies(levels: Sequence[Rule]) -> None:
    """Raise if a level has a keyword that belongs to another level."""
    lowest = levels[0]
    for above in levels[1:]:
        if not above.elementwise:
            raise ValueError(
                f"{above} needs parameters with a shape, and hyperparameters have none; it can be "
                "the lowest level only"
            )
        if above.argument("normalize") and above.argument("surrogate"):
            raise ValueError(f"{above}: a cosine is not divided again; leave out surrogate")
    for name, keyword in KEYWORDS.items():
        if lowest.argument(name) != keyword.default:
            hint = "; the weights' gradients are clipped by torch.nn.utils.clip_grad_norm_"
            raise ValueError(
                f"{lowest}: {name} is for a level that moves hyperparameters"
                + hint * name.startswith("clip")
            )
    for k, above in enumerate(levels[2:], 2):
        for name in ("horizon", "trust"):
            if above.argument(name) != KEYWORDS[name].default:
                raise ValueError(
                    f"{above}: {name} is for the level that moves the hyperparameters of the "
                    f"lowest one, and not for level {k}"
                )
    logarithmic = [n for n, how in lowest.tuned.items() if how.domain is LOG]
    if len(levels) > 1 and "trust" in levels[1].hypers and "lr" not in logarithmic:
        raise ValueError(
            f"{levels[1]}: trust bounds the lr of {lowest}, which must be moved in the "
            "log domain, as in [lr: log]"
        )
    if len(levels) > 1 and "trust" in levels[1].hypers and not lowest.linear_in_lr:
        raise ValueError(
            f"{levels[1]}: trust finds the lr that bounds an update, but the update of "
            f"{lowest.name} is not linear in lr; leave out trust"
        )
