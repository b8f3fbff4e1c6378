"""One run in several processes, started by `torchrun ... -m experiments.run`.

Each process has a share of every batch. DistributedDataParallel computes the weighted sum of the
gradients. All processes have the same weights and hyperparameters. Only the first writes records.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.config.processes import is_first, size

Value = TypeVar("Value")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the process group of torchrun; with device=cuda, each process takes its own GPU."""
    if size() == 1:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def agreed(find: Callable[[], Value]) -> Value:
    """Call `find` in the first process; return its result, or raise its error, in all processes."""
    if size() == 1:
        return find()
    found: list[Any] = [None, None]
    if is_first():
        try:
            found[0] = find()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def summed(values: Tensor) -> Tensor:
    """Sum a value over all processes."""
    if size() > 1:
        dist.all_reduce(values)
    return values


class Shares:
    """Divides each batch among the processes, and weights each gradient by the share's size.

    Args:
        model: on this process's device; its parameters receive the gradient of the whole batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weight = 1.0
        self.model = model
        if size() > 1:
            self.model = DistributedDataParallel(model)
            self.model.register_comm_hook(self, _weighted_sum)

    def of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """This process's share of a batch."""
        if size() == 1:
            return images, labels
        if len(labels) < size():
            raise ValueError(
                f"a batch of {len(labels)} is too small for {size()} processes; give another "
                "trainer.batch_size or fewer processes"
            )
        own = slice(dist.get_rank(), None, size())
        self.weight = len(labels[own]) / len(labels)
        return images[own], labels[own]


def _weighted_sum(shares: Shares, bucket):  # torch rejects string annotations
    work = dist.all_reduce(bucket.buffer().mul_(shares.weight), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
