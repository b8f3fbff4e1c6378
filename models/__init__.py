"""The models of the experiments, as plain modules."""

from collections.abc import Callable
from functools import partial

from torch import nn

from .char_rnn import CharRNN
from .mlp import MLP
from .resnet import ResNet
from .softmax import Softmax

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56)},
    "char_rnn": CharRNN,
    "softmax": Softmax,
}
