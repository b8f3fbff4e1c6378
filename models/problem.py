"""The model of a small problem. The problem itself makes it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.declared import Model


def made(make: Callable[[], nn.Module]) -> nn.Module:
    return make()


MODELS = {"problem": Model(made, reads="a small problem")}
