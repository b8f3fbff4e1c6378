"""The pure step of a whole stack: tensors in, tensors out.

One step of a stack of height n, with weights w, gradient G, rules U_k, raw hyperparameters r_k and
state s_k (level 0 moves the weights):

1. Hypergradients, bottom up. The last step made w = U_0(w', G', s_0'; T(r_0)), so
   dr_0 = G^T dU_0/dr_0 at those previous values, and dr_k = dr_{k-1}^T dU_k/dr_k in the same way.
2. Hyperparameters, top down: r_{k-1} <- U_k(r_{k-1}, dr_{k-1}, s_k; T(r_k)), r_k being the new one.
3. Weights: w <- U_0(w, G, s_0; T(r_0)), r_0 being the new one.

Everything older than one step is a constant, and so is G: no second derivative of the model is
needed (Chandra et al. 2022, section 2).

A level therefore keeps what its rule read at the last step, its `Move`, and not what the rule
returned: the next step runs the rule again on the same inputs, which gives both the state to go on
from and, by reverse-mode differentiation, the hypergradients. This costs one copy of the gradient
and, for rules whose update depends on the weights themselves, one of the weights. Weights whose
rule nobody tunes need none of this: their level keeps the state alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .rules import Rule, State
from .stack import Stack


class Move(NamedTuple):
    """What a rule read when it last moved one vector of n weights.

    Attributes:
        w: the weights before the move, [n]; None where the update does not depend on them.
        g: the gradient, [n]; None if nothing has been moved yet, or nobody will ask.
        state: the state before the move; with no ``g``, the state to go on from.
    """

    w: Tensor | None
    g: Tensor | None
    state: State


class TowerState(NamedTuple):
    """Everything that a stack remembers from one step to the next.

    Attributes:
        raw: per block, the raw values of the tuned hyperparameters, [levels, tuned slots].
        fixed: per block, the values of the others, [levels, fixed slots].
        last_fixed: those of the lowest level when it last moved, since they may be set from outside
            between two steps.
        lowest: the last move of each shard of the weights.
        upper: per block but the lowest, the last moves of the raw values below, as one `Move` whose
            tensors have one row for each level.
    """

    raw: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    last_fixed: Tensor
    lowest: tuple[Move, ...]
    upper: tuple[Move, ...]


@dataclass(frozen=True)
class Slot:
    """One value of a hyperparameter: for everything that the level moves, or for one owner alone.

    On level 0 an owner is the number of a param group; above, the name of a hyperparameter below.
    """

    name: str
    owner: int | str | None = None

    def __str__(self) -> str:
        return self.name if self.owner is None else f"{self.name}[{self.owner}]"


@dataclass(frozen=True)
class Block:
    """The static shape of equal levels that stand on each other, mostly of one level alone.

    Levels are equal if they differ in numbers only. A tall tower of one rule is then little more
    work to differentiate, and to compile, than a low one. The lowest level is a block of its own.

    Attributes:
        rule: what each level computes. Its initial values are not used.
        tuned: the slots of the raw values, which the level above moves.
        fixed: the slots of the constants.
        owners: who owns each vector that is moved: on level 0 the param group of each shard, above
            one tuple with the names of the hyperparameters below, element by element.
        depends_on_weights: whether `Move.w` is kept.
        count: the number of levels.
    """

    rule: Rule
    tuned: tuple[Slot, ...]
    fixed: tuple[Slot, ...]
    owners: tuple[int | tuple[str, ...], ...]
    depends_on_weights: bool
    count: int = 1

    def values(self, raw: Tensor, fixed: Tensor, owner: int | tuple[str, ...]) -> SimpleNamespace:
        """The namespace h that the rule reads, for the vector that belongs to ``owner``."""
        slots = {
            slot: self.rule.tuned[slot.name].value(r)
            for slot, r in zip(self.tuned, raw, strict=True)
        }
        slots |= dict(zip(self.fixed, fixed, strict=True))

        def value(name: str) -> Tensor:
            if isinstance(owner, int):
                return slots[Slot(name, owner) if Slot(name, owner) in slots else Slot(name)]
            if Slot(name) in slots:
                return slots[Slot(name)]
            return torch.stack([slots[Slot(name, one)] for one in owner])

        return SimpleNamespace(**{name: value(name) for name in self.rule.hypers})

    def structure(self) -> tuple:
        """What tells two blocks apart but for numbers; equal structures share a compiled step."""
        rule = self.rule
        return (
            type(rule),
            tuple(rule.settings.items()),
            tuple((name, domain.name) for name, domain in rule.tuned.items()),
            tuple(name for name in rule.hypers if rule.on(name)),
            self.tuned,
            self.fixed,
            self.owners,
            self.depends_on_weights,
            self.count,
        )


def build(stack: Stack, overrides: Sequence[frozenset[str]] = (frozenset(),)) -> tuple[Block, ...]:
    """The blocks of a stack whose weights come in param groups; no shard is laid out yet.

    Args:
        overrides: for each param group, the hyperparameters of the lowest level for which it has a
            value of its own. One that is tuned and not overridden is shared by the groups.
    """
    groups = range(len(overrides))
    blocks: list[Block] = []
    for k, rule in enumerate(stack.levels):
        top = k == stack.height
        tuned: list[Slot] = []
        fixed: list[Slot] = []
        for name in rule.hypers:
            owners: list[int | str | None] = [None]
            value = rule.values[name]
            if k > 0 and isinstance(value, dict):
                owners = list(value)
            elif k == 0 and len(groups) > 1:
                moved = name in rule.tuned and not top
                owners = [g for g in groups if name in overrides[g] or not moved]
                if len(owners) < len(groups):
                    owners.insert(0, None)
            slots = tuned if name in rule.tuned and not top else fixed
            slots += [Slot(name, owner) for owner in owners]
        below = (tuple(slot.name for slot in blocks[-1].tuned),) if k else ()
        keeps_weights = bool(tuned) and depends_on_weights(rule)
        block = Block(rule, tuple(tuned), tuple(fixed), below, keeps_weights)
        if k > 1 and replace(blocks[-1], count=1).structure() == block.structure():
            blocks[-1] = replace(blocks[-1], count=blocks[-1].count + 1)
        else:
            blocks.append(block)
    return tuple(blocks)


def depends_on_weights(rule: Rule) -> bool:
    """Whether an update is more than ``w`` minus something that does not depend on ``w``.

    Asked of the derivative at random points: only such rules need the weights of the last step.
    """
    with torch.device("cpu"):  # whatever the default device
        generator = torch.Generator().manual_seed(0)
        w, g = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        h = SimpleNamespace(
            **{name: torch.tensor(0.5, dtype=torch.float64) for name in rule.hypers}
        )
        (_, state), pullback = torch.func.vjp(  # type: ignore[misc]
            lambda w: rule.update(w, g, rule.init(g), h), w
        )
        zeros = {name: torch.zeros_like(value) for name, value in state.items()}
        (through_weights,) = pullback((g, zeros))
        (through_state,) = pullback(
            (torch.zeros_like(w), {n: torch.ones_like(v) for n, v in state.items()})
        )
    return not torch.equal(through_weights, g) or bool(through_state.any())


def step(
    blocks: Sequence[Block], tower: TowerState, weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[list[Tensor], TowerState]:
    """One step of the whole stack.

    Args:
        blocks: the static shape of the stack.
        weights, grads: the weights and their gradient, one pair of equally long 1-D tensors for
            each shard.

    Returns:
        the new weights, shard by shard, and the new state of the tower.
    """
    lowest, raw, fixed = blocks[0], tower.raw[0][0], tower.fixed[0][0]
    states, hypergradient = [], torch.zeros_like(raw)
    for owner, last, g in zip(lowest.owners, tower.lowest, grads, strict=True):
        state, part = replay(lowest, raw, tower.last_fixed, owner, last, g)
        states.append(state)
        hypergradient = hypergradient + part

    tower = climb(blocks, tower, hypergradient)

    moved, moves = [], []
    for owner, state, w, g in zip(lowest.owners, states, weights, grads, strict=True):
        new, after = advance(lowest, tower.raw[0][0], fixed, owner, w, g, state)
        moved.append(new)
        kept = Move(w if lowest.depends_on_weights else None, g, state)
        moves.append(kept if lowest.tuned else Move(None, None, after))
    return moved, tower._replace(lowest=tuple(moves))


def replay(
    block: Block, raw: Tensor, fixed: Tensor, owner: int | tuple[str, ...], last: Move, g: Tensor
) -> tuple[State, Tensor]:
    """Run the last move of one shard again: the state that it led to, and the hypergradients.

    Args:
        raw, fixed: the hyperparameters of level 0 that the move was made with.
        g: the shard's new gradient.

    Returns:
        the state after the move, and the gradient with respect to ``raw``, [tuned slots]; the
        initial state and zero if nothing was moved.
    """
    before, gradient, start = last
    if gradient is None:
        return start, torch.zeros_like(raw)
    # Where w was not kept, no derivative and no state depends on it: any vector will do.
    w = gradient if before is None else before

    def rerun(raw: Tensor) -> tuple[Tensor, State]:
        return block.rule.update(w, gradient, start, block.values(raw, fixed, owner))

    _, pullback, state = torch.func.vjp(rerun, raw, has_aux=True)  # type: ignore[misc]
    return state, pullback(g)[0]


def climb(blocks: Sequence[Block], tower: TowerState, hypergradient: Tensor) -> TowerState:
    """Move the hyperparameters of all levels.

    Args:
        hypergradient: that of level 0, summed over the shards, [tuned slots].

    Returns:
        the tower with its new raw values and the upper levels' moves; level 0's are left alone.
    """
    raws = [row for raw in tower.raw for row in raw]
    upper = list(enumerate(blocks))[1:]

    # Hypergradients, bottom up: dr_k = dr_{k-1}^T dU_k/dr_k.
    hypergradients, states = [hypergradient], []
    for b, block in upper:
        after, jacobians = differentiate(block, tower.raw[b], tower.fixed[b], tower.upper[b - 1])
        states.append(after)
        for jacobian in jacobians:
            hypergradients.append((hypergradients[-1][:, None] * jacobian).sum(0))

    # Hyperparameters, top down.
    moves: list[Move] = []
    k = len(raws) - 1
    for b, block in reversed(upper):
        state, below = states[b - 1], range(k - block.count, k)
        vectors, gradients = [raws[i] for i in below], [hypergradients[i] for i in below]
        for i in reversed(range(block.count)):
            own = {name: rows[i] for name, rows in state.items()}
            fixed, owner = tower.fixed[b][i], block.owners[0]
            raws[k - 1] = advance(block, raws[k], fixed, owner, vectors[i], gradients[i], own)[0]
            k -= 1
        w = torch.stack(vectors) if block.depends_on_weights else None
        moves.insert(0, Move(w, torch.stack(gradients), state))

    ends = itertools.accumulate(block.count for block in blocks)
    raw = [
        torch.stack(raws[end - block.count : end]) for block, end in zip(blocks, ends, strict=True)
    ]
    return tower._replace(raw=tuple(raw), last_fixed=tower.fixed[0][0], upper=tuple(moves))


def advance(
    block: Block,
    raw: Tensor,
    fixed: Tensor,
    owner: int | tuple[str, ...],
    w: Tensor,
    g: Tensor,
    state: State,
) -> tuple[Tensor, State]:
    """Where a rule moves one vector, and the state after it."""
    return block.rule.update(w, g, state, block.values(raw, fixed, owner))


def differentiate(
    block: Block, raw: Tensor, fixed: Tensor, move: Move
) -> tuple[State, list[Tensor]]:
    """Run the last moves of a block's levels again, all at once.

    Returns:
        the states that they led to, and for each level the derivative of the raw values that it
        moved with respect to its own, [tuned slots below, tuned slots]; zero if nothing was moved.
    """
    count, n = raw.shape
    if move.g is None:
        below = len(block.owners[0])  # type: ignore[arg-type]
        return move.state, list(raw.new_zeros(count, below, n))

    def rerun(
        raw: Tensor, fixed: Tensor, w: Tensor, g: Tensor, state: State
    ) -> tuple[Tensor, State]:
        return block.rule.update(w, g, state, block.values(raw, fixed, block.owners[0]))

    w = move.g if move.w is None else move.w
    inputs = raw, fixed, w, move.g, move.state
    if n == 0:
        return torch.vmap(rerun)(*inputs)[1], list(raw.new_zeros(count, w.shape[1], n))
    jacobian, after = torch.vmap(torch.func.jacrev(rerun, has_aux=True))(*inputs)
    return after, list(jacobian)
