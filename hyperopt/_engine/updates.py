"""The three parts of a step, as pure functions of tensors; `packed` runs them in place.

They compute what `hyperopt.algorithm` defines. A level keeps what its rule read at the last step,
its `LastUpdate`, and not what the rule returned. `recompute_last_update` runs the rule again on the
same inputs, which gives both the state to go on from and, by reverse mode, the hypergradients. This
costs one copy of the gradient and, for rules whose update depends on the weights themselves, one of
the weights. A level that nobody tunes keeps its state alone. So does one whose sensitivities are
gathered over a horizon: they are added up as the updates are made, and nothing is recomputed.

Values that are not finite do not spread. If a level's gradient or its update is not finite, the
level skips this step, keeps its state and counts that in `Numbers.skipped`. Level 0 checks only its
gradient and the square of it, which most rules keep and which overflows in float32 from 1.8e19 on.
If the weights skip a step, all levels skip it. (A plain stack, of height 0, does what `torch.optim`
does: it lets infinities and NaN pass.)
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
    size_of_update,
    units,
    zero_rounding_noise,
)
from ..rule import State
from .blocks import Block


class LastUpdate(NamedTuple):
    """What a rule read when it last moved one vector of n weights.

    Attributes:
        w: the weights before the update, [n]; None where the update does not depend on them.
        g: the gradient, [n]; None if nobody will ask.
        state: the state before the update; with no ``g``, the state to go on from.
        applied: 1, or 0 if the last step left the update out, or there was none: ``state`` is then
            the state to go on from, and ``w`` and ``g`` mean nothing.
    """

    w: Tensor | None
    g: Tensor | None
    state: State
    applied: Tensor

    @property
    def inputs(self) -> tuple[Any, Any, State]:
        """What the rule is given to compute the update again.

        If w was not kept, no derivative and no state depends on it, and any vector serves.
        """
        return self.g if self.w is None else self.w, self.g, self.state


class Numbers(NamedTuple):
    """Everything that a stack remembers, except the vectors of the weights.

    A step writes them in this order. ``hyper_updates``, which keep raw values as they were, must
    come before ``raw``.

    Attributes:
        values: the values of the tuned hyperparameters, to be read only. With ``fixed``, which
            follows, these are all hyperparameters in the order of `Layout.names`.
        fixed: per block, the values of the others, [levels, fixed slots].
        hyper_updates: per block but the lowest, the last updates of the raw values below, as one
            `LastUpdate` whose tensors have one row for each level.
        bounds: per block, the lowest and the highest raw values, [2, levels, tuned slots].
        raw: per block, the raw values of the tuned hyperparameters, [levels, tuned slots].
        last_fixed: level 0's ``fixed`` at its last update; they may be set between two steps.
        steps: the number of steps made, 0-dim.
        skipped: how many updates each level has left out because something was not finite,
            [levels].
        effective_lr: if level 0's lr is tuned, what the rule uses in each param group, [groups].
        grads_finite: whether the last step's gradient and its square were finite, 1 or 0.
        shard_scalars: for each shard of the weights its `LastUpdate.applied`, and the 0-dim parts
            of its state.
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
    """Compute level 0's last update of one shard again: its state, and the hypergradients.

    Args:
        raw, fixed: the owner's hyperparameters of level 0 at the last update.
        now: ``fixed`` at the next update, which a trust region bounds.
        w, g: the shard's weights, and its new gradient, [n].

    Returns:
        the state after the last update, or the state before it if it was not applied; and a vector
        for `combine_estimate`: `Block.rows` rows of one number for each of ``raw``, then the
        largest square in ``g``. The first row is g · s; an update that was not applied has s = 0.
    """
    start, state, normalize = last.state, last.state, block.estimator.normalize
    sensitivities = [start[f"sensitivity_{name}"] for name in block.names if block.gathers]
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
    if block.is_bounded:

        def next_update(raw: Tensor) -> tuple[Tensor, State]:
            return block.rule.update(w, g, state, block.values(raw, now))

        # The derivative with respect to the learned lr is what one of 1 would add to the weights.
        lr = block.names.index("lr")
        unit = units(raw)[lr] / block.from_raw(raw)[lr]
        (update,), _ = derivatives(next_update, raw, g, [unit])
        rows += [size.expand(len(raw)) for size in size_of_update(update, w, raw.dtype)]
    largest = g.reshape(-1).abs().amax(0, keepdim=True) if g.numel() else g.new_zeros(1)
    return state, torch.cat([row.to(raw.dtype) for row in [*rows, largest * largest]])


def without_noise(block: Block, raw: Tensor, found: list[Tensor], update: Tensor) -> list[Tensor]:
    """`zero_rounding_noise` for a block: betas are the hyperparameters that end at 1."""
    forgets = [block.rule.hypers[name].high == 1.0 for name in block.names]
    return zero_rounding_noise(forgets, block.from_raw, raw, found, update)


def combine_estimate(block: Block, raw: Tensor, sums: Tensor) -> tuple[Tensor, Tensor | None]:
    """The hypergradient of level 0 from the sums over all shards.

    Args:
        raw: the raw values of level 0, [tuned slots].
        sums: of what `recompute_last_update` has returned, [Block.rows * tuned slots].

    Returns:
        the hypergradient; and, if the level above bounds updates, the raw values with which the
        update would be as large as the weights.
    """
    hypergradient, *rows = sums.view(block.rows, len(raw)).unbind()
    if block.estimator.normalize:
        hypergradient = cosine(hypergradient, *rows[:2])
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
    """Hypergradients from the bottom, then hyperparameters from the top.

    Args:
        numbers: their ``shard_scalars`` are not read.
        sums: for `combine_estimate`.
        finite_probe: not finite if a gradient of the weights, or its square, is not, 0-dim.
    """
    finite = finite_probe.isfinite()
    numbers = numbers._replace(grads_finite=finite.to(numbers.steps.dtype))
    hypergradient, limit = combine_estimate(blocks[0], numbers.raw[0][0], sums)
    hypergradient = torch.where(finite, hypergradient, math.nan)  # NaN makes all levels skip
    found, states, skipped = hypergradients(blocks, numbers, hypergradient)
    return move_hyperparameters(blocks, numbers, found, states, skipped, limit)


def hypergradients(
    blocks: Sequence[Block], numbers: Numbers, lowest: Tensor
) -> tuple[list[Tensor], list[State], list[Tensor]]:
    """dr_k = dr_{k-1}ᵀ ∂U_k/∂r_k, bottom up.

    Args:
        lowest: dr_0.

    Returns:
        for each level but the topmost the hypergradient that the level above is given; for each
        block but the lowest the states to go on from, and whether its levels missed an update.
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
        for i, jacobian in enumerate(each, len(found) - 1):
            low, high = bounds[i]
            free = (low < raws[i]) & (raws[i] < high)
            # A clamped value does not depend on the level above.
            jacobian = torch.where(free[:, None], jacobian, 0.0)
            found[-1] = g = block.rule.policy.clipping(found[-1])
            product = (g[:, None] * jacobian).sum(0)
            if block.estimator.normalize:
                product = cosine(product, (g * g).sum(), (jacobian * jacobian).sum(0))
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
    """r_{k-1} ← U_k(r_{k-1}, dr_{k-1}, s_k; T(r_k)), top down.

    Args:
        gradients, states, skipped: from `hypergradients`.
        limit: from `combine_estimate`.
    """
    raws = [row for raw in numbers.raw for row in raw]
    bounds = [row for bound in numbers.bounds for row in bound.unbind(1)]
    missed = [*skipped]
    updates: list[LastUpdate] = []
    k = len(raws) - 1
    for b in reversed(range(1, len(blocks))):
        block, state, below = blocks[b], states[b - 1], range(k - blocks[b].count, k)
        if "log_lr_limit" in state and limit is not None:
            # It is infinite for an update of 0, and NaN for one that is not finite.
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
    """The raw values of level 0, with log lr lowered to ``limit + log(trust)``.

    Args:
        limit: the raw values with which an update would be as large as the weights.
        low: the lowest legal raw values.
        finite: `Numbers.grads_finite`.
    """
    most = limit + torch.log(trust)
    return torch.where((most < raw) & (finite > 0), most.maximum(low), raw)


def jacobians(
    block: Block, raw: Tensor, fixed: Tensor, last: LastUpdate
) -> tuple[State, list[Tensor], Tensor]:
    """Compute the last updates of a block's levels again, all at once.

    Returns:
        the states after the updates; for each level ∂(raw values below)/∂(its raw values), [tuned
        slots below, tuned slots]; and which levels keep their state because the new one is not
        finite, [levels]. An update that was not applied keeps the old state and has derivative 0.
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
    """Apply the lowest rule to one shard: its new weights, and the state after.

    Args:
        raw, fixed: the owner's hyperparameters.
        finite: `Numbers.grads_finite`; if it is 0 and the rule is tuned, nothing changes.
    """

    def update(raw: Tensor) -> tuple[Tensor, State]:
        return block.rule.update(w, g, state, block.values(raw, fixed))

    def with_new(raw: Tensor) -> tuple[Tensor, tuple[Tensor, State]]:
        new, after = update(raw)
        return new, (new, after)

    if block.gathers:
        found, (new, after) = derivatives(with_new, raw, g, traced=block.rule.compiles)
    else:
        new, after = update(raw)
    if not block.tuned:
        return new, after
    if block.gathers:
        if block.estimator.normalize:
            found = without_noise(block, raw, found, new - w)
        values = dict(zip(block.names, block.from_raw(raw).unbind(), strict=True))
        after = {**after, **block.estimator.accumulate(state, values, found)}
        after = {
            name: torch.where(finite > 0, after[name], block.skipped(name, old))
            for name, old in state.items()
        }
    return torch.where(finite > 0, new, w), after
