"""Hyperparameters per element: one value for each weight.

If a level moves one value for each weight, its rule is elementwise on these values, too. So the two
lowest levels together are one elementwise rule, `PerElement`. Its state contains the raw values and
the upper rule's state. Its hyperparameters are those of the upper rule. A stack of height n becomes
a stack of height n - 1, with the same updates and hypergradients.

For each hyperparameter per element, the state has two vectors and those of the upper rule's state.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .domains import LOG, UNIT
from .estimators import KEYWORDS
from .rule import Number, Rule, Stack, State, Values
from .tuning import Tuning


class PerElement(Rule, known=False):
    """The two lowest levels of a stack as one rule. `fold` makes the subclasses.

    Its ``lr`` is the initial lr. A scheduler may scale it, which scales the lr of all elements.

    Attributes:
        below, above: the two rules.
        moved: the hyperparameters of ``below`` that ``above`` moves.
    """

    below: ClassVar[Rule]
    above: ClassVar[Rule]
    moved: ClassVar[dict[str, Tuning]]

    def __reduce__(self) -> tuple:
        return _again, (self.below, self.above, self.values, self.active)

    def __str__(self) -> str:
        return f"{self.below} / {self.above}"

    __repr__ = __str__

    @property
    def tuned(self) -> dict[str, Tuning]:
        return {f"1.{name}": how for name, how in self.above.tuned.items()}

    def init(self, w: Tensor) -> State:
        state = self.below.init(w)
        for name, how in self.moved.items():
            raw = torch.full_like(w, how.domain.raw(_number(self.below.values[name])))
            state |= {f"raw_{name}": raw, f"slope_{name}": torch.zeros_like(w)}
            state |= {f"{name}_{key}": value for key, value in self.above.init(raw).items()}
        return state

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        values = vars(h)
        h_above = SimpleNamespace(**{name: values[f"1.{name}"] for name in self.above.hypers})
        constants = {name: values[name] for name in self.below.hypers if name not in self.moved}
        raws: dict[str, Tensor] = {}
        after: State = {}
        for name, how in self.moved.items():
            raw, own = s[f"raw_{name}"], f"{name}_"
            kept = {key: s[own + key] for key in self.above.init(raw)}
            moved, kept = self.above.update(raw, g * s[f"slope_{name}"], kept, h_above)
            raws[name] = moved.clamp(*_raw_bounds(how, w.dtype))
            after |= {own + key: value for key, value in kept.items()}
        names = [*self._below.init(w)]

        def move(*raws: Tensor) -> tuple[Tensor, State]:
            pairs = zip(self.moved.items(), raws, strict=True)
            own = {name: how.domain.value(raw) for (name, how), raw in pairs}
            if "lr" in own:
                own["lr"] = own["lr"] * (values["lr"] / _number(self.below.values["lr"])).to(w)
            state = {name: s[name] for name in names}
            return self._below.update(w, g, state, SimpleNamespace(**constants, **own))

        new, pullback, state = torch.func.vjp(move, *raws.values(), has_aux=True)  # type: ignore[misc]
        slopes = pullback(torch.ones_like(w))
        after |= {f"raw_{name}": raw for name, raw in raws.items()}
        after |= {f"slope_{n}": slope for n, slope in zip(raws, slopes, strict=True)} | state
        sound = g.isfinite()  # an element whose gradient is not finite does not change
        after = {
            n: torch.where(sound, after[n], old) if old.ndim else after[n] for n, old in s.items()
        }
        return torch.where(sound, new, w), after

    @property
    def _below(self) -> Rule:
        """The lower rule, with the hyperparameters that are active in any param group."""
        own = {name: value for name, value in self.values.items() if name in self.below.hypers}
        return self.below.with_values({n: v for n, v in own.items() if n not in self.moved})


def fold(stack: Stack) -> Stack:
    """Fold the two lowest levels into one rule, if hyperparameters are per element.

    Returns:
        the folded stack, or the same stack if no hyperparameter is per element.

    Raises:
        ValueError: only some of the lowest level's tuned hyperparameters are per element, or the
            level above has a keyword or value that needs all elements at once.
    """
    if not stack.height or all(how.per != "element" for how in stack.levels[0].tuned.values()):
        return stack
    below, above, *rest = stack.levels
    for name, how in below.tuned.items():
        if how.per != "element":
            raise ValueError(
                f"{below}: if one hyperparameter is tuned per element, all have to be, but "
                f"{name} is per {how.per}"
            )
    if not below.elementwise:
        raise ValueError(f"{below} is not elementwise: its hyperparameters cannot be per element")
    if "lr" in below.tuned and below.values["lr"] == 0:
        raise ValueError(f"{below}: an lr per element has to start above 0")
    for name in KEYWORDS:
        if above.argument(name) != KEYWORDS[name].default:
            raise ValueError(f"{above}: {name} is not for hyperparameters per element")
    if dicts := [name for name, value in above.values.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"{above}: {dicts[0]} must be one number above hyperparameters per element"
        )
    return Stack(_class(below, above)(), *rest)


@functools.lru_cache(256)
def _class(below: Rule, above: Rule) -> type[PerElement]:
    """The class that combines two rules."""
    kept = {n: hyper for n, hyper in below.hypers.items() if n not in below.tuned or n == "lr"}
    members: dict[str, Any] = {
        n: replace(hyper, default=_number(below.values[n]), tuned=False)
        for n, hyper in kept.items()
    }
    for name, hyper in above.hypers.items():
        members[f"1.{name}"] = replace(hyper, default=_number(above.values[name]))
    members |= {"below": below, "above": above, "moved": dict(below.tuned)}
    members["__module__"] = __name__
    return type(f"{below.name} / {above.name}", (PerElement,), members, known=False)


def _again(below: Rule, above: Rule, values: dict[str, Number], active: frozenset[str]) -> Rule:
    rule = _class(below, above)(**values)
    rule.active = active
    return rule


def _raw_bounds(how: Tuning, dtype: torch.dtype) -> tuple[float, float]:
    """The lowest and the highest raw value for which T works in this dtype."""
    low, high = how.raw_bounds
    if dtype == torch.float64:
        return low, high
    most = {UNIT: 8.0, LOG: 80.0}.get(how.domain, 1e18)
    return max(low, -most), min(high, most)


def _number(value: Number) -> float:
    assert not isinstance(value, dict)
    return value
