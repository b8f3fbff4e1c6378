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
and, for rules whose update depends on the weights themselves, one of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        g: the gradient, [n]; None if nothing has been moved yet.
        state: the state before the move; the initial state if nothing has been moved yet.
    """

    w: Tensor | None
    g: Tensor | None
    state: State


class TowerState(NamedTuple):
    """Everything that a stack remembers from one step to the next.

    Attributes:
        raw: per level, the raw values of its tuned hyperparameters, [slots of that level].
        fixed: per level, the values of the others, [slots of that level].
        moves: per level, the last moves of its rule: on level 0 one for each shard of the weights,
            on the others one, that of the level below's raw values.
    """

    raw: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    moves: tuple[tuple[Move, ...], ...]


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
class Level:
    """The static shape of one level: its rule, and where its hyperparameters' values are kept.

    Attributes:
        rule: what it computes. Its initial values are not used.
        tuned: the slots of the raw values, which the level above moves.
        fixed: the slots of the constants.
        owners: who owns each vector that is moved: on level 0 the param group of each shard, above
            one tuple with the names of the hyperparameters below, element by element.
    """

    rule: Rule
    tuned: tuple[Slot, ...]
    fixed: tuple[Slot, ...]
    owners: tuple[int | tuple[str, ...], ...]
    depends_on_weights: bool

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
        """What tells two levels apart but for numbers; equal structures share a compiled step."""
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
        )


def build(stack: Stack, overrides: Sequence[frozenset[str]] = (frozenset(),)) -> tuple[Level, ...]:
    """The levels of a stack whose weights come in param groups; no shard is laid out yet.

    Args:
        overrides: for each param group, the hyperparameters of the lowest level for which it has a
            value of its own. One that is tuned and not overridden is shared by the groups.
    """
    groups = range(len(overrides))
    levels: list[Level] = []
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
        below = (tuple(slot.name for slot in levels[-1].tuned),) if k else ()
        levels.append(Level(rule, tuple(tuned), tuple(fixed), below, depends_on_weights(rule)))
    return tuple(levels)


def depends_on_weights(rule: Rule) -> bool:
    """Whether an update is more than ``w`` minus something that does not depend on ``w``.

    Asked of the derivative at random points: only such rules need the weights of the last step.
    """
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    h = SimpleNamespace(**{name: torch.tensor(0.5, dtype=torch.float64) for name in rule.hypers})
    (_, state), pullback = torch.func.vjp(  # type: ignore[misc]
        lambda w: rule.update(w, g, rule.init(g), h), w
    )
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    (through_weights,) = pullback((g, zeros))
    (through_state,) = pullback(
        (torch.zeros_like(w), {n: torch.ones_like(v) for n, v in state.items()})
    )
    return not torch.equal(through_weights, g) or bool(through_state.any())


def replay(
    level: Level, raw: Tensor, fixed: Tensor, moves: Sequence[Move], cotangents: Sequence[Tensor]
) -> tuple[list[State], Tensor]:
    """Run a level's last moves again: the states that they led to, and the hypergradients.

    Args:
        cotangents: the new gradient with respect to each of the vectors that were moved.

    Returns:
        the state after each move, and the gradient with respect to ``raw``, zero where nothing was
        moved.
    """
    done = [i for i, move in enumerate(moves) if move.g is not None]
    states = [move.state for move in moves]

    def rerun(raw: Tensor) -> tuple[list[Tensor], list[State]]:
        moved, after = [], list(states)
        for i in done:
            w, g, state = moves[i]
            assert g is not None
            h = level.values(raw, fixed, level.owners[i])
            # Where w was not kept, the update's dependence on its arguments does not involve it.
            new, after[i] = level.rule.update(g if w is None else w, g, state, h)
            moved.append(new)
        return moved, after

    if not done or not len(raw):
        return rerun(raw)[1], torch.zeros_like(raw)
    _, pullback, after = torch.func.vjp(rerun, raw, has_aux=True)  # type: ignore[misc]
    return after, pullback([cotangents[i] for i in done])[0]


def step(
    levels: Sequence[Level], tower: TowerState, weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[list[Tensor], TowerState]:
    """One step of the whole stack.

    Args:
        levels: the static shape of the stack.
        weights, grads: the weights and their gradient, one pair of equally long 1-D tensors for
            each shard.

    Returns:
        the new weights, shard by shard, and the new state of the tower.
    """
    states, hypergradients = [], []
    cotangents = list(grads)
    for k, level in enumerate(levels):
        after, hypergradient = replay(
            level, tower.raw[k], tower.fixed[k], tower.moves[k], cotangents
        )
        states.append(after)
        hypergradients.append(hypergradient)
        cotangents = [hypergradient]

    raws, read = list(tower.raw), list(tower.moves)
    for k in reversed(range(1, len(levels))):
        (raws[k - 1],), read[k] = move(
            levels[k], raws[k], tower.fixed[k], states[k], [raws[k - 1]], [hypergradients[k - 1]]
        )
    moved, read[0] = move(levels[0], raws[0], tower.fixed[0], states[0], weights, grads)
    return moved, TowerState(tuple(raws), tower.fixed, tuple(read))


def move(
    level: Level,
    raw: Tensor,
    fixed: Tensor,
    states: Sequence[State],
    vectors: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> tuple[list[Tensor], tuple[Move, ...]]:
    """Move each of a level's vectors: the new vectors, and what the moves have read."""
    moved, moves = [], []
    for owner, state, w, g in zip(level.owners, states, vectors, grads, strict=True):
        moved.append(level.rule.update(w, g, state, level.values(raw, fixed, owner))[0])
        moves.append(Move(w if level.depends_on_weights else None, g, state))
    return moved, tuple(moves)
