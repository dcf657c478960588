"""Two processes against one: a shard is stepped to the bit as the whole is, and states move between numbers of ranks.

Gradients are made equal: all processes see the same batch, and the mean of two equal gradients is exact.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from helpers.processes import SECONDS, run_in_processes
from helpers.rules import normal
from learned_optim import LearnedOptimizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"),
]


class Net(nn.Module):
    """Sizes that two processes cannot share evenly: rows of 5, a bias of 1, of which one process has nothing.

    The first weights are small, so that the default rule gives them a scale.
    """

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, width), nn.Linear(width, 4), nn.Linear(4, 1)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_((0.5 if index > 0 else 0.005) * normal(*parameter.shape, seed=index))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.third(self.second(self.first(inputs).tanh()).tanh())
        return output


def loss_of(net: nn.Module) -> Tensor:
    loss: Tensor = (net(normal(8, 3, seed=10).float()) - normal(8, 1, seed=11).float()).square().mean()
    return loss


def train(net: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(net: nn.Module, reference: nn.Module) -> None:
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(full(one.detach()), other.detach())


def assert_sharded_equals_unsharded(net: nn.Module, reference: nn.Module) -> None:
    """Three steps with equal gradients; then parameters and states are equal to the bit, and sharded alike."""
    optimizer = LearnedOptimizer(net.parameters(), lr=0.5, weight_decay=1e-4)
    plain = LearnedOptimizer(reference.parameters(), lr=0.5, weight_decay=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(net).backward()
        for one, other in zip(net.parameters(), reference.parameters(), strict=True):
            assert one.grad is not None
            other.grad = full(one.grad).clone()
        optimizer.step()
        plain.step()
    assert_same(net, reference)
    assert 0 < min(state["scale"] for state in plain.state.values()) < 0.5
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        for entry, value in plain.state[other].items():
            shard = optimizer.state[one][entry]
            assert torch.equal(full(shard), value)
            if entry not in ("step", "scale") and isinstance(one, DTensor):
                assert isinstance(shard, DTensor)
                assert shard.shape == (len(value), *one.shape)
                moved = [Shard(place.dim + 1) if isinstance(place, Shard) else place for place in one.placements]
                assert list(shard.placements) == moved


# What the processes run.


def data_parallel(folder: Path) -> None:
    net = Net()
    parallel = DistributedDataParallel(net)
    reference = Net()
    assert_sharded_equals_unsharded(parallel, reference)
    gathered = [torch.empty(5, 3) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, net.first.weight.detach())
    assert all(torch.equal(other, gathered[0]) for other in gathered)


def fully_sharded(folder: Path) -> None:
    net = Net()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    assert_sharded_equals_unsharded(net, Net())


def tensor_parallel(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = Net(width=6)  # torch refuses widths that do not divide evenly
    parallelize_module(net, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
    assert_sharded_equals_unsharded(net, Net(width=6))


def gradient_of_another_placement(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole, grad = normal(6, 4).float(), normal(6, 4, seed=1).float()
    sharded = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    reference = nn.Parameter(whole.clone())
    sharded.grad = distribute_tensor(grad, mesh, [Replicate()])
    reference.grad = grad.clone()
    LearnedOptimizer([sharded]).step()
    LearnedOptimizer([reference]).step()
    assert torch.equal(full(sharded.detach()), reference.detach())


def error_on_all_ranks(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(torch.tensor([1.0, float("nan"), 1.0, 1.0]), mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match="nothing was changed"):  # not only where the NaN is
        LearnedOptimizer([sharded], nonfinite="error").step()


def zero_redundancy(folder: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of a deprecation when imported

    net, reference = Net(), Net()
    optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=LearnedOptimizer, lr=0.5)
    train(net, optimizer)
    train(reference, LearnedOptimizer(reference.parameters(), lr=0.5))
    assert_same(net, reference)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        assert len(optimizer.state_dict()["state"]) == 6


def flat_shards(folder: Path) -> None:
    for use_orig_params in (True, False):
        net = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        optimizer = LearnedOptimizer(net.parameters())
        train(net, optimizer)
        assert {parameter.dim() for parameter in net.parameters()} == {1}  # Net has matrices
        assert {float(state["scale"]) for state in optimizer.state.values()} == {1.0}  # and first weights near zero
        with pytest.raises((AssertionError, RuntimeError)):
            FullyShardedDataParallel.optim_state_dict(net, optimizer)


def continue_from_checkpoint(folder: Path) -> None:
    """Go on from the newest checkpoint in the folder, if any, for three steps, and write the next."""
    earlier = len(list(folder.glob("checkpoint-*")))
    dist.barrier()
    net = Net()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = LearnedOptimizer(net.parameters(), lr=0.5)
    if earlier:
        model_state, optimizer_state = get_state_dict(net, optimizer)
        load_checkpoint(
            {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / f"checkpoint-{earlier}"
        )
        set_state_dict(net, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    train(net, optimizer)
    reference = Net()
    plain = LearnedOptimizer(reference.parameters(), lr=0.5)
    train(reference, plain, steps=3 * (earlier + 1))
    assert_same(net, reference)
    assert 0 < min(state["scale"] for state in plain.state.values()) < 0.5
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        for entry, value in plain.state[other].items():
            assert optimizer.state[one][entry].dtype == value.dtype
            assert torch.equal(full(optimizer.state[one][entry]), value)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    save_checkpoint(
        {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / f"checkpoint-{earlier + 1}"
    )


# Starting and ending them.


CHECKS: list[Callable[[Path], None]] = [
    data_parallel,
    fully_sharded,
    tensor_parallel,
    gradient_of_another_placement,
    error_on_all_ranks,
    zero_redundancy,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: str(check.__name__))
def test_two_processes_match_one(check: Callable[[Path], None], tmp_path: Path) -> None:
    run_in_processes(check, 2, tmp_path)


def test_checkpoint_is_independent_of_the_number_of_processes(tmp_path: Path) -> None:
    for ranks in (2, 1, 2):
        run_in_processes(continue_from_checkpoint, ranks, tmp_path)


def test_fsdp1_is_unsupported_as_documented(tmp_path: Path) -> None:
    """The documents say that it does not: should it begin to, they are to be changed."""
    run_in_processes(flat_shards, 2, tmp_path)


def test_failure_of_one_process_is_raised_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_in_processes(fail_on_the_second, 2, tmp_path)
    assert time.monotonic() - began < SECONDS


def fail_on_the_second(folder: Path) -> None:
    if dist.get_rank() == 1:
        1 / 0  # noqa: B018
    dist.barrier()
