"""The least objective of the convex problem, configs/experiment/softmax.yaml, on the whole MNIST.

    python -m experiments.studies.robustness.softmax_optimum

finds it by L-BFGS in float64, in three minutes of a core, and writes `softmax_optimum.json` to
results/robustness. The objective is strongly convex: where its gradient has norm e, it is no more
than e^2 / (2 l2) above its least value. That bound stands beside it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from experiments.cli import ROOT, guarded
from experiments.config.compose import compose
from experiments.config.resolve import resolve_all
from experiments.data.catalog import load
from experiments.data.images import pixels
from experiments.files import write_json

PATH = ROOT / "results" / "robustness" / "softmax_optimum.json"


def least_objective(x: Tensor, y: Tensor, classes: int, l2: float) -> dict[str, float]:
    """The least mean negative log-likelihood of softmax regression, with l2 / 2 times its weights'
    squares, biases included, added to it.

    Args:
        x: (n, pixels), float64.
        y: labels, int64, (n,).
    """
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    x = x[:, x.any(0)]  # the weights of pixels that are always 0 are best 0

    def objective(flat: Any) -> tuple[float, Any]:
        w = torch.tensor(flat).view(-1, classes).requires_grad_()
        value = F.cross_entropy(x @ w, y) + l2 / 2 * w.square().sum()
        (gradient,) = torch.autograd.grad(value, w)
        return value.item(), gradient.flatten().numpy()

    start = torch.zeros(x.shape[1] * classes, dtype=x.dtype).numpy()
    options = {"maxiter": 5000, "maxfun": 10_000, "maxcor": 30, "ftol": 0.0, "gtol": 1e-8}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    value, gradient = objective(found.x)
    norm = float((gradient**2).sum() ** 0.5)
    return {"objective": value, "bound": norm**2 / (2 * l2), "steps": int(found.nit)}


def main() -> int:
    if set(sys.argv[1:]) & {"-h", "--help"}:
        print(__doc__)
        return 0
    (config,) = resolve_all([compose(["experiment=softmax", *sys.argv[1:]])])
    if config.data.name != "mnist":
        raise ValueError("the optimum is that of the whole MNIST; set data.root to where it is")
    torch.set_num_threads(config.trainer.threads)
    data = load(config.data.name, config.data.root)
    assert config.trainer.l2 is not None
    x = pixels(data.x_train).flatten(1).double()
    found = least_objective(x, data.y_train, 10, config.trainer.l2)
    write_json(PATH, {"l2": config.trainer.l2, "data_sha256": data.sha256, **found})
    print(f"{found['objective']:.9f} nats, no more than {found['bound']:.1g} above the least")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
