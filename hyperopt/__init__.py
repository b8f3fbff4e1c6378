"""Optimizers whose hyperparameters are tuned by gradient descent, by optimizers, all the way up.

    from hyperopt import Adam, SGD, HyperOptimizer
    optimizer = HyperOptimizer(model.parameters(), Adam(lr=1e-3) / SGD(1e-5))

After Chandra, Xie, Ragan-Kelley and Meijer, "Gradient Descent: The Ultimate Optimizer"
(NeurIPS 2022).
"""

from .auto import Auto
from .domains import DOMAINS, Domain
from .optimizer import HyperOptimizer
from .rule import RULES, Hyper, Option, Rule, Tuning
from .rules import (
    SGD,
    Adadelta,
    AdaGrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    NAdam,
    RAdam,
    RMSProp,
    ScheduleFreeAdam,
)
from .schedule import Replay, Schedule
from .stack import Stack, parse

__all__ = [
    "DOMAINS",
    "RULES",
    "SGD",
    "AdaGrad",
    "Adadelta",
    "Adam",
    "AdamW",
    "Adamax",
    "Auto",
    "Domain",
    "Hyper",
    "HyperOptimizer",
    "Lion",
    "NAdam",
    "Option",
    "RAdam",
    "RMSProp",
    "Replay",
    "Rule",
    "Schedule",
    "ScheduleFreeAdam",
    "Stack",
    "Tuning",
    "parse",
]
