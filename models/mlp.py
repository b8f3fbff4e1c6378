"""The two-layer perceptron of the paper's Table 1: 784-128-10, 101,770 parameters."""

import torch
from torch import Tensor, nn

from models.declared import Model


class MLP(nn.Module):
    """784-128-10 with tanh after *both* layers, then log-softmax; torch's default Linear init.

    The second tanh is the paper's. It bounds the logits to [-1, 1], so that the loss cannot fall
    below log(1 + 9 exp(-2)) = 0.797 nats. (Chandra et al. 2022, section 4.1 and its code.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(28 * 28, 128)
        self.output = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute log-probabilities (n, 10) of images (n, 28, 28) with pixels in [0, 1]."""
        hidden = torch.tanh(self.hidden(images.flatten(1)))
        return torch.log_softmax(torch.tanh(self.output(hidden)), dim=1)


MODELS = {"mlp": Model(MLP, reads="grey images")}
