"""Small trainings with LearnedOptimizer, and comparisons of their parameters and states."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from helpers.rules import RULES, Build, normal, randomised


def random_rule(build: Build) -> Build:
    """The constructor with random meta-parameters."""
    return lambda: randomised(build())


RANDOM_RULES: dict[str, Build] = {name: random_rule(build) for name, build in RULES.items()}
"""Every architecture with random meta-parameters."""


class Net(nn.Module):
    """Two layers and a factor without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(0.0))
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * normal(*parameter.shape, seed=index) + 0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(inputs).tanh()) * self.scale
        return output


def mean_square(net: Net) -> Tensor:
    """The loss of ``Net`` on eight fixed examples."""
    dtype = net.scale.dtype
    inputs, targets = normal(8, 3, seed=10).to(dtype), normal(8, 2, seed=11).to(dtype)
    loss: Tensor = (net(inputs) - targets).square().mean()
    return loss


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int = 3, sign: float = 1.0) -> list[Tensor]:
    """Train for some steps and return copies of the parameters; ``sign=-1`` ascends."""
    for _ in range(steps):
        optimizer.zero_grad()
        (sign * mean_square(net)).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


def parameter(*values: float) -> nn.Parameter:
    """A one-dimensional float32 parameter."""
    return nn.Parameter(torch.tensor(values))


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal to the bit, dtypes included."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors of an optimizer's state, parameter by parameter."""
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


NOWHERE = nn.Parameter(torch.ones(1, device="meta"))
