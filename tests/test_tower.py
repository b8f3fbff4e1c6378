"""The pure step of `hyperopt.tower` is the optimizer's, and runs many at once under `vmap`."""

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from hyperopt import HyperOptimizer
from hyperopt.tower import step


def test_one_pure_step_of_many_runs_is_a_step_of_each():
    weights, optimizers = [], []
    for lr in (1e-3, 1e-2, 1e-1):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))
        stack = f"SGD({lr}, momentum=0.5) / Adam(0.01)[lr: log, beta1] / SGD(1e-3)"
        optimizers.append(HyperOptimizer([p], stack, compile=False))
        weights.append(p)

    def advance():
        for p, optimizer in zip(weights, optimizers, strict=True):
            p.grad = torch.sin(3 * p.detach())
            optimizer.step()

    for _ in range(3):
        advance()

    flat, structures = zip(*(tree_flatten(o._tower()) for o in optimizers), strict=True)
    tensors = [i for i, leaf in enumerate(flat[0]) if leaf is not None]
    layout = optimizers[0]._layout

    def one(w, *leaves):
        whole = list(flat[0])
        for i, leaf in zip(tensors, leaves, strict=True):
            whole[i] = leaf
        before = tree_unflatten(whole, structures[0])
        (new,), tower = step(layout.blocks, layout.owners, before, [w], [torch.sin(3 * w)])
        return new, tower.raw

    stacked = [torch.stack([leaves[i] for leaves in flat]) for i in tensors]
    new, raw = torch.vmap(one)(torch.stack([p.detach().clone() for p in weights]), *stacked)

    advance()
    torch.testing.assert_close(new, torch.stack([p.detach() for p in weights]), rtol=1e-12, atol=0)
    for b, rows in enumerate(raw):
        after = torch.stack([optimizer._tower().raw[b] for optimizer in optimizers])
        torch.testing.assert_close(rows, after, rtol=1e-12, atol=1e-15)
