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

The last three estimate a distance d, from d0 = 1e-6 on, and step with lr * d: they have no lr to
start from.
"""

from __future__ import annotations

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

    package: ClassVar[str]
    lr = Hyper(1.0, tuned=False)

    def make(self, params: Iterable[nn.Parameter]) -> Any:
        """The optimizer itself.

        Raises:
            ValueError: the package is not installed.
        """
        try:
            kind = getattr(import_module(self.package), self.name)
        except ModuleNotFoundError:
            raise ValueError(
                f"{self} needs the package {self.package}; pip install '.[peers]'"
            ) from None
        return kind(params, lr=self.lr)


class AdamWScheduleFree(Baseline, known=False):
    package = "schedulefree"
    lr = Hyper(0.0025, tuned=False)


class Prodigy(Baseline, known=False):
    package = "prodigyopt"


class DAdaptAdam(Baseline, known=False):
    package = "dadaptation"


class DAdaptSGD(Baseline, known=False):
    package = "dadaptation"


BASELINES: dict[str, type[Baseline]] = {
    kind.__name__: kind for kind in (AdamWScheduleFree, Prodigy, DAdaptAdam, DAdaptSGD)
}


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
        self.version = f"{peer.package} {version(peer.package)}"
        self.optimizer = peer.make(params)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.step: Callable[[], Any] = self.optimizer.step
        self.state_dict: Callable[[], dict[str, Any]] = self.optimizer.state_dict
        self.load_state_dict: Callable[[dict[str, Any]], None] = self.optimizer.load_state_dict

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
