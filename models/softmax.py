"""Softmax regression, 784-10: a convex problem."""

import torch
from torch import Tensor, nn

from models.declared import Model


class Softmax(nn.Module):
    """Log-probabilities, shape (n, 10), of images of shape (n, 28, 28), pixels in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(28 * 28, 10)

    def forward(self, images: Tensor) -> Tensor:
        return torch.log_softmax(self.linear(images.flatten(1)), dim=1)


MODELS = {"softmax": Model(Softmax, reads="grey images")}
