"""A small regression, and the plain loop that every framework is held against."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from helpers.rules import normal
from learned_optim import LearnedOptimizer

Make = Callable[..., Optimizer]
Batch = tuple[Tensor, Tensor]

# Adam beside the default rule: where Adam passes, the check is right.
OPTIMIZERS: Mapping[str, Make] = {"Adam": partial(Adam, lr=0.01), "rule-default": LearnedOptimizer}
each_optimizer = pytest.mark.parametrize("make", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))

# Frameworks warn of idle workers and of deprecated calls of their own; of how they use the optimizer, they may not.
ignore_warnings_of_frameworks = [
    pytest.mark.filterwarnings("error:.*(optimizer|lr_scheduler)"),  # the first mark is applied last
    pytest.mark.filterwarnings("ignore"),
]


class Net(nn.Module):
    """One hidden layer; always with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * normal(*parameter.shape, seed=index))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layers(inputs)
        return output

    def loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        loss: Tensor = (self(inputs) - targets).square().mean()
        return loss


def data() -> Batch:
    inputs = normal(64, 4, seed=10).float()
    return inputs, inputs.sin().sum(1, keepdim=True)


def batches() -> DataLoader[tuple[Tensor, ...]]:
    """Four batches, always in the same order."""
    return DataLoader(TensorDataset(*data()), batch_size=16)


def plain_loop(
    net: Net,
    optimizer: Optimizer,
    epochs: int,
    *,
    scheduler: LRScheduler | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: bool = False,
) -> list[Tensor]:
    """Train without a framework; ``scheduler`` advances with each step of the optimizer. Copies of the parameters."""
    for _ in range(epochs):
        for index, (inputs, targets) in enumerate(batches()):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = net.loss((inputs, targets)) / accumulate
            loss.backward()
            if (index + 1) % accumulate:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return copies(net.parameters())


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def assert_same(one: Iterable[Tensor], other: Iterable[Tensor]) -> None:
    """Equal to the bit."""
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b), f"apart by {(a - b).abs().max()}"


def assert_trained(net: Net) -> None:
    """The loss has fallen to half, which no standing still explains."""
    with torch.no_grad():
        assert net.loss(data()) < 0.5 * Net().loss(data())
