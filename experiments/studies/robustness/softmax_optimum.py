"""The optimum of the convex problem, configs/experiment/softmax.yaml, on the whole MNIST.

    python -m experiments.studies.robustness.softmax_optimum

It runs L-BFGS in float64, three minutes on one core, and writes `softmax_optimum.json` to
results/robustness. The objective is strongly convex: if its gradient has norm e, its value is at
most e^2 / (2 l2) above the optimum. The file has this bound too.
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
    """Minimise the mean negative log-likelihood of softmax regression plus an L2 penalty.

    The penalty is l2 / 2 times the squared norm of the weights, including biases.

    Args:
        x: (n, pixels), float64.
        y: labels, int64, (n,).
    """
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    x = x[:, x.any(0)]  # pixels that are always 0 have weights of 0 at the optimum

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
        raise ValueError("the optimum needs the whole MNIST; set data.root to its folder")
    torch.set_num_threads(config.trainer.threads)
    data = load(config.data.name, config.data.root)
    assert config.trainer.l2 is not None
    x = pixels(data.x_train).flatten(1).double()
    found = least_objective(x, data.y_train, 10, config.trainer.l2)
    write_json(PATH, {"l2": config.trainer.l2, "data_sha256": data.sha256, **found})
    print(f"{found['objective']:.9f} nats, at most {found['bound']:.1g} above the optimum")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
