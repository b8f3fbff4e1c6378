"""Two processes that train together are as one that has both their batches."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_loops import TALL, Net, batch, loss_of, same_weights
from torch import Tensor, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from hyperopt import HyperOptimizer, split_matrices
from hyperopt._engine.torch_private import local

STEPS = 9
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def train(
    model: nn.Module, optimizer: HyperOptimizer, steps: range, share: slice, fails: bool = True
) -> list[Tensor]:
    """Train on a share of each batch; return the hyperparameters after each step.

    Args:
        fails: whether one gradient is not finite here.
    """
    seen = []
    for t in steps:
        optimizer.zero_grad()
        loss_of(model, batch(t)[share]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        if t == 6 and fails:
            local(next(model.parameters()).grad).view(-1)[0] = torch.nan
        optimizer.step()
        seen.append(optimizer.snapshot())
    return seen


def matrices_in_parallel(rank: int, whole: Net) -> None:
    """A stack for the matrices and one for the rest: two processes are as one."""

    def mixed(model: nn.Module) -> HyperOptimizer:
        stacks = "Muon(0.02, bfloat16=False)[lr: log] / SGD(0.1)", "Adam(0.01) / SGD(1e-4)"
        groups = zip(split_matrices(model), stacks, strict=True)
        return HyperOptimizer([{"params": p, "stack": s} for p, s in groups], compile=False)

    alone, model = copy.deepcopy(whole), copy.deepcopy(whole)
    shared = nn.parallel.DistributedDataParallel(model)
    one, both = mixed(alone), mixed(model)
    expected = train(alone, one, range(5), slice(None), fails=False)
    seen = train(shared, both, range(5), slice(rank, None, 2), fails=False)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-9)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def data_parallel(rank: int, whole: Net, folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    matrices_in_parallel(rank, whole)
    model = nn.parallel.DistributedDataParallel(whole, gradient_as_bucket_view=True)
    optimizer = HyperOptimizer(model.parameters(), TALL, compile=False)
    seen = train(model, optimizer, range(STEPS), slice(rank, None, 2))
    return seen, [p.detach() for p in model.parameters()]


def save(model: nn.Module, optimizer: HyperOptimizer, path: Path) -> None:
    model_state, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": state}, checkpoint_id=path)


def load(model: nn.Module, optimizer: HyperOptimizer, path: Path) -> None:
    model_state, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": model_state, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)


def fully_sharded(rank: int, whole: Net, folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """With checkpoints on the way. One of two processes has nothing of the last bias's layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh, share = init_device_mesh("cpu", (2,)), slice(rank, None, 2)

    def make() -> tuple[Net, HyperOptimizer]:
        model = Net()
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, HyperOptimizer(model.parameters(), TALL, compile=False)

    model, optimizer = make()
    seen = train(model, optimizer, range(2), share)
    fresh, other = make()
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    seen += train(fresh, other, range(2, 4), share)
    model, optimizer = fresh, other
    of_each: Any = optimizer.state
    for p, own in of_each.items():
        assert own["exp_avg"].shape == p.shape and own["exp_avg"].placements == p.placements
    save(model, optimizer, folder / "checkpoint")
    options = StateDictOptions(full_state_dict=True)
    joined = get_optimizer_state_dict(model, optimizer, options=options)
    torch.save((get_model_state_dict(model, options=options), joined), folder / f"joined{rank}.pt")
    fresh, other = make()
    with pytest.raises(ValueError, match=r"divided .* in another way: number 0; load it by torch"):
        other.load_state_dict(joined)
    fresh.load_state_dict(model.state_dict())
    set_optimizer_state_dict(fresh, other, joined, options=options)
    seen += train(fresh, other, range(4, 6), share)
    load(fresh, other, folder / "checkpoint")
    seen[4:] = train(fresh, other, range(4, STEPS), share, fails=rank == 0)

    with pytest.raises(ValueError, match="divided over processes in different ways"):
        HyperOptimizer([*fresh.parameters(), nn.Parameter(torch.zeros(3))], TALL)
    with pytest.raises(ValueError, match="Muon needs whole parameters, but one is divided"):
        HyperOptimizer([p for p in fresh.parameters() if p.ndim == 2], "Muon(0.1)")
    hidden = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match="FullyShardedDataParallel"):
        HyperOptimizer(hidden.parameters(), TALL)
    weights: list[Any] = list(fresh.parameters())
    return seen, [p.full_tensor().detach() for p in weights]


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    done = {way.__name__: way(rank, Net(), folder) for way in (data_parallel, fully_sharded)}
    torch.save(done, folder / f"{rank}.pt")
    dist.barrier()  # a process that leaves while the other still listens may take it down
    dist.destroy_process_group()


def spawned(work: Callable[[int, Path], None], folder: Path) -> Path:
    """Run two processes; the folder that they have written to.

    Now and then a C++ thread of one is left joinable and aborts it; then they are run once more.
    """
    for attempt in (folder / "first", folder / "second"):
        attempt.mkdir()
        try:
            multiprocessing.spawn(work, (attempt,), 2)
            break
        except multiprocessing.ProcessExitedException as error:
            if error.signal_name != "SIGABRT" or attempt.name == "second":
                raise
    return attempt


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_processes_match_one(tmp_path):
    tmp_path = spawned(work, tmp_path)
    model = Net()
    optimizer = HyperOptimizer(model.parameters(), TALL, compile=False)
    expected = train(model, optimizer, range(STEPS), slice(None))
    assert optimizer.skipped[0] == 1
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for way, (seen, weights) in ours.items():
        assert all(map(torch.equal, seen, theirs[way][0])), f"{way}: the processes disagree"
        torch.testing.assert_close(seen, expected, rtol=1e-10, atol=0)
        assert all(map(torch.equal, weights, theirs[way][1]))
        torch.testing.assert_close(weights, [p.detach() for p in model.parameters()])

    # What they have saved goes on in one process too.
    def from_parts(fresh: Net, other: HyperOptimizer) -> None:
        load(fresh, other, tmp_path / "checkpoint")

    def from_one_file(fresh: Net, other: HyperOptimizer) -> None:
        weights, state = torch.load(tmp_path / "joined1.pt")
        fresh.load_state_dict(weights)
        other.load_state_dict(state)

    for take in (from_parts, from_one_file):
        fresh = Net()
        other = HyperOptimizer(fresh.parameters(), TALL, compile=False)
        take(fresh, other)
        seen = train(fresh, other, range(4, STEPS), slice(None))
        torch.testing.assert_close(seen, expected[4:], rtol=1e-10, atol=0)
        same_weights(fresh, model, rtol=1e-10)
