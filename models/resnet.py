"""He et al.'s residual networks for CIFAR-10 ("Deep Residual Learning", 2016, section 4.2).

Depth 6n + 2: a 3x3 convolution, three stages of n blocks with 16, 32 and 64 channels at 32x32,
16x16 and 8x8 pixels, global average pooling and one linear layer. Shortcuts are of type A, without
parameters: if the shape changes, they take every second pixel and fill new channels with zeros.

    ResNet-20   269,722 parameters        ResNet-44   658,586
    ResNet-32   464,154                   ResNet-56   853,018
"""

from __future__ import annotations

import itertools
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.declared import Model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each batch-normalised, around a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        # In place: the backward pass does not need the old values.
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            new = y.shape[1] - x.shape[1]
            x = F.pad(x, (0, 0, 0, 0, new // 2, new - new // 2))
        return F.relu(y.add_(x), inplace=True)


class ResNet(nn.Module):
    """Log-probabilities (batch, classes) of images (batch, 3, 32, 32), by 6n + 2 layers.

    Initial weights are normal with variance 2 / fan-out (He et al. 2015).

    Args:
        depth: the number of layers.
        classes: the number of classes.

    Raises:
        ValueError: the depth is not 6n + 2.
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (20, 32, 44, 56, ...), not {depth}")
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] + [16] * blocks + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(
            *(BasicBlock(before, after) for before, after in itertools.pairwise(widths))
        )
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x)), inplace=True))
        return F.log_softmax(self.linear(x.mean((2, 3))), dim=1)


MODELS = {
    f"resnet{depth}": Model(partial(ResNet, depth), reads="colour images")
    for depth in (20, 32, 44, 56)
}
