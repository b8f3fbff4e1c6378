"""Optimizers of other packages, which a run trains with in place of a stack.

    python -m experiments.run 'stack=Prodigy()'
    python -m experiments.run -m 'stack=AdamWScheduleFree(0.001),AdamWScheduleFree(0.01)'

A config writes them as plain rules; nothing can stand on top of them. The extra `peers` has their
packages. All that is not said here is at their default, which is what their authors recommend:

    AdamWScheduleFree  Schedule-Free AdamW (Defazio et al. 2024), lr 0.0025 where none is given. As
                       its README has it, there is no schedule, and a model's batch normalisation
                       is renewed, with 50 training batches, at the weights that are to be judged.
                       It recommends a warm-up, of no given length; its own example on MNIST is
                       without, and so is this.
    Prodigy            Mishchenko and Defazio 2024, lr 1 "for all networks", as its README has it.
    DAdaptAdam         D-Adaptation (Defazio and Mishchenko 2023), lr 1, as its README has it.
    DAdaptSGD          the same for SGD, without momentum.
    ProdigyPlusScheduleFree
                       the package prodigy-plus-schedule-free, lr 1.
    MomoAdam           MoMo-Adam (Schaipp et al. 2023), lr 0.01, the most that it takes.
    Mechanic           Cutkosky et al. 2023, around AdamW, lr 1; its README calls that arbitrary.
    Trac               TRAC (Muppidi et al. 2024), around Adam, lr 1e-3, as its README has it.

A run of MomoAdam, Mechanic or Trac that is cut short starts again from its beginning: their
state_dict lacks a part of what they keep. GeN is not here since it needs batches within a step, nor
is DoWG: the package of that name keeps its starting point by reference, so that it never sees a
distance from it.

Prodigy and D-Adaptation estimate a distance d, from d0 = 1e-6 on, and step with lr * d: they have
no lr to start from.
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

    package: ClassVar[str]  # that is imported
    distribution: ClassVar[str] = ""  # its name on PyPI, where it is another one
    resumable: ClassVar[bool] = True  # whether its state_dict has all of its state
    needs_loss: ClassVar[bool] = False  # whether its step reads the loss
    lr = Hyper(1.0, tuned=False)

    def make(self, params: Iterable[nn.Parameter]) -> Any:
        """The optimizer itself.

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
        return module.start_trac(os.devnull, torch.optim.Adam)  # its log


KINDS = (
    *(AdamWScheduleFree, Prodigy, DAdaptAdam, DAdaptSGD, ProdigyPlusScheduleFree),
    *(MomoAdam, Mechanic, Trac),
)
BASELINES: dict[str, type[Baseline]] = {kind.__name__: kind for kind in KINDS}


def parse(notation: str) -> Stack:
    """The stack that a config's notation stands for, which may be a peer alone.

    Raises:
        ValueError: one line that says what is wrong.
    """
    stack = hyperopt.parse(notation, RULES | BASELINES)
    for level in stack.levels:
        if isinstance(level, Baseline) and stack.height:
            raise ValueError(
                f"{level} stands alone: it is an optimizer of the package {level.package}, which "
                f"no level can tune and which tunes none; the stack {notation!r} has "
                f"{stack.height + 1} levels"
            )
    return stack


class BaselineOptimizer:
    """A peer's optimizer, with what a run asks of a `HyperOptimizer`.

    On record are its lr and, where it estimates one, the distance d that lr is multiplied by.
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
        """Take what `state_dict` gave.

        Raises:
            ValueError: that is not all that the peer keeps.
        """
        if not self.peer.resumable:
            raise ValueError(f"{self.peer} cannot go on from a checkpoint")
        self.optimizer.load_state_dict(state)

    def watch(self, gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function of a batch; where the peer needs the loss, its step is told."""
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
    """What moves the parameters of a model as a config's notation says.

    Args:
        matrices: the notation of the stack of the hidden matrices, if they have one of their own.
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
    """Within it, the model has the weights that it is to be judged by.

    They are those that it is trained at, but for Schedule-Free, which trains at others.

    Args:
        renew: called with them in place where they are others; what else of the model is to follow.
    """
    peer: Any = optimizer.optimizer if isinstance(optimizer, BaselineOptimizer) else None
    if not hasattr(peer, "eval"):
        yield
        return
    peer.eval()
    renew()
    yield
    peer.train()
