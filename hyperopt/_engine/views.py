"""The lowest level's hyperparameters in param groups, as users see and set them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import Stack, betas, unpack_betas
from .blocks import Block, Slot
from .packed import Layout
from .torch_private import version_of


class ScaledLr:
    """The tuned lr of one param group: the learned lr times a factor.

    A scheduler stores the initial lr in ``group["initial_lr"]``. While this key exists,
    ``group["lr"]`` is the scheduler's own number, and the factor is ``group["lr"] /
    group["initial_lr"]``. Without this key, ``group["lr"]`` is the effective lr, and setting it
    changes the factor.

    Args:
        group: the param group.
        number: its number.
        block, packed: the lowest level and the memory, for the learned lr.
        factor, effective: views of ``packed``, 0-dim.
        base: the factor from before the scheduler, which multiplies the scheduler's factor.

    Raises:
        ValueError: ``initial_lr`` is not a positive, finite number.
    """

    def __init__(
        self,
        group: dict[str, Any],
        number: int,
        block: Block,
        packed: Tensor,
        factor: Tensor,
        effective: Tensor,
        base: float | Tensor = 1.0,
    ) -> None:
        self._number, self._block, self._values = number, block, packed[: len(block.tuned)]
        self.factor, self._effective, self.base = factor, effective, base
        self._start = group.get("initial_lr")
        self._start_number = math.nan if self._start is None else start_of(group)
        self._shown: Tensor | None = None  # the view of `effective` in the group
        self._seen: Any = None  # the last known group["lr"]; with a scheduler, read at `sync`
        self._seen_version = 0
        if self._start is None:
            self._show(group)

    @property
    def is_scheduled(self) -> bool:
        return self._start is not None

    def sync(self, group: dict[str, Any], touched: bool) -> bool:
        """Apply the user's changes to the group. Returns whether something was changed.

        Args:
            group: the param group.
            touched: whether the memory of `packed` may have been written to.

        Raises:
            ValueError: the new lr is not a number, or the learned lr is 0, which no factor scales.
        """
        if group.get("initial_lr") is not self._start:
            self._attach(group)
        elif not self._is_written(group["lr"], touched):
            return False
        value, learned = group["lr"], self._block.learned_lr(self._values)[self._number]
        if not isinstance(value, Tensor):
            value = _to_float("lr", value)
        elif value.numel() != 1:
            raise ValueError(f"lr was set to {value!r} in a param group; it must be a number")
        if isinstance(value, Tensor):
            value = value.detach().reshape(())
        if self.is_scheduled:
            factor = self.base * value / self._start_number
        elif float(learned) != 0:
            factor = value / learned
        else:
            raise ValueError(
                "lr was set in a param group, but the level above has moved it to 0, which no "
                "factor can scale; start it above 0, or move it in the log domain: [lr: log]"
            )
        if isinstance(factor, Tensor):
            self.factor.copy_(factor)
        else:
            self.factor.fill_(factor)
        self._effective.copy_(learned * self.factor)
        self._show(group)
        return True

    def _attach(self, group: dict[str, Any]) -> None:
        """Follow a scheduler that was attached, detached or restarted."""
        if group["lr"] is self._shown:  # the scheduler may have written to this tensor
            group["lr"] = float(self._effective)
        # The scheduler may hold our tensor as its number, as timm's does: detach it from `packed`.
        if self._shown is not None:
            self._shown.data, self._shown = self._shown.clone(), None
        if "initial_lr" not in group:
            self._start, self.base = None, 1.0
            return
        self._start_number = start_of(group)
        if self._start is None:
            self.base = self.factor.clone()
        self._start = group["initial_lr"]

    def _is_written(self, value: Any, touched: bool) -> bool:
        if value is not self._seen:
            return True
        if value is not self._shown:
            return isinstance(value, Tensor) and version_of(value) != self._seen_version
        if not touched:
            return False
        learned = self._block.learned_lr(self._values)[self._number]
        return not torch.isclose(
            self._effective, learned * self.factor, rtol=1e-12, atol=0, equal_nan=True
        )

    def _show(self, group: dict[str, Any]) -> None:
        if not self.is_scheduled:
            self._shown = self._shown if self._shown is not None else self._effective.view(())
            group["lr"] = self._shown
        self._seen = group["lr"]
        self._seen_version = version_of(self._seen) if isinstance(self._seen, Tensor) else 0


def start_of(group: Mapping[str, Any]) -> float:
    start = _to_float("initial_lr", group["initial_lr"])
    if not 0 < start < math.inf:
        raise ValueError(
            f"initial_lr is {start:g} in a param group; to scale a tuned lr, a scheduler has to "
            "start from a number above 0"
        )
    return start


def _to_float(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} was set to {value!r} in a param group; it must be a number"
        ) from None


class ParamGroupView:
    """The current values in the param groups: tuned ones as views of `packed`, others as numbers.

    Numbers may be set between two steps, by hand or by a scheduler. A tuned lr may be set, too,
    which scales it (`ScaledLr`). The groups also have a tuple ``betas``, for torch's schedulers.

    Args:
        groups: the param groups. The tuned values are written to them, and constants are read.
        stack: the stack. Its lowest rule has the active hyperparameters of all groups.
        layout, packed: the memory of the values.
        bases: `ScaledLr.base` of each group.

    Attributes:
        lrs: the tuned lr of each group; empty if lr is not tuned.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        stack: Stack,
        layout: Layout,
        packed: Tensor,
        bases: Sequence[float | Tensor],
    ) -> None:
        self._stack, self._layout, self._packed = stack, layout, packed
        # For each hyperparameter: group number, name, value in the group, index in `packed`.
        self._watched: list[list[Any]] = []
        self.lrs: list[ScaledLr] = []
        self._betas = betas(stack.levels[0])
        self._numbers = layout.numbers(packed)
        lowest = layout.blocks[0]
        end = 0
        for number, group in enumerate(groups):
            own: list[list[Any]] = []
            start, end = end, end + len(group["params"])
            for name in lowest.rule.hypers:
                if name == "lr" and lowest.lr_slots:
                    parts = self._numbers.fixed[0][0][-len(groups) :], self._numbers.effective_lr
                    factor, effective = (part[number] for part in parts)
                    self.lrs.append(
                        ScaledLr(group, number, lowest, packed, factor, effective, bases[number])
                    )
                    continue
                first = Slot(name, f"p{start}")
                slots = [first, Slot(name, number), Slot(name)]
                slot = next((s for s in slots if s in (*lowest.tuned, *lowest.fixed)), None)
                place = layout.names.index(f"0.{slot}") if slot else 0
                if slot in lowest.fixed:
                    group[name] = float(group[name])
                elif slot in (first, None):  # per tensor; None if the group has no tensors
                    group[name] = packed[place : place + end - start]
                else:
                    group[name] = packed[place]
                own.append([number, name, group[name], place])
            if self._betas:
                group["betas"] = tuple(group[beta] for beta in self._betas)
                own.insert(0, [number, "betas", group["betas"], None])
            self._watched += own
        self.mark_clean()

    def mark_clean(self) -> None:
        """Accept the current values of `packed` as correct."""
        self._clean_version = version_of(self._packed)

    def sync(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Apply the numbers that were set in the param groups.

        Args:
            groups: the param groups, which may be different dicts than before.

        Returns:
            whether a tuned lr was set or is scheduled.

        Raises:
            ValueError: a tuned hyperparameter other than lr was set, an inactive hyperparameter was
                set, or a value is not a number.
        """
        touched = version_of(self._packed) != self._clean_version
        if touched:
            self._check_tuned()
        for watch in self._watched:
            number, name, seen, _ = watch
            # Rebuilding the shards reports removed groups.
            if number < len(groups) and groups[number][name] is not seen:
                self._take_over(watch, groups[number])
        scaled = False
        for lr, group in zip(self.lrs, groups, strict=False):
            scaled |= lr.sync(group, touched) or lr.is_scheduled
        self.mark_clean()
        return scaled

    def _take_over(self, watch: list[Any], group: dict[str, Any]) -> None:
        number, name, seen, place = watch
        if name == "betas":  # next, sync reads each beta
            group.update(unpack_betas(self._betas, group[name]))
            watch[2] = group[name]
            return
        if isinstance(seen, Tensor):
            raise ValueError(self._refusal(name))
        value = _to_float(name, group[name])
        if value != 0 and not self._layout.blocks[0].rule.is_active(name):
            raise ValueError(
                f"{name} was 0 when the optimizer was made, so that its step does not use it; "
                f"to set it later, make the optimizer with a value other than 0"
            )
        self._packed[place] = watch[2] = group[name] = value
        if name in self._betas:
            (joint,) = (w for w in self._watched if w[0] == number and w[1] == "betas")
            joint[2] = group["betas"] = tuple(group[beta] for beta in self._betas)

    def _check_tuned(self) -> None:
        """Raise if a tuned value does not match its raw value: the user wrote to a view."""
        lowest = self._layout.blocks[0]
        for slot, raw in zip(lowest.tuned, self._numbers.raw[0][0], strict=True):
            held = lowest.rule.tuned[slot.name].domain.value(raw)
            shown = self._packed[self._layout.names.index(f"0.{slot}")]
            if not torch.isclose(shown, held, rtol=1e-6, atol=0, equal_nan=True):
                raise ValueError(self._refusal(slot.name))

    def _refusal(self, name: str) -> str:
        rule, above = self._stack.levels[:2]
        others = tuple(other for other in rule.tuned if other != name)
        instead = f"{rule[others]} / ..." if others else type(rule)(**rule.values, **rule.settings)
        cycled = name in ("momentum", "beta1")
        return (
            f"{name} was set from outside, but {above} moves it; to set it yourself or by a "
            f"scheduler, do not tune it, as in {instead}"
            + "; OneCycleLR and CyclicLR do not set it with cycle_momentum=False"
            * cycled
        )
