"""The models and the optimizers of the step-time benchmark."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperopt import HyperOptimizer, compile_graph, trace
from models.char_rnn import CharRNN
from models.mlp import MLP
from models.resnet import ResNet

HEIGHTS = (0, 1, 2, 5, 10, 20, 50)
ROUNDS = {"mlp": 50, "resnet20": 11, "char_rnn": 40, "transformer": 15}

TRAFFIC = "reads and writes alone"

# The optimizer works in place on parameters with at least this number of elements.
LARGE = 1 << 16

# Tiny step sizes, so that no contender diverges during the benchmark.
FAMILIES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "SGD": ("SGD(1e-6)", "SGD(1e-12)", HEIGHTS),
    "SGD momentum": ("SGD(1e-6, momentum=0.9)", "SGD(1e-12)", (0, 1)),
    "Adam": ("Adam(1e-6)", "Adam(1e-9)", HEIGHTS),
    "Adam / SGD": ("Adam(1e-6)", "SGD(1e-12)", (1,)),
}


def tower(family: str, height: int) -> str:
    lowest, above, _ = FAMILIES[family]
    return " / ".join([lowest, *[above] * height])


# The models, each with the loss of a fixed batch.


class Blocks(nn.Module):
    """Eight transformer encoder blocks of width 512: 25.2 M parameters in 96 tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 8)


def setting(name: str) -> tuple[Callable[[], nn.Module], Callable[[Any], Tensor] | None]:
    """Return a function that makes a model, and a function from its forward pass to the loss."""
    torch.manual_seed(0)
    if name == "mlp":
        images, labels = torch.rand(256, 28, 28), torch.randint(10, (256,))
        return MLP, lambda forward: F.nll_loss(forward(images), labels)
    if name == "resnet20":
        images, labels = torch.rand(128, 3, 32, 32), torch.randint(10, (128,))
        return ResNet, lambda forward: F.nll_loss(forward(images), labels)
    if name == "char_rnn":
        text = torch.randint(82, (50, 51))

        def loss(forward: Any) -> Tensor:
            predictions, _ = forward(text[:, :-1])
            return F.nll_loss(predictions.flatten(0, 1), text[:, 1:].flatten())

        return lambda: CharRNN(82), loss
    return Blocks, None


# The contenders. All make whole training steps; all except the published one make a bare `step()`.


class Plain:
    """A model under any `torch.optim.Optimizer`, including ours."""

    def __init__(self, model: nn.Module, loss: Any, optimizer: Any) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.inside: list[float] = []  # the seconds of each `step()` of a whole step
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3

    def whole(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model).backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.inside.append(time.perf_counter() - start)

    def bare(self) -> None:
        self.optimizer.step()


class Published:
    """A model under the published package, used as its README says."""

    def __init__(self, model: nn.Module, loss: Any, optimizer: Any) -> None:
        from gradient_descent_the_ultimate_optimizer import gdtuo

        self.wrapper = gdtuo.ModuleWrapper(model, optimizer=optimizer)
        self.wrapper.initialize()
        self.loss = loss

    def whole(self) -> None:
        self.wrapper.begin()
        loss = self.loss(self.wrapper.forward)
        self.wrapper.zero_grad()
        loss.backward(create_graph=True)
        self.wrapper.step()


class Traffic:
    """The reads and writes of Adam / Adam on large vectors, with almost no arithmetic.

    A lower bound on its time. The hypergradients need all gradients of a step, and the weights need
    the new hyperparameters, so a step passes over its vectors twice.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [p for p in parameters if p.numel() >= LARGE]
        self.state = [[torch.zeros(p.numel()) for _ in range(3)] for p in self.parameters]
        self.kernels: dict[tuple[str, int], Callable[..., Any]] = {}

    @torch.no_grad()
    def step(self) -> None:
        vectors = [
            (p.view(-1), p.grad.view(-1), *state)  # type: ignore[union-attr]
            for p, state in zip(self.parameters, self.state, strict=True)
        ]
        for _, g, m, v, last in vectors:
            self.run(self.replay, m, v, last, g, m, v)
        for w, g, m, v, last in reversed(vectors):
            self.run(self.advance, w, g, m, v, w, last)

    def run(self, half: Callable[..., list[Tensor]], *vectors: Tensor) -> None:
        key = half.__name__, len(vectors[0])
        if key not in self.kernels:
            apart = [vector.clone() for vector in vectors]
            self.kernels[key] = compile_graph(trace(half, apart), apart)
        self.kernels[key](*vectors)

    @staticmethod
    def replay(
        m: Tensor, v: Tensor, last: Tensor, g: Tensor, new_m: Tensor, new_v: Tensor
    ) -> list[Tensor]:
        new_m.copy_(m + last)
        new_v.copy_(v + g)
        return []

    @staticmethod
    def advance(
        w: Tensor, g: Tensor, m: Tensor, v: Tensor, new_w: Tensor, last: Tensor
    ) -> list[Tensor]:
        new_w.copy_(w + g * m * v)
        last.copy_(g)
        return []


def published(family: str, height: int) -> Any:
    from gradient_descent_the_ultimate_optimizer import gdtuo

    above: dict[str, Any] = {}
    for _ in range(height):
        rule = gdtuo.Adam(1e-9, **above) if family == "Adam" else gdtuo.SGD(1e-12, **above)
        above = {"optimizer": rule}
    if family.startswith("Adam"):
        return gdtuo.Adam(1e-6, **above)
    return gdtuo.SGD(1e-6, mu=0.9 * (family == "SGD momentum"), **above)


def reference(family: str, parameters: Iterable[Tensor], **how: Any) -> torch.optim.Optimizer:
    if family == "Adam":
        return torch.optim.Adam(parameters, 1e-6, **how)
    return torch.optim.SGD(parameters, 1e-6, momentum=0.9 * (family == "SGD momentum"), **how)


def contenders(name: str) -> dict[tuple[str, str, int], Any]:
    """All contenders of a model by (optimizer, rule, height)."""
    make, loss = setting(name)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return make()

    found: dict[tuple[str, str, int], Any] = {}
    for family, (_, _, heights) in FAMILIES.items():
        for how in ("foreach", "fused") if 0 in heights else ():
            m = model()
            plain = reference(family, m.parameters(), **{how: True})
            found[f"torch.optim {how}", family, 0] = Plain(m, loss, plain)
        for height in heights:
            if loss is None and height > 1:
                continue
            kinds = {"compiled": True, "eager": False} if height <= 2 else {"compiled": True}
            for kind, compile in kinds.items():
                m = model()
                ours = HyperOptimizer(m.parameters(), tower(family, height), compile=compile)
                found[kind, family, height] = Plain(m, loss, ours)
            if loss is not None and (name == "mlp" or height <= 2):
                found["published", family, height] = Published(
                    model(), loss, published(family, height)
                )
    if name == "transformer":
        m = model()
        found[TRAFFIC, "Adam", 1] = Plain(m, None, Traffic(m.parameters()))
    return found


LABELS = {
    "mlp": "MLP, 101,770 parameters, batch 256",
    "resnet20": "ResNet-20, 269,722 parameters, batch 128",
    "char_rnn": "char-RNN, 2 x 128 LSTM, batch 50, sequence 50",
    "transformer": "8 transformer blocks, 25 M parameters",
}


def tower_label(family: str, height: int) -> str:
    if height > 2:
        return f"tower of {family} of height {height}"
    return re.sub(r"\(1e-\d+\)", "", tower(family, height)).replace("(1e-6, ", "(")
