"""The models of the experiments, as plain modules."""

from torch import nn

from .mlp import MLP

MODELS: dict[str, type[nn.Module]] = {"mlp": MLP}
