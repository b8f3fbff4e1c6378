"""Convert the memory of a stack to entries by name and back: for a `state_dict` or a new layout."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..notation import parse
from ..per_element import fold
from ..rule import RULES, Stack
from .blocks import FACTOR, Block, Owner, Slot
from .packed import Layout, scalars_of
from .shards import Shard, local, precision
from .torch_private import tree_leaves, tree_map
from .updates import LastUpdate, Numbers

# Numbers.


def export(layout: Layout, numbers: Numbers) -> list[dict[str, Any]]:
    """Export each level's hyperparameters by name and, above the lowest level, its last update."""
    exported = []
    for k, (b, row) in enumerate(layout.levels):
        block = layout.blocks[b]
        entry: dict[str, Any] = {
            "tuned": _by_name(block.tuned, numbers.raw[b][row]),
            "fixed": _by_name(block.fixed, numbers.fixed[b][row]),
            "skipped": numbers.skipped[k].clone(),
        }
        if k == 0:
            entry["last_fixed"] = _by_name(block.fixed, numbers.last_fixed)
            entry["steps"] = numbers.steps.clone()
        else:
            below = layout.blocks[layout.levels[k - 1][0]].tuned
            last = tree_map(lambda rows, row=row: rows[row], numbers.hyper_updates[b - 1])
            parts = {"w": last.w, "g": last.g, "moved": last.applied, **last.state}
            entry["last"] = {
                name: _by_name(below, part) if part.ndim else part.clone()
                for name, part in parts.items()
            }
        exported.append(entry)
    return exported


def restore(
    layout: Layout,
    stack: Stack,
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[dict[str, Any]],
    known: int,
    lasts: Sequence[LastUpdate],
    like: Tensor,
) -> Tensor:
    """Make `packed` for a layout.

    Args:
        layout: the layout.
        stack, groups: the initial values. Those of the lowest level are in the param groups.
        saved: the result of `export`; empty to use the initial values.
        known: the number of param groups when ``saved`` was made.
        lasts: the last update of each shard.
        like: a tensor with the dtype and device of the result.
    """

    def recall(numbers: dict[str, Any], slot: Slot, default: Any) -> Any:
        """The saved value of a slot, or of the slot that its group shared with others before."""
        if str(slot) in numbers:
            return numbers[str(slot)]
        if isinstance(slot.owner, int) and slot.owner < known:
            return numbers.get(slot.name, default)
        return default

    of_tensor = [group for group in groups for _ in group["params"]]

    def initial(k: int, slot: Slot) -> float:
        if slot.name == FACTOR:
            return 1.0
        value: Any = stack.levels[k].values[slot.name]
        if k > 0:
            return value[str(slot.owner)] if isinstance(value, dict) else value
        # With a scheduler, the learned lr starts at the scheduler's initial lr.
        key = "initial_lr" if slot.name == "lr" and layout.blocks[0].lr_slots else slot.name
        if isinstance(slot.owner, str):
            group = of_tensor[int(slot.owner[1:])]
            shown = group.get(key, group[slot.name])
            return value if isinstance(shown, Tensor | list) else shown  # list: a state_dict
        if slot.owner is not None or len(groups) == 1:
            group = groups[slot.owner or 0]
            value = group.get(key, group[slot.name])
        return value

    def vector(numbers: Sequence[Any]) -> Tensor:
        own: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        if not any(isinstance(x, Tensor) for x in numbers):
            return torch.tensor([float(x) for x in numbers], **own)
        # Do not read values: that would wait for the device, and fake tensors have none.
        return torch.stack(
            [x.to(**own) if isinstance(x, Tensor) else torch.tensor(x, **own) for x in numbers]
        )

    raw: list[Tensor] = []
    fixed: list[Tensor] = []
    bounds: list[Tensor] = []
    updates: list[list[LastUpdate]] = [[] for _ in layout.blocks]
    for k, (b, _) in enumerate(layout.levels):
        block = layout.blocks[b]
        # torch.distributed.checkpoint drops empty dicts.
        old = {"tuned": {}, "fixed": {}, "last_fixed": {}, "last": {}} | (saved[k] if saved else {})
        hows = [block.rule.tuned[slot.name] for slot in block.tuned]
        start: list[Any] = []
        for how, slot in zip(hows, block.tuned, strict=True):
            saved_raw = recall(old["tuned"], slot, None)
            start.append(
                how.domain.raw(float(initial(k, slot))) if saved_raw is None else saved_raw
            )
        bounds.append(vector([number for how in hows for number in how.raw_bounds]).view(-1, 2).T)
        raw.append(vector(start))
        constants = [
            # Constants of level 0 come from the param groups.
            initial(k, s) if k == 0 and s.name != FACTOR else recall(old["fixed"], s, initial(k, s))
            for s in block.fixed
        ]
        fixed.append(vector(constants))
        if k == 0:
            last_fixed = vector([recall(old["last_fixed"], s, initial(k, s)) for s in block.fixed])
        else:
            targets = layout.blocks[layout.levels[k - 1][0]].tuned
            parts = {"w": raw[k - 1], "g": torch.zeros_like(raw[k - 1]), "moved": vector([0])}
            with like.device:
                parts |= block.init(raw[k - 1])
            for name in parts.keys() & old["last"].keys():
                part, once = parts[name], old["last"][name]
                if isinstance(once, dict):
                    below = zip(targets, part, strict=True)
                    parts[name] = vector([recall(once, slot, x) for slot, x in below])
                else:
                    parts[name] = vector([once]).view(part.shape)
            w, g, applied = parts.pop("w"), parts.pop("g"), parts.pop("moved")
            updates[b].append(LastUpdate(w, g, parts, applied.view(())))

    def rows(tensors: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
        """Stack one tensor per level into one tensor per block."""
        levels = [*zip(tensors, layout.levels, strict=True)]
        own = [[t for t, (at, _) in levels if at == b] for b in range(len(layout.blocks))]
        return [torch.stack(each, dim) for each in own]

    raws = rows(raw)
    values = [block.from_raw(own) for block, own in zip(layout.blocks, raws, strict=True)]
    fixes = rows(fixed)
    numbers = Numbers(
        values=torch.cat([own.reshape(-1) for own in values]),
        fixed=fixes,
        hyper_updates=[tree_map(lambda *each: torch.stack(each), *own) for own in updates[1:]],
        bounds=rows(bounds, 1),
        raw=raws,
        last_fixed=last_fixed,
        steps=vector([saved[0]["steps"] if saved else 0]).view(()),
        skipped=vector([level["skipped"] for level in saved] or [0] * len(layout.levels)),
        effective_lr=layout.blocks[0].effective_lr(values[0][0], fixes[0][0]),
        grads_finite=vector([1]).view(()),
        shard_scalars=[scalars_of(last) for last in lasts],
    )
    return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(numbers)]).to(like.dtype)


def _by_name(slots: Sequence[Slot], numbers: Tensor) -> dict[str, Tensor]:
    return {str(slot): x.clone() for slot, x in zip(slots, numbers, strict=True)}


# The state of the shards.


def save_shards(
    active: Sequence[Shard], inactive: Sequence[Shard], number: Mapping[Tensor, int]
) -> dict[int, dict[str, Any]]:
    """Export the part of a shard that belongs to each parameter.

    Args:
        active: the shards that the last step moved.
        inactive: the shards that only earlier steps moved.
        number: the number of each parameter.

    Returns:
        the entries of each parameter that has been moved, by its number.
    """
    saved: dict[int, dict[str, Any]] = {}
    for i, shard in enumerate([*active, *inactive]):
        w, g, state, applied = shard.last
        kept = dict(state)
        if g is not None:
            kept |= {"moved": applied, "last_grad": g}
            if w is not None:
                kept["last_weight"] = w
        for p, own in shard.by_parameter(kept).items():
            if p in number:  # it is still in a param group
                place = {"shape": list(p.shape), "shard": i, "active": i < len(active)}
                saved[number[p]] = place | {name: _own(value) for name, value in own.items()}
    return dict(sorted(saved.items()))


def _own(value: Tensor) -> Tensor:
    """Clone a DTensor: a view cannot be copied or saved alone, since torch loses its offset."""
    return value if local(value) is value else value.clone()


def load_shards(
    saved: Mapping[int, dict[str, Any]], params: Sequence[list[Tensor]], lowest: Block
) -> tuple[list[Shard], list[Shard]]:
    """The inverse of `save_shards`. Returns the active shards and the inactive shards.

    Args:
        saved: the result of `by_number`.
        params: the parameters of each group.
        lowest: the lowest level.
    """
    everyone = [(p, number) for number, group in enumerate(params) for p in group]
    members: dict[tuple[int, str], list[int]] = {}
    for i, entry in saved.items():
        # Parameters of one saved shard may have several precisions now.
        members.setdefault((entry["shard"], str(precision(everyone[i][0]))), []).append(i)
    active: list[Shard] = []
    inactive: list[Shard] = []
    for _, numbers in sorted(members.items()):
        entries = [saved[i] for i in numbers]
        chosen = [everyone[i][0] for i in numbers]
        owner = Owner(everyone[numbers[0]][1], numbers[0] if lowest.per_tensor else None)
        shard = Shard.new(chosen, owner, lowest)

        def recall(name: str, new: Tensor, entries: Sequence[dict[str, Any]] = entries) -> Tensor:
            """The saved entry of this name, with the shape and dtype of ``new``."""
            if not new.ndim:
                return entries[0][name].to(new.device, copy=True)
            pieces = [local(entry[name]).reshape(-1) for entry in entries]
            return torch.cat([p.to(new.device, new.dtype) for p in pieces]).view(new.shape)

        w, g, fresh, applied = shard.last
        shard.last = LastUpdate(
            None if w is None else recall("last_weight", w),
            None if g is None else recall("last_grad", g),
            {name: recall(name, value) for name, value in fresh.items()},
            applied if g is None else recall("moved", applied),
        )
        (active if entries[0]["active"] else inactive).append(shard)
    return active, inactive


# The version of the state_dict format. Version 0.1 of the project saved none, and used old names.
FORMAT = 2
RENAMED = {
    "path_length": "horizon_length",
    "path_most_": "horizon_peak_",
    "path_": "sensitivity_",
    "room": "log_lr_limit",
}


def upgrade(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state_dict to the current format.

    Raises:
        ValueError: a newer version of the project wrote it.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    tower = groups[0].get("tower") if groups else None
    found = {**state_dict, "param_groups": groups}
    if not tower or (form := tower.get("format", 1)) == FORMAT:
        return found
    if form > FORMAT:
        raise ValueError(
            f"this state has format {form}, of a newer version; this version reads 1 to {FORMAT}"
        )

    def renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {
            next((new + n[len(old) :] for old, new in RENAMED.items() if n.startswith(old)), n): x
            for n, x in entries.items()
        }

    levels = [
        {name: renamed(part) if name == "last" else part for name, part in level.items()}
        for level in tower.get("levels", ())
    ]
    groups[0]["tower"] = {**tower, "levels": levels}
    found["state"] = {key: renamed(entries) for key, entries in state_dict["state"].items()}
    return found


# The entries that are saved in addition to the rule's state.
BESIDE = frozenset({"shape", "shard", "active", "moved", "last_grad", "last_weight"})


def by_number(state_dict: Mapping[str, Any], names: Collection[str]) -> dict[int, dict[str, Any]]:
    """The saved entries of each parameter that was moved, by its position in the param groups.

    Args:
        state_dict: the state_dict, with any keys for its parameters.
        names: the names of the rule's state.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    state, ours = state_dict["state"], {*names, *BESIDE}
    return {
        i: {name: value for name, value in state[key].items() if name in ours}
        for i, key in enumerate(keys)
        if key in state and "shard" in state[key]
    }


def foreign(
    state_dict: Mapping[str, Any], names: Collection[str]
) -> tuple[dict[int, dict[str, Any]], dict[Any, Any]]:
    """The entries of other code in `state`: for parameters, by position, and under other keys."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    state, ours = state_dict["state"], {*names, *BESIDE}
    of_parameters = {
        i: {name: value for name, value in state[key].items() if name not in ours}
        for i, key in enumerate(keys)
        if key in state
    }
    return (
        {i: rest for i, rest in of_parameters.items() if rest},
        {key: value for key, value in state.items() if key not in {*keys}},
    )


def add_foreign(saved: dict[str, Any], entries: Mapping[str, Any]) -> None:
    """Add other code's entries of a parameter to its saved entries.

    Raises:
        ValueError: an entry has a name that saving needs.
    """
    if taken := BESIDE & entries.keys():
        raise ValueError(
            f"the state of a parameter has an entry {', '.join(sorted(taken))}, but saving needs "
            "this name; choose another one"
        )
    saved.update(entries)


def like_parameter(p: Tensor, value: Any, key: Any = None) -> Any:
    """Convert other code's entry to the parameter's device and dtype, as torch.optim does."""
    if isinstance(value, Tensor):
        dtype = p.dtype if p.is_floating_point() and key != "step" else value.dtype
        return value.to(p.device, dtype, copy=True)
    if isinstance(value, Mapping):
        return {name: like_parameter(p, one, name) for name, one in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(like_parameter(p, one) for one in value)
    return value


# Check that a state_dict fits.


def check(
    state_dict: Mapping[str, Any],
    stack: Stack,
    active: Sequence[str],
    params: Sequence[list[Tensor]],
    names: Collection[str],
    lowest: Block,
) -> None:
    """Raise if a state_dict does not fit this stack and these parameters.

    Args:
        state_dict: the state_dict, in the current format.
        stack: the stack.
        active: the active hyperparameters of the lowest level.
        params: the parameters of each group.
        names: the names of the lowest level's state.
        lowest: the lowest level.

    Raises:
        ValueError: the stack, the number of parameters, a shape or the division over processes
            differs; or the state is incomplete.
    """
    groups = state_dict.get("param_groups") or [{}]
    tower = groups[0].get("tower")
    if tower is None:
        raise ValueError("this is the state of another optimizer, not of a HyperOptimizer")
    levels = tower.get("levels") or [{}]
    needed = [(tower, ("stack", "on", "levels")), (levels[0], ("steps",))]
    needed += [(level, ("skipped",)) for level in levels]
    needed += [(group, ("params", *stack.levels[0].hypers)) for group in groups]
    for mapping, keys in needed:
        for name in keys:
            if name not in mapping:
                raise ValueError(f"this state is incomplete: it has no {name!r}")
    theirs = tower["stack"]
    # Do not parse an equal notation: some options cannot be parsed.
    if theirs != str(stack):
        known = {**RULES, **{rule.name: type(rule) for rule in stack.levels}}
        if _kind(fold(parse(theirs, known))) != _kind(stack):
            raise ValueError(f"this is the state of the stack {theirs}, not of {stack}")
    if len(tower.get("levels", ())) != len(stack.levels):
        raise ValueError(f"this state is incomplete: it does not have all levels of {stack}")
    if tower["on"] != active:
        raise ValueError(
            f"this is the state of the stack {theirs} with {', '.join(tower['on'])} in "
            f"its param groups, not of {stack} with {', '.join(active)}"
        )
    counts = [len(group["params"]) for group in groups]
    ours = [len(group) for group in params]
    if counts != ours:
        raise ValueError(
            f"this is the state of param groups with {counts} parameters, not with {ours}"
        )
    raws = levels[0].get("tuned", {})
    for number, group in enumerate(groups):
        for name in stack.levels[0].hypers:
            if not isinstance(group[name], Real | list):
                raise ValueError(f"{name} is {group[name]!r} in this state; it must be a number")
            if name not in active and group[name] != 0:
                raise ValueError(
                    f"{name} is {group[name]} in this state, but this optimizer was made with "
                    f"{name} = 0 and its step does not use it; make an optimizer that has {name}"
                )
        tuned = stack.levels[0].tuned if stack.height else {}
        for name in tuned.keys() - {"lr"}:  # lr may be scaled
            how = tuned[name]
            raw, shown = raws.get(f"{name}[{number}]", raws.get(name)), group.get(name)
            if raw is None or not isinstance(shown, float):
                continue
            if not math.isclose(
                float(how.domain.value(torch.as_tensor(raw, device="cpu"))), shown, rel_tol=1e-6
            ):
                raise ValueError(
                    f"{name} was set to {shown:g} in this state, but {stack.levels[1]} moves it; "
                    "make an optimizer with this initial value"
                )
    everyone = [p for group in params for p in group]
    for i, entry in by_number(state_dict, names).items():
        p = everyone[i]
        if (there := list(entry.get("shape", ()))) != list(p.shape):
            raise ValueError(
                f"this is the state of parameters of other shapes: number {i} has "
                f"{tuple(p.shape)} here and {tuple(there)} there"
            )
        kept = {n: x for n, x in entry.items() if isinstance(x, Tensor) and x.ndim}
        shapes = lowest.state_shapes(p)
        if any(value.shape != shapes.get(name, p.shape) for name, value in kept.items()):
            raise ValueError(
                f"this state is incomplete: number {i} has tensors of {[*p.shape]} and others"
            )
        if any(_division(value) != _division(p) for value in kept.values()):
            raise ValueError(
                f"this is the state of parameters that are divided over processes in another way: "
                f"number {i}; load it by torch.distributed.checkpoint.state_dict."
                "set_optimizer_state_dict"
            )


def _division(tensor: Any) -> tuple | None:
    return None if local(tensor) is tensor else (tensor.placements, tensor.device_mesh)


def _kind(stack: Stack) -> list[tuple]:
    """The structure of a stack, without its numbers."""
    return [
        (
            rule.name,
            [(name, how.domain.name, how.per) for name, how in rule.tuned.items()],
            [name for name in rule.hypers if k and rule.is_active(name)],
            [(n, set(value)) for n, value in rule.values.items() if isinstance(value, dict)],
            rule.settings,
        )
        for k, rule in enumerate(stack.levels)
    ]
