"""Peer optimizers: optimizers of other packages that a run can use in place of a stack.

    python -m experiments.run 'stack=Prodigy()'
    python -m experiments.run -m 'stack=AdamWScheduleFree(0.001),AdamWScheduleFree(0.01)'

A config writes a peer like a rule. No level can stand on top of it. The extra `peers` installs the
packages. All other options keep their defaults, which are the authors' recommendations:

    AdamWScheduleFree  Schedule-Free AdamW (Defazio et al. 2024), default lr 0.0025. Following its
                       README, it uses no schedule, and 50 training batches renew the model's batch
                       normalisation at the evaluation weights. Its README recommends a warm-up but
                       gives no length. Its example on MNIST has no warm-up, so this has none.
    Prodigy            Mishchenko and Defazio 2024, lr 1 "for all networks" (its README).
    DAdaptAdam         D-Adaptation (Defazio and Mishchenko 2023), lr 1 (its README).
    DAdaptSGD          the same for SGD, without momentum.
    ProdigyPlusScheduleFree
                       the package prodigy-plus-schedule-free, lr 1.
    MomoAdam           MoMo-Adam (Schaipp et al. 2023), lr 0.01, an upper bound on its adaptive lr.
    Mechanic           Cutkosky et al. 2023, around AdamW, lr 1; its README calls this arbitrary.
    Trac               TRAC (Muppidi et al. 2024), around Adam, lr 1e-3 (its README).

An interrupted run of MomoAdam, Mechanic or Trac starts again from the beginning, because their
state_dict is incomplete. GeN is missing: it needs batches within a step. DoWG is missing: the
package of that name stores its starting point by reference, so it measures a distance of 0.

Prodigy and D-Adaptation estimate a distance d, starting at d0 = 1e-6, and step with lr * d. They
need no initial lr.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import hyperopt
from hyperopt import RULES, Hyper, HyperOptimizer, Rule, Stack, split_matrices


class Baseline(Rule, known=False):
    """An optimizer class of another package, by the class's name."""

    package: ClassVar[str]  # to import
    distribution: ClassVar[str] = ""  # the name on PyPI, if it differs
    resumable: ClassVar[bool] = True  # whether its state_dict is complete
    needs_loss: ClassVar[bool] = False  # whether its step reads the loss
    lr = Hyper(1.0, tuned=False)

    def make(self, params: Iterable[nn.Parameter]) -> Any:
        """Construct the optimizer.

        Raises:
            ValueError: the package is not installed.
        """
        try:
            module = import_module(self.package)
        except ModuleNotFoundError:
            raise ValueError(
                f"{self} needs the package {self.package}; pip install '.[peers]'"
            ) from None
        return self.kind(module)(params, lr=self.lr)

    def kind(self, module: Any) -> Callable[..., Any]:
        """The optimizer's class, from the package."""
        return getattr(module, self.name)


class AdamWScheduleFree(Baseline, known=False):
    package = "schedulefree"
    lr = Hyper(0.0025, tuned=False)


class Prodigy(Baseline, known=False):
    package = "prodigyopt"


class DAdaptAdam(Baseline, known=False):
    package = "dadaptation"


class DAdaptSGD(Baseline, known=False):
    package = "dadaptation"


class ProdigyPlusScheduleFree(Baseline, known=False):
    package, distribution = "prodigyplus", "prodigy-plus-schedule-free"


class MomoAdam(Baseline, known=False):
    package, distribution = "momo", "momo-opt"
    resumable, needs_loss = False, True
    lr = Hyper(0.01, tuned=False)


class Mechanic(Baseline, known=False):
    package, distribution = "mechanic_pytorch", "mechanic-pytorch"
    resumable = False

    def kind(self, module: Any) -> Callable[..., Any]:
        return module.mechanize(torch.optim.AdamW)


class Trac(Baseline, known=False):
    package, distribution = "trac_optimizer.trac", "trac-optimizer"
    resumable = False
    lr = Hyper(0.001, tuned=False)

    def kind(self, module: Any) -> Callable[..., Any]:
        return module.start_trac(os.devnull, torch.optim.Adam)  # no log file


KINDS = (
    *(AdamWScheduleFree, Prodigy, DAdaptAdam, DAdaptSGD, ProdigyPlusScheduleFree),
    *(MomoAdam, Mechanic, Trac),
)
BASELINES: dict[str, type[Baseline]] = {kind.__name__: kind for kind in KINDS}


def parse(notation: str) -> Stack:
    """Parse a config's notation: a stack of rules, or a single peer.

    Raises:
        ValueError: the notation is wrong, in one line.
    """
    stack = hyperopt.parse(notation, RULES | BASELINES)
    for level in stack.levels:
        if isinstance(level, Baseline) and stack.height:
            raise ValueError(
                f"{level} is an optimizer of the package {level.package}; it cannot tune another "
                f"level or be tuned, but the stack {notation!r} has {stack.height + 1} levels"
            )
    return stack


class BaselineOptimizer:
    """A peer's optimizer with the interface of `HyperOptimizer` that a run needs.

    A run records its lr and, if it estimates one, the distance d that multiplies lr.
    """

    compiled = False

    def __init__(self, params: Iterable[nn.Parameter], stack: Stack) -> None:
        self.stack = stack
        (peer,) = stack.levels
        assert isinstance(peer, Baseline)
        self.peer = peer
        name = peer.distribution or peer.package
        self.version = f"{name} {version(name)}"
        self.optimizer = peer.make(params)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.step: Callable[[], Any] = self.optimizer.step

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict() if self.peer.resumable else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            ValueError: the peer's state_dict is incomplete.
        """
        if not self.peer.resumable:
            raise ValueError(f"{self.peer} cannot resume from a checkpoint")
        self.optimizer.load_state_dict(state)

    def watch(self, gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap a function of a batch, so that the peer's step receives the loss if it needs it."""
        if not self.peer.needs_loss:
            return gradient

        def watched(*batch: Tensor) -> Tensor:
            loss = gradient(*batch)
            self.step = lambda: self.optimizer.step(loss=loss)
            return loss

        return watched

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def names(self) -> tuple[str, ...]:
        return ("0.lr", "0.d") if "d" in self.param_groups[0] else ("0.lr",)

    def snapshot(self) -> Tensor:
        group = self.param_groups[0]
        values = [float(group[name.removeprefix("0.")]) for name in self.names]
        return torch.tensor(values, dtype=torch.float64, device=group["params"][0].device)

    def hyperparameters(self) -> list[dict[str, float]]:
        names = [name.removeprefix("0.") for name in self.names]
        return [dict(zip(names, self.snapshot().tolist(), strict=True))]

    def hypergradients(self) -> Tensor:
        return self.snapshot()[:0]


def make_optimizer(
    model: nn.Module, notation: str, compile: bool, matrices: str | None = None
) -> HyperOptimizer | BaselineOptimizer:
    """Make the optimizer that a config's notation describes.

    Args:
        matrices: the notation of a separate stack for the hidden matrices; None for no such stack.
    """
    stack = parse(notation)
    if matrices is not None:
        groups = zip(split_matrices(model), (parse(matrices), stack), strict=True)
        return HyperOptimizer([{"params": p, "stack": s} for p, s in groups], compile=compile)
    if isinstance(stack.levels[0], Baseline):
        return BaselineOptimizer(model.parameters(), stack)
    return HyperOptimizer(model.named_parameters(), stack, compile=compile)


@contextmanager
def judged(
    optimizer: HyperOptimizer | BaselineOptimizer, renew: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Give the model its evaluation weights within the context.

    Only Schedule-Free optimizers have evaluation weights that differ from the training weights.

    Args:
        renew: updates the rest of the model, such as batch normalisation, if the weights differ.
    """
    peer: Any = optimizer.optimizer if isinstance(optimizer, BaselineOptimizer) else None
    if not hasattr(peer, "eval"):
        yield
        return
    peer.eval()
    renew()
    yield
    peer.train()
