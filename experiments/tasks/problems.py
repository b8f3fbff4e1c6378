"""Small problems of many kinds: the tasks of the suite, each seconds on one core.

The class of a problem has a model, batches, a loss, and a test. Its data have fixed seeds, so that
a run's seed decides only the initial weights and the batches. State that passes from batch to
batch (a step counter, a game) is in buffers of the model, so that checkpoints include it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data.problems import Material
from experiments.data.source import PROBLEM
from experiments.tasks.base import Measure
from experiments.tasks.compiled_gradient import Gradient

Batch = tuple[Tensor, Tensor]
QUARTERS = 4  # epochs of a run; the test follows each


class Problem:
    """Base class of problems: a training set, and batches drawn from it at random.

    Attributes:
        steps: of a whole run.
        train, test: inputs and targets.
    """

    steps: ClassVar[int]
    train: Batch
    test: Batch

    def __init__(self, data: Any) -> None: ...

    def model(self) -> nn.Module:
        raise NotImplementedError

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        x, y = self.train
        while True:
            drawn = torch.randint(len(x), (size,), generator=generator)
            yield x[drawn], y[drawn]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    def evaluate(self, model: nn.Module) -> float:
        return self.loss(model, *self.test).item()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perceptron(*sizes: int, between: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), between())]
    return nn.Sequential(*layers[:-1])


class Table(Problem):
    """Regression on 16 columns, 10 without meaning, under noise as large as the signal."""

    steps = 800

    def __init__(self, data: Any) -> None:
        generator = seeded(0)
        x = torch.randn(6000, 16, generator=generator)
        signal = x[:, 0] * x[:, 1] + (2 * x[:, 2]).sin() + x[:, 3].abs() - (x[:, 4] > x[:, 5]) * 1.0
        y = (signal + 1.2 * torch.randn(6000, generator=generator))[:, None]
        self.train, self.test = (x[:2000], y[:2000]), (x[2000:], y[2000:])

    def model(self) -> nn.Module:
        return perceptron(16, 64, 64, 1)


class Sines(nn.Module):
    """A network of sines (Sitzmann et al. 2020), with their initialisation."""

    def __init__(self, *sizes: int, frequency: float = 30.0) -> None:
        super().__init__()
        self.frequency = frequency
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for k, layer in enumerate(self.layers):
            n: Any = layer.in_features
            bound = 1 / n if k == 0 else math.sqrt(6 / n) / frequency
            nn.init.uniform_(layer.weight, -bound, bound)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = (self.frequency * layer(x)).sin()
        return self.layers[-1](x)


class Picture(Problem):
    """A fit of a picture of 40 x 40 pixels; each step uses all pixels, without noise."""

    steps = 500

    def __init__(self, data: Any) -> None:
        line = torch.linspace(-1, 1, 40)
        places = torch.cartesian_prod(line, line)
        radius = places.norm(dim=1)
        grey = (12 * radius).sin() * (radius < 0.9) + 0.5 * (places[:, 0] > places[:, 1])
        self.train = self.test = (places, grey[:, None])

    def model(self) -> nn.Module:
        return Sines(2, 32, 32, 1)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        return itertools.repeat(self.train)


class Classified(Problem):
    """Base class of classification problems."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)


class Finetune(Classified):
    """A network pretrained on the digits 0 to 4 learns the digits 5 to 9 from 100 images."""

    steps = 300

    def __init__(self, data: Any) -> None:
        order = torch.randperm(len(data.y_train), generator=seeded(0))  # they are sorted by class
        x, y = data.x_train[order].flatten(1) / 255, data.y_train[order]
        test, classes = data.x_test.flatten(1) / 255, data.y_test
        self.train = x[y >= 5][:100], y[y >= 5][:100] - 5
        self.test = test[classes >= 5], classes[classes >= 5] - 5
        self.known = x[y < 5], y[y < 5]

    @functools.cached_property
    def pretrained(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = perceptron(784, 128, 64, 5)
        optimizer, generator = torch.optim.Adam(model.parameters()), seeded(1)
        for _ in range(300):
            drawn = torch.randint(len(self.known[0]), (64,), generator=generator)
            optimizer.zero_grad()
            self.loss(model, self.known[0][drawn], self.known[1][drawn]).backward()
            optimizer.step()
        return model

    def model(self) -> nn.Module:
        model: Any = copy.deepcopy(self.pretrained)
        model[-1] = nn.Linear(64, 5)
        return model


class Factors(nn.Module):
    """A matrix as the product of two factors, with a bias for each row and column."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(rows, rank + 1), nn.Embedding(columns, rank + 1)
        for table in (self.rows, self.columns):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.rows(x[:, 0]), self.columns(x[:, 1])
        return (u[:, 1:] * v[:, 1:]).sum(1) + u[:, 0] + v[:, 0]


class Ratings(Problem):
    """A noisy matrix of rank 4; the frequencies of its rows follow Zipf's law."""

    steps = 800

    def __init__(self, data: Any) -> None:
        generator = seeded(0)
        u, v = (torch.randn(n, 4, generator=generator) / 2 for n in (1000, 300))
        often = 1 / torch.arange(1.0, 1001.0)
        rows = torch.multinomial(often, 40_000, replacement=True, generator=generator)
        columns = torch.randint(300, (40_000,), generator=generator)
        noise = 0.2 * torch.randn(40_000, generator=generator)
        x, y = torch.stack([rows, columns], 1), (u[rows] * v[columns]).sum(1) + noise
        self.train, self.test = (x[:30_000], y[:30_000]), (x[30_000:], y[30_000:])

    def model(self) -> nn.Module:
        return Factors(1000, 300, 8)


class Vae(Problem):
    """A VAE with 8 latent numbers (Kingma and Welling 2014); the loss is -ELBO in nats."""

    steps = 500

    def __init__(self, data: Any) -> None:
        x, test = (part.flatten(1) / 255 for part in (data.x_train, data.x_test))
        self.train, self.test = (x, x), (test, torch.randn(len(test), 8, generator=seeded(0)))

    def model(self) -> nn.Module:
        return nn.ModuleDict(
            {"encoder": perceptron(784, 128, 16), "decoder": perceptron(8, 128, 784)}
        )

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        for x, _ in super().batches(size, generator):
            yield x, torch.randn(size, 8, generator=generator)

    def loss(self, model: Any, x: Tensor, y: Tensor) -> Tensor:
        mean, log_sd = model["encoder"](x).chunk(2, 1)
        logits = model["decoder"](mean + log_sd.exp() * y)
        fit = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        apart = 0.5 * (mean**2 + (2 * log_sd).exp() - 1 - 2 * log_sd).sum()
        return (fit + apart) / len(x)


class Convnet(Classified):
    """A small network with group norm on 10,000 images of CIFAR-10, without augmentation."""

    steps = 300

    def __init__(self, data: Any) -> None:
        def scaled(x: Tensor) -> Tensor:
            return x.permute(0, 3, 1, 2).contiguous() / 127.5 - 1

        self.train = scaled(data.x_train[:10_000]), data.y_train[:10_000]
        self.test = scaled(data.x_test[:1000]), data.y_test[:1000]

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise((3, 16, 32, 64)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


class Transformer(nn.Module):
    """A pre-norm decoder of two blocks; input and output share the embedding."""

    def __init__(self, vocabulary: int, width: int = 32, length: int = 32) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        for embedding in (self.table, self.places):
            nn.init.normal_(embedding.weight, std=0.1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "inward": nn.Linear(width, 3 * width),
                    "outward": nn.Linear(width, width),
                    "wide": nn.Sequential(
                        nn.LayerNorm(width), *perceptron(width, 4 * width, width)
                    ),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            q, k, v = (
                part.unflatten(2, (2, -1)).transpose(1, 2)
                for part in block["inward"](block["norm"](h)).chunk(3, 2)  # type: ignore[index]
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + block["outward"](mixed.transpose(1, 2).flatten(2))  # type: ignore[index]
            h = h + block["wide"](h)  # type: ignore[index]
        return self.norm(h) @ self.table.weight.T


class Book(Classified):
    """Prediction of the next character of the book, in sequences of 32."""

    steps = 500

    def __init__(self, data: Any) -> None:
        characters = sorted(set(data.text))
        number = {c: k for k, c in enumerate(characters)}
        text = torch.tensor([number[c] for c in data.text[:500_000]]).unfold(0, 33, 4)
        self.vocabulary, held_out = len(characters), len(text) // 20
        # The test part comes after the training part and does not overlap it.
        self.train = text[: -held_out - 9, :-1], text[: -held_out - 9, 1:]
        self.test = text[-held_out::24, :-1], text[-held_out::24, 1:]

    def model(self) -> nn.Module:
        return Transformer(self.vocabulary)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


class Change(Problem):
    """A network learns a teacher network, which another teacher replaces at half time."""

    steps = 800

    def __init__(self, data: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.teachers = [perceptron(12, 24, 1).requires_grad_(False) for _ in range(2)]
        for teacher in self.teachers:
            for p in teacher.parameters():
                p.mul_(3)
        self.x = torch.randn(2000, 12, generator=seeded(1))

    def model(self) -> nn.Module:
        model = perceptron(12, 64, 64, 1)
        model.register_buffer("step", torch.zeros((), dtype=torch.int64))
        return model

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            x = torch.randn(size, 12, generator=generator)
            yield x, 0.1 * torch.randn(size, 1, generator=generator)

    def loss(self, model: Any, x: Tensor, y: Tensor) -> Tensor:
        teacher = self.teachers[int(model.step >= self.steps // 2)]
        model.step += 1
        return F.mse_loss(model(x), teacher(x) + y)

    def evaluate(self, model: Any) -> float:
        # After a quarter of the run, test with the teacher of the steps before.
        teacher = self.teachers[int(model.step > self.steps // 2)]
        return F.mse_loss(model(self.x), teacher(self.x)).item()


class Cartpole(Problem):
    """Advantage actor-critic on 32 parallel cart-poles (Barto et al. 1983, Mnih et al. 2016).

    Physics and limits follow gymnasium's CartPole-v1. The test is the maximum return, 500, divided
    by the mean return of 32 new games, so that 1 is perfect.
    """

    steps = 500
    together, length, most = 32, 8, 500

    def model(self) -> nn.Module:
        model = nn.ModuleDict({"actor": perceptron(4, 64, 2), "critic": perceptron(4, 64, 1)})
        model.register_buffer("games", torch.zeros(self.together, 5))  # state and time of each
        return model

    @staticmethod
    def play(games: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Advance the games by a fiftieth of a second; also returns which have failed."""
        x, speed, angle, turn, time = games.unbind(1)
        sine, cosine = angle.sin(), angle.cos()
        push = (20.0 * action - 10 + 0.05 * turn**2 * sine) / 1.1
        bend = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        pull = push - 0.05 * bend * cosine / 1.1
        after = (x + speed / 50, speed + pull / 50, angle + turn / 50, turn + bend / 50, time + 1)
        return torch.stack(after, 1), (after[0].abs() > 2.4) | (after[2].abs() > math.pi / 15)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """The random numbers of a batch: for the actor's choices, and for new games' states."""
        shape = self.length, self.together
        while True:
            starts = torch.rand(*shape, 4, generator=generator) / 10 - 0.05
            yield torch.rand(shape, generator=generator), starts

    def loss(self, model: Any, x: Tensor, y: Tensor) -> Tensor:
        seen, actions, ended = [], [], []
        with torch.no_grad():
            games = model.games
            for draw, start in zip(x, y, strict=True):
                action = (draw < model["actor"](games[:, :4]).softmax(1)[:, 1]).long()
                seen.append(games[:, :4])
                games, failed = self.play(games, action)
                over = failed | (games[:, 4] >= self.most)
                actions.append(action)
                # At the time limit, the critic's value replaces the rest of the game.
                ended.append((over, over & ~failed, model["critic"](games[:, :4])[:, 0]))
                fresh = torch.cat([start, torch.zeros(len(start), 1)], 1)
                games = torch.where(over[:, None], fresh, games)
            model.games.copy_(games)
            value, targets = model["critic"](games[:, :4])[:, 0], []
            for over, by_time, last in reversed(ended):
                value = 1 + 0.99 * torch.where(over, by_time * last, value)
                targets.append(value)
        target = torch.stack(targets[::-1]).flatten()
        states, action = torch.cat(seen), torch.cat(actions)
        log_p, values = model["actor"](states).log_softmax(1), model["critic"](states)[:, 0]
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        gain = ((target - values).detach() * log_p.gather(1, action[:, None])[:, 0]).mean()
        return F.mse_loss(values, target) / 2 - gain - 0.01 * entropy

    def evaluate(self, model: Any) -> float:
        generator = seeded(0)
        games = torch.cat(
            [torch.rand(32, 4, generator=generator) / 10 - 0.05, torch.zeros(32, 1)], 1
        )
        alive, total = torch.ones(32, dtype=torch.bool), 0.0
        for _ in range(self.most):
            draw = torch.rand(32, generator=generator)
            action = (draw < model["actor"](games[:, :4]).softmax(1)[:, 1]).long()
            games, failed = self.play(games, action)
            total += alive.sum().item()
            alive = alive & ~failed
            if not alive.any():
                break
        return self.most * 32 / total


class Stiff(Problem):
    """Physics-informed fit of u, where u' = -40 (u - cos 5t) on [0, 1] and u(0) = 0.

    The test is the mean squared error against the exact solution.
    """

    steps = 1000
    k, w = 40.0, 5.0

    def __init__(self, data: Any) -> None:
        t, k, w = torch.linspace(0, 1, 201)[:, None], self.k, self.w
        scale = k / (k * k + w * w)
        u = scale * (k * (w * t).cos() + w * (w * t).sin() - k * (-k * t).exp())
        self.test = t, u

    def model(self) -> nn.Module:
        return perceptron(1, 32, 32, 1, between=nn.Tanh)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield torch.rand(size, 1, generator=generator), torch.zeros(1, 1)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        u = model(x.requires_grad_())
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        residual = slope + self.k * (u - (self.w * x).cos())
        return residual.square().mean() / self.k + self.k * model(y).square().mean()

    def evaluate(self, model: nn.Module) -> float:
        return F.mse_loss(model(self.test[0]), self.test[1]).item()


PROBLEMS: dict[str, type[Problem]] = {
    "problem-table": Table,
    "problem-picture": Picture,
    "problem-finetune": Finetune,
    "problem-ratings": Ratings,
    "problem-vae": Vae,
    "problem-convnet": Convnet,
    "problem-transformer": Book,
    "problem-change": Change,
    "problem-cartpole": Cartpole,
    "problem-stiff": Stiff,
}


class ProblemTask:
    """A task for the trainer from a problem; an epoch is a quarter of the problem's steps."""

    kinds: ClassVar[tuple[str, ...]] = (PROBLEM,)
    keys: ClassVar[dict[str, Any]] = {}
    required: ClassVar[tuple[str, ...]] = ()
    distributed: ClassVar[bool] = False
    judged_by: ClassVar[Measure] = Measure("held_out_loss", "held-out loss", "loss {:.4g}")
    metrics: tuple[str, ...] = ("held_out_loss",)

    def __init__(self, material: Material, batch_size: int) -> None:
        self.problem, self.batch_size = PROBLEMS[material.name](material.data), batch_size
        self.model_arguments: dict[str, Any] = {"make": self.problem.model}

    @classmethod
    def of(cls, config: Any, data: Material, device: torch.device) -> ProblemTask:
        return cls(data, config.trainer.batch_size)

    @classmethod
    def check(cls, config: Any, kind: str) -> None:
        if config.device == "cuda":
            raise ValueError("the small problems run on a CPU; give device=cpu")

    @property
    def steps_per_epoch(self) -> int:
        return self.problem.steps // QUARTERS

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        batches = self.problem.batches(self.batch_size, generator)
        return itertools.islice(batches, self.steps_per_epoch)

    def gradient(self, model: nn.Module, compile: bool, autocast: bool) -> Gradient:
        def run(x: Tensor, y: Tensor) -> Tensor:
            model.zero_grad()
            loss = self.problem.loss(model, x, y)
            loss.backward()
            return loss.detach()

        return run

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        found = self.problem.evaluate(model)
        model.train()
        return {"held_out_loss": found}

    def renew_averages(self, model: nn.Module) -> None: ...

    def state_dict(self) -> dict[str, Tensor]:
        return {}  # the model's buffers have the state

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def kept(self, model: nn.Module) -> None: ...


TASK = ProblemTask
