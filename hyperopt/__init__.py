"""Optimizers whose hyperparameters are tuned by gradient descent, by optimizers, all the way up.

    from hyperopt import Adam, SGD, HyperOptimizer
    optimizer = HyperOptimizer(model.parameters(), Adam(lr=1e-3) / SGD(1e-5))

After Chandra, Xie, Ragan-Kelley and Meijer, "Gradient Descent: The Ultimate Optimizer"
(NeurIPS 2022).
"""

from .domains import DOMAINS, Domain
from .optimizer import HyperOptimizer
from .rules import RULES, SGD, AdaGrad, Adam, AdamW, Hyper, Option, RMSProp, Rule
from .stack import Stack, parse

__all__ = [
    "DOMAINS",
    "RULES",
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Domain",
    "Hyper",
    "HyperOptimizer",
    "Option",
    "RMSProp",
    "Rule",
    "Stack",
    "parse",
]
