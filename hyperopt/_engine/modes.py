"""Keep the caller's modes away from the tensors that an optimizer stores."""

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
    """Whether parameters are fake tensors of a FakeTensorMode, without values."""
    return any(isinstance(p, FakeTensor) for p in params)


@contextlib.contextmanager
def neutral(fake: bool) -> Iterator[None]:
    """Turn off gradients, autocast and inference mode, and fake tensors unless ``fake``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if not fake:
            stack.enter_context(unset_fake_temporarily())
        yield


def outside_modes(method: Method) -> Method:
    """Decorate a method that creates stored tensors: it runs outside the caller's modes.

    ``self`` must have ``is_fake``.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = not (torch.is_inference_mode_enabled() or torch.is_grad_enabled() or has_modes())
        if plain:
            return method(self, *args, **kwargs)
        with neutral(self.is_fake):
            return method(self, *args, **kwargs)

    return cast(Method, wrapped)
