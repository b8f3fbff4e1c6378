"""The three parts of a step, as pure functions of tensors; `step` runs them in place.

They compute the algorithm of `hyperopt.algorithm`. A level stores the inputs of its rule at the
last step, as a `LastUpdate`, and not the results. `recompute_last_update` runs the rule again on
the same inputs. This gives the state after the update and, by reverse mode, the hypergradients. It
costs one copy of the gradient and, if the change of the weights depends on the weights, one copy of
the weights. A level that is not tuned stores only its state. Level 0 with a long horizon, or with a
rule that is not elementwise, accumulates sensitivities when it makes an update, and recomputes
nothing (`Block.stores_sensitivities`).

Values that are not finite do not spread. If a level's gradient or update is not finite, the level
skips the step, keeps its state, and counts the skip in `Numbers.skipped`. If only the new state is
not finite, the update stays, and the next step keeps the old state and counts the skip. Level 0
checks only its gradient and the squared gradient, which most rules store and which overflows in
float32 above 1.8e19. If the weights skip a step, all levels skip it. (A plain stack, of height 0,
lets infinities and NaN pass, as `torch.optim` does.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..estimators import (
    UNBOUNDED,
    cosine,
    derivatives,
    log_lr_limit,
    per_square,
    size_of_update,
    units,
    zero_rounding_noise,
)
from ..rule import State
from .blocks import Block


class LastUpdate(NamedTuple):
    """The inputs of the last update of one vector of n weights.

    Attributes:
        w: the weights before the update, [n]; None if the change does not depend on them.
        g: the gradient, [n]; None if the update is never recomputed.
        state: the state before the update. Without ``g``, the state after it.
        applied: 1 if the last step made the update. 0 if it skipped it, or if no step was made:
            ``state`` is then the current state, and ``w`` and ``g`` have no meaning.
    """

    w: Tensor | None
    g: Tensor | None
    state: State
    applied: Tensor

    @property
    def inputs(self) -> tuple[Any, Any, State]:
        """The arguments for the rule to recompute the update.

        If w is None, no derivative and no state depends on it, so that any vector can replace it.
        """
        return self.g if self.w is None else self.w, self.g, self.state


class Numbers(NamedTuple):
    """The memory of a stack, except the vectors of the shards.

    A step writes them in this order. ``hyper_updates`` store raw values from before the step, so
    they must be written before ``raw``.

    Attributes:
        values: the values of the tuned hyperparameters, only to be read. ``values`` and ``fixed``
            together are all hyperparameters in the order of `Layout.names`.
        fixed: per block, the values of the constants, [levels, fixed slots].
        hyper_updates: per block except the lowest, the last updates of the raw values below: one
            `LastUpdate` whose tensors have one row for each level.
        bounds: per block, the lowest and the highest raw values, [2, levels, tuned slots].
        raw: per block, the raw values of the tuned hyperparameters, [levels, tuned slots].
        last_fixed: level 0's ``fixed`` at its last update. ``fixed`` may be set between two steps.
        steps: the number of steps made, 0-dim.
        skipped: the number of updates that each level has skipped because a value was not finite,
            [levels].
        effective_lr: if level 0's lr is tuned, the effective lr of each param group, [groups].
        grads_finite: 1 if the last step's gradient and its square were finite, otherwise 0.
        shard_scalars: for each shard, its `LastUpdate.applied` and the 0-dim entries of its state.
    """

    values: Any
    fixed: Any
    hyper_updates: Any
    bounds: Any
    raw: Any
    last_fixed: Any
    steps: Any
    skipped: Any
    effective_lr: Any
    grads_finite: Any
    shard_scalars: Any


def recompute_last_update(
    block: Block,
    raw: Tensor,
    fixed: Tensor,
    now: Tensor,
    last: LastUpdate,
    w: Tensor,
    g: Tensor,
) -> tuple[State, Tensor]:
    """Recompute level 0's last update of one shard, for its state and the hypergradients.

    Args:
        block: the lowest level.
        raw, fixed: the owner's hyperparameters of level 0 at the last update.
        now: ``fixed`` at the next update, for the bound of a trust region.
        last: the inputs of the last update.
        w, g: the shard's weights and its new gradient, [n].

    Returns:
        the state after the last update, or before it if it was not applied; and a vector for
        `combine_estimate`: `Block.rows` rows with one number for each of ``raw``, then the largest
        squared element of ``g``. The first row is g · s. s is 0 if the update was not applied.
    """
    start, state, normalize = last.state, last.state, block.estimator.normalize
    sensitivities = [
        start[f"sensitivity_{name}"] for name in block.names if block.stores_sensitivities
    ]
    rows: list[Tensor] = []
    if last.g is not None:

        def last_update(raw: Tensor) -> tuple[Tensor, State]:
            return block.rule.update(*last.inputs, block.values(raw, fixed))

        was_applied = last.applied > 0
        if normalize:
            sensitivities, after = derivatives(last_update, raw, g)
            added = last_update(raw)[0] - last.inputs[0]
            sensitivities = without_noise(block, raw, sensitivities, added)
            sensitivities = [torch.where(was_applied, s, 0.0) for s in sensitivities]
        else:
            _, pullback, after = torch.func.vjp(last_update, raw, has_aux=True)  # type: ignore[misc]
            rows = [torch.where(was_applied, pullback(g)[0], 0.0)]
        state = {name: torch.where(was_applied, after[name], old) for name, old in start.items()}
    if sensitivities:
        rows = [torch.stack([(g * s).sum() for s in sensitivities])]
    if normalize:
        rows += [(g * g).sum().expand(len(raw))]
        rows += [torch.stack([(s * s).sum() for s in sensitivities])]
    if block.estimator.surrogate:
        square = start["last_square"] if last.g is None else (last.g * last.g).sum()
        rows += [square.expand(len(raw))]
    if block.is_bounded:

        def next_update(raw: Tensor) -> tuple[Tensor, State]:
            return block.rule.update(w, g, state, block.values(raw, now))

        # For an update that is linear in lr, the derivative with respect to the learned lr is the
        # change of the weights at lr = 1. Other rules refuse a trust region.
        lr = block.names.index("lr")
        unit = units(raw)[lr] / block.from_raw(raw)[lr]
        (update,), _ = derivatives(next_update, raw, g, [unit])
        rows += [size.expand(len(raw)) for size in size_of_update(update, w, raw.dtype)]
    largest = g.reshape(-1).abs().amax(0, keepdim=True) if g.numel() else g.new_zeros(1)
    return state, torch.cat([row.to(raw.dtype) for row in [*rows, largest * largest]])


def without_noise(block: Block, raw: Tensor, found: list[Tensor], update: Tensor) -> list[Tensor]:
    """Apply `zero_rounding_noise` to a block. Its betas have the upper bound 1."""
    forgets = [block.rule.hypers[name].high == 1.0 for name in block.names]
    return zero_rounding_noise(forgets, block.from_raw, raw, found, update)


def combine_estimate(block: Block, raw: Tensor, sums: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute the hypergradient of level 0 from the sums over all shards.

    Args:
        block: the lowest level.
        raw: the raw values of level 0, [tuned slots].
        sums: the summed vectors of `recompute_last_update`, [Block.rows * tuned slots].

    Returns:
        the hypergradient, [tuned slots]; and, if the level above bounds updates, the raw values
        [tuned slots] at which the norm of the update equals the norm of the weights. They are
        infinite for hyperparameters other than lr.
    """
    hypergradient, *rows = sums.view(block.rows, len(raw)).unbind()
    if block.estimator.normalize:
        hypergradient = cosine(hypergradient, *rows[:2])
    if block.estimator.surrogate:
        # A shard adds its square to one slot of each hyperparameter. So the slots of any one
        # hyperparameter sum to the whole. Never with `normalize`, so the square is the first row.
        count = sum(slot.name == block.tuned[0].name for slot in block.tuned)
        hypergradient = per_square(hypergradient, rows[0][:count].sum())
    if not block.is_bounded:
        return hypergradient, None
    limit = log_lr_limit(*rows[-2:])
    is_lr = [slot.name == "lr" for slot in block.tuned]
    first, end = is_lr.index(True), is_lr.index(True) + sum(is_lr)
    free = torch.full_like(raw, math.inf)
    return hypergradient, torch.cat([free[:first], limit[first:end], free[end:]])


def update_hyperparameters(
    blocks: Sequence[Block], numbers: Numbers, sums: Tensor, finite_probe: Tensor
) -> Numbers:
    """Compute the hypergradients from the bottom, then move the hyperparameters from the top.

    Args:
        blocks: the blocks of the stack.
        numbers: the current numbers; ``shard_scalars`` are not used.
        sums: the sums for `combine_estimate`.
        finite_probe: a number that is finite only if all gradients of the weights, and their
            squares, are finite, 0-dim.

    Returns:
        the new numbers.
    """
    finite = finite_probe.isfinite()
    numbers = numbers._replace(grads_finite=finite.to(numbers.steps.dtype))
    hypergradient, limit = combine_estimate(blocks[0], numbers.raw[0][0], sums)
    hypergradient = torch.where(finite, hypergradient, math.nan)  # NaN makes all levels skip
    found, states, skipped = hypergradients(blocks, numbers, hypergradient)
    return move_hyperparameters(blocks, numbers, found, states, skipped, limit)


def squared_norms(g: Tensor, below: Block, block: Block) -> Tensor:
    """For each value of a block, the squared norm of ``g`` on the values below that it moves."""
    squares = list(zip(below.tuned, (g * g).unbind(), strict=True))
    own = [[x for other, x in squares if slot.owner in (None, other.name)] for slot in block.tuned]
    return torch.stack([torch.stack(each).sum() for each in own])


def hypergradients(
    blocks: Sequence[Block], numbers: Numbers, lowest: Tensor
) -> tuple[list[Tensor], list[State], list[Tensor]]:
    """Compute dr_k = dr_{k-1}ᵀ ∂U_k/∂r_k from the bottom up.

    Args:
        blocks, numbers: the stack.
        lowest: dr_0.

    Returns:
        for each level, the hypergradient that the level above receives (empty for the top); for
        each block except the lowest, the states after the last updates, and which levels discarded
        the state of their last update.
    """
    raws = [row for raw in numbers.raw for row in raw]
    bounds = [row for bound in numbers.bounds for row in bound.unbind(1)]
    found, states, skipped = [lowest], [], []
    for block, raw, fixed, last in zip(
        blocks[1:], numbers.raw[1:], numbers.fixed[1:], numbers.hyper_updates, strict=True
    ):
        after, each, missed = jacobians(block, raw, fixed, last)
        states.append(after)
        skipped.append(missed)
        first = len(found) - 1
        for i, jacobian in enumerate(each, first):
            low, high = bounds[i]
            free = (low < raws[i]) & (raws[i] < high)
            # A clamped value does not depend on the level above.
            jacobian = torch.where(free[:, None], jacobian, 0.0)
            found[-1] = g = block.rule.policy.clipping(found[-1])
            product = (g[:, None] * jacobian).sum(0)
            if block.estimator.normalize:
                below = blocks[len(states) - 1] if i == first else block
                squared_norm = (g * g).sum()
                if any(slot.owner for slot in block.tuned):
                    squared_norm = squared_norms(g, below, block)
                product = cosine(product, squared_norm, (jacobian * jacobian).sum(0))
            if block.estimator.surrogate:
                used = last.g[i - first]
                product = per_square(product, (used * used).sum())
            found.append(product)
    return found, states, skipped


def move_hyperparameters(
    blocks: Sequence[Block],
    numbers: Numbers,
    gradients: Sequence[Tensor],
    states: Sequence[State],
    skipped: Sequence[Tensor],
    limit: Tensor | None,
) -> Numbers:
    """Apply r_{k-1} ← U_k(r_{k-1}, dr_{k-1}, s_k; T(r_k)) from the top down.

    Args:
        blocks, numbers: the stack.
        gradients, states, skipped: the results of `hypergradients`.
        limit: the second result of `combine_estimate`.

    Returns:
        the new numbers.
    """
    raws = [row for raw in numbers.raw for row in raw]
    bounds = [row for bound in numbers.bounds for row in bound.unbind(1)]
    missed = [*skipped]
    updates: list[LastUpdate] = []
    k = len(raws) - 1
    for b in reversed(range(1, len(blocks))):
        block, state, below = blocks[b], states[b - 1], range(k - blocks[b].count, k)
        if "log_lr_limit" in state and limit is not None:
            # The limit is infinite if the update is 0, and NaN if the update is not finite.
            known = torch.nan_to_num(limit, UNBOUNDED, UNBOUNDED).clamp(max=UNBOUNDED)
            state = {**state, "log_lr_limit": known[None]}
        vectors = [raws[i] for i in below]
        own = torch.stack([gradients[i] for i in below])
        is_update_step = block.rule.policy.timing.is_update_step(numbers.steps)
        finite = [*own.isfinite().all(1)]
        for i in reversed(range(block.count)):
            h = block.values(raws[k], numbers.fixed[b][i])
            rows = {name: part[i] for name, part in state.items()}
            new, _ = block.rule.update(vectors[i], own[i], rows, h)
            finite[i] = finite[i] & ((new * 0).sum() == 0)  # NaN unless all are finite
            applied = finite[i] if is_update_step is None else finite[i] & is_update_step
            low, high = bounds[k - 1]
            raws[k - 1] = torch.where(applied, new.clamp(low, high), vectors[i])
            k -= 1
        if block.has_trust and limit is not None:
            # This block has one level, so `h` has its hyperparameters.
            raws[0] = bound_lr(raws[0], limit, h.trust, bounds[0][0], numbers.grads_finite)
        w = torch.stack(vectors) if block.keeps_weights else torch.zeros_like(own)
        made, left_out = torch.stack(finite), ~torch.stack(finite)
        if is_update_step is not None:
            made, left_out = made & is_update_step, left_out & is_update_step
        missed[b - 1] = missed[b - 1] + left_out
        updates.insert(0, LastUpdate(w, own, state, made.to(own.dtype)))

    ends = itertools.accumulate(block.count for block in blocks)
    raw = [
        torch.stack(raws[end - block.count : end]) for block, end in zip(blocks, ends, strict=True)
    ]
    values = torch.cat(
        [block.from_raw(own).reshape(-1) for block, own in zip(blocks, raw, strict=True)]
    )
    lowest, fixed = blocks[0], numbers.fixed[0][0]
    return numbers._replace(
        values=values,
        hyper_updates=updates,
        raw=raw,
        last_fixed=fixed,
        steps=numbers.steps + 1,
        skipped=numbers.skipped + torch.cat([1 - numbers.grads_finite.view(1), *missed]),
        effective_lr=lowest.effective_lr(values[: len(lowest.tuned)], fixed),
    )


def bound_lr(raw: Tensor, limit: Tensor, trust: Tensor, low: Tensor, finite: Tensor) -> Tensor:
    """Lower the log lr in the raw values of level 0 to at most ``limit + log(trust)``.

    Args:
        raw: the raw values, [tuned slots].
        limit: the raw values at which the norm of an update equals the norm of the weights.
        trust: the largest ratio of the two norms, 0-dim.
        low: the lowest legal raw values.
        finite: `Numbers.grads_finite`.
    """
    most = limit + torch.log(trust)
    return torch.where((most < raw) & (finite > 0), most.maximum(low), raw)


def jacobians(
    block: Block, raw: Tensor, fixed: Tensor, last: LastUpdate
) -> tuple[State, list[Tensor], Tensor]:
    """Recompute and differentiate the last updates of a block's levels, all at once.

    Args:
        block: a block above the lowest.
        raw, fixed: its hyperparameters, [levels, slots].
        last: its row of `Numbers.hyper_updates`.

    Returns:
        the states after the updates; for each level ∂(raw values below)/∂(its raw values), [tuned
        slots below, tuned slots]; and which levels keep the old state because the new one is not
        finite, [levels]. If an update was not applied, the state is the old one and the derivative
        is 0.
    """
    n = raw.shape[1]

    def last_update(
        raw: Tensor, fixed: Tensor, w: Tensor, g: Tensor, state: State
    ) -> tuple[Tensor, State]:
        return block.update(w, g, state, raw, fixed)

    w = last.w if block.keeps_weights else last.g
    inputs: Any = raw, fixed, w, last.g, last.state
    if n:
        jacobian, after = torch.vmap(torch.func.jacrev(last_update, has_aux=True))(*inputs)
    else:
        assert last.g is not None
        jacobian = last.g.new_zeros(*last.g.shape, n)
        after = torch.vmap(last_update)(*inputs)[1]
    applied = last.applied > 0
    sound = applied
    for rows in after.values():
        sound = sound & rows.isfinite().reshape(len(rows), -1).all(1)

    def where(new: Tensor, old: Tensor | float) -> Tensor:
        return torch.where(sound.view(-1, *[1] * (new.ndim - 1)), new, old)

    state = {name: where(after[name], rows) for name, rows in last.state.items()}
    return state, list(where(jacobian, 0.0)), applied & ~sound


def update_weights(
    block: Block, raw: Tensor, fixed: Tensor, w: Tensor, g: Tensor, state: State, finite: Tensor
) -> tuple[Tensor, State]:
    """Apply the lowest rule to one shard. Returns the new weights and the new state.

    Args:
        block: the lowest level.
        raw, fixed: the owner's hyperparameters.
        w, g: the weights and their gradient, [n].
        state: the state of the rule.
        finite: `Numbers.grads_finite`. If it is 0 and the rule is tuned, nothing changes.
    """

    def update(raw: Tensor) -> tuple[Tensor, State]:
        return block.rule.update(w, g, state, block.values(raw, fixed))

    def with_new(raw: Tensor) -> tuple[Tensor, tuple[Tensor, State]]:
        new, after = update(raw)
        return new, (new, after)

    if block.stores_sensitivities:
        found, (new, after) = derivatives(with_new, raw, g, traced=block.rule.compiles)
    else:
        new, after = update(raw)
    if not block.tuned:
        return new, after
    if block.stores_sensitivities:
        if block.estimator.normalize:
            found = without_noise(block, raw, found, new - w)
        values = dict(zip(block.names, block.from_raw(raw).unbind(), strict=True))
        after = {**after, **block.estimator.accumulate(state, values, found)}
        if block.estimator.surrogate:
            after["last_square"] = (g * g).sum().to(raw.dtype)
        after = {
            name: torch.where(finite > 0, after[name], block.skipped(name, old))
            for name, old in state.items()
        }
    return torch.where(finite > 0, new, w), after
