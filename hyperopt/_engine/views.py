"""The lowest level's hyperparameters as users see them in param groups, and a mapping that records
that it was changed."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import Stack, betas, unpack_betas
from .blocks import Slot
from .packed import Layout

# Keys that a param group may have beside its hyperparameters. A scheduler adds more, later.
OTHERS = frozenset({"params", "param_names", "name", "initial_lr"})


class TrackedDict(defaultdict):
    """A mapping that records in ``mutations`` that something was put into it, or taken out."""

    mutations: list[str] | None = None  # a copy has none

    @classmethod
    def of(cls, items: Mapping, mutations: list[str], default: type | None = None) -> TrackedDict:
        tracked = cls(default, items)
        tracked.mutations = mutations
        return tracked


def _tracking(name: str) -> Callable[..., Any]:
    plain = getattr(defaultdict, name)

    @functools.wraps(plain)
    def method(self: TrackedDict, *args: Any, **kwargs: Any) -> Any:
        if self.mutations is not None:
            self.mutations.append(name)
        return plain(self, *args, **kwargs)

    return method


for _name in (
    "__setitem__",
    "__delitem__",
    "pop",
    "popitem",
    "clear",
    "update",
    "setdefault",
    "__ior__",
):
    setattr(TrackedDict, _name, _tracking(_name))


class ParamGroupView:
    """The current values in the param groups: tuned ones as views of `packed`, others as numbers.

    Numbers may be set between two steps, by hand or by a scheduler. Torch's schedulers know the
    betas as a tuple, ``betas``, which is therefore shown too.

    Args:
        groups: the param groups, into which the values are written.
        stack: what they belong to; its lowest rule is that of all groups together.
        layout, packed: where the values are.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], stack: Stack, layout: Layout, packed: Tensor
    ) -> None:
        self._stack, self._layout, self._packed = stack, layout, packed
        # The group's number, a name, what it shows, its place in `packed`.
        self._watched: list[list[Any]] = []
        self._betas = betas(stack.levels[0])
        lowest = layout.blocks[0]
        end = 0
        for number, group in enumerate(groups):
            own: list[list[Any]] = []
            start, end = end, end + len(group["params"])
            for name in lowest.rule.hypers:
                first = Slot(name, f"p{start}")
                slots = [first, Slot(name, number), Slot(name)]
                slot = next((s for s in slots if s in (*lowest.tuned, *lowest.fixed)), None)
                place = layout.names.index(f"0.{slot}") if slot else 0
                if slot in (first, None):  # per tensor, of which a group may have none
                    shown = packed[place : place + end - start]
                else:
                    shown = packed[place]
                group[name] = float(shown) if slot in lowest.fixed else shown
                own.append([number, name, group[name], place])
            if self._betas:
                group["betas"] = tuple(group[beta] for beta in self._betas)
                own.insert(0, [number, "betas", group["betas"], None])
            self._watched += own
        self.mark_clean()

    def mark_clean(self) -> None:
        """Accept what `packed` holds now as right."""
        self._version = self._packed._version

    def sync(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take over the numbers that were set in the param groups.

        Args:
            groups: the param groups, which may be other dicts by now.

        Raises:
            ValueError: a tuned hyperparameter was set, or one that is not active, or to no number.
        """
        if self._packed._version != self._version:
            self._check_tuned()
        for watch in self._watched:
            number, name, seen, _ = watch
            # A group that was taken away is found when shards are rebuilt.
            if number < len(groups) and groups[number][name] is not seen:
                self._take_over(watch, groups[number])
        self.mark_clean()

    def _take_over(self, watch: list[Any], group: dict[str, Any]) -> None:
        number, name, seen, place = watch
        if name == "betas":  # each of them is watched too, after it
            group.update(unpack_betas(self._betas, group[name]))
            watch[2] = group[name]
            return
        if isinstance(seen, Tensor):
            raise ValueError(self._refusal(name))
        try:
            value = float(group[name])
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} was set to {group[name]!r} in a param group; it must be a number"
            ) from None
        if value != 0 and not self._layout.blocks[0].rule.is_active(name):
            raise ValueError(
                f"{name} was 0 when the optimizer was made, so that its step leaves it out; "
                f"to set it later, give it a value then"
            )
        self._packed[place] = watch[2] = group[name] = value
        if name in self._betas:
            (joint,) = (w for w in self._watched if w[0] == number and w[1] == "betas")
            joint[2] = group["betas"] = tuple(group[beta] for beta in self._betas)

    def _check_tuned(self) -> None:
        """Raise if a tuned value is not that of its raw value: someone wrote to a view."""
        lowest, numbers = self._layout.blocks[0], self._layout.numbers(self._packed)
        for slot, raw in zip(lowest.tuned, numbers.raw[0][0], strict=True):
            held = lowest.rule.tuned[slot.name].domain.value(raw)
            shown = self._packed[self._layout.names.index(f"0.{slot}")]
            if not torch.isclose(shown, held, rtol=1e-6, atol=0, equal_nan=True):
                raise ValueError(self._refusal(slot.name))

    def _refusal(self, name: str) -> str:
        rule, above = self._stack.levels[:2]
        others = tuple(other for other in rule.tuned if other != name)
        instead = f"{rule[others]} / ..." if others else type(rule)(**rule.values, **rule.settings)
        return (
            f"{name} was set from outside, but {above} moves it; to set it yourself or by a "
            f"scheduler, leave it out of what is tuned, as in {instead}; where a loop asks for a "
            "scheduler in any case, MultiplicativeLR(optimizer, lambda step: 1.0) changes nothing"
        )
