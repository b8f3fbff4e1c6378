"""Optimizers that tune their own hyperparameters by gradient descent, in stacks of any height.

    from hyperopt import Adam, SGD, HyperOptimizer
    optimizer = HyperOptimizer(model.parameters(), Adam(lr=1e-3) / SGD(1e-5))

The method is that of Chandra, Xie, Ragan-Kelley and Meijer, "Gradient Descent: The Ultimate
Optimizer" (NeurIPS 2022).
"""

from ._engine.compiler import kernel_count
from ._engine.torch_private import compile_graph, trace
from .auto import Auto
from .domains import DOMAINS, Domain
from .errors import HyperoptWarning
from .groups import split_matrices
from .history import History, lightning_callback, trainer_callback
from .notation import parse
from .optimizer import HyperOptimizer
from .replay import Replay, Schedule
from .rule import RULES, Rule, Stack
from .rules import (
    ASGD,
    SGD,
    SOAP,
    Adadelta,
    Adafactor,
    AdaGrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    Muon,
    NAdam,
    RAdam,
    RMSProp,
    Rprop,
    ScheduleFreeAdam,
)
from .tuning import Hyper, Option, Tuning, did_you_mean, format_value

__all__ = [
    "ASGD",
    "DOMAINS",
    "RULES",
    "SGD",
    "SOAP",
    "AdaGrad",
    "Adadelta",
    "Adafactor",
    "Adam",
    "AdamW",
    "Adamax",
    "Auto",
    "Domain",
    "History",
    "Hyper",
    "HyperOptimizer",
    "HyperoptWarning",
    "Lion",
    "Muon",
    "NAdam",
    "Option",
    "RAdam",
    "RMSProp",
    "Replay",
    "Rprop",
    "Rule",
    "Schedule",
    "ScheduleFreeAdam",
    "Stack",
    "Tuning",
    "compile_graph",
    "did_you_mean",
    "format_value",
    "kernel_count",
    "lightning_callback",
    "parse",
    "split_matrices",
    "trace",
    "trainer_callback",
]
