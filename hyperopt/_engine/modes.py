"""The caller's modes, which must not mark what an optimizer keeps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .torch_private import FakeTensor, has_modes, unset_fake_temporarily

Method = TypeVar("Method", bound=Callable[..., Any])


def is_fake(params: Iterable[Tensor]) -> bool:
    """Whether parameters hold no numbers, but stand for some in a FakeTensorMode."""
    return any(isinstance(p, FakeTensor) for p in params)


@contextlib.contextmanager
def neutral(fake: bool) -> Iterator[None]:
    """No gradients, autocast or inference mode; fake tensors only beside fake parameters."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if not fake:
            stack.enter_context(unset_fake_temporarily())
        yield


def keeps(method: Method) -> Method:
    """For methods that make what lives on: they run outside of the caller's modes.

    The first argument has ``is_fake``.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = not (torch.is_inference_mode_enabled() or torch.is_grad_enabled() or has_modes())
        if plain:
            return method(self, *args, **kwargs)
        with neutral(self.is_fake):
            return method(self, *args, **kwargs)

    return cast(Method, wrapped)
