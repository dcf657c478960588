"""Optimizers and small trainings for the contract that every optimizer keeps (tests/optimizer/test_contract*.py)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.testing._internal.common_optimizers import OptimizerInput

from helpers.rules import normal, randomised
from learned_optim import LearnedOptimizer, available_rules
from learned_optim.rules import LSTML2L

Make = Callable[..., Optimizer]


def optimizer_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Options that all optimizers share ("global" in common_optimizers.py), and those of LearnedOptimizer alone."""
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.5},
        "Tensor lr": {"lr": torch.tensor(0.5)},
        "nonzero weight_decay": {"weight_decay": 1e-4},
        "maximize": {"weight_decay": 1e-4, "maximize": True},
        "capturable": {"capturable": True},
        "Tensor lr with capturable": {"lr": torch.tensor(0.5), "capturable": True, "maximize": True},
        "differentiable": {"differentiable": True},
        "propagate": {"nonfinite": "propagate"},
        "error": {"nonfinite": "error"},
        "state_dtype": {"state_dtype": torch.float16},
    }
    # No parameters, as in PyTorch's own inputs; the annotation there does not admit it.
    return [OptimizerInput(None, kwargs, name) for name, kwargs in options.items()]  # type: ignore[arg-type]


def adam_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Options that PyTorch checks its own Adam with."""
    from torch.testing._internal.common_optimizers import optim_inputs_func_adam

    inputs: list[OptimizerInput] = optim_inputs_func_adam(device, dtype)
    return inputs


# A rate at which Adam does in a few steps what the rules do at theirs.
OPTIMIZERS: Mapping[str, Make] = {
    "Adam": partial(Adam, lr=0.01),
    **{f"rule-{name}": partial(LearnedOptimizer, rule=name) for name in available_rules()},
    "rule-with-random-weights": lambda params, **options: LearnedOptimizer(
        params, randomised(LSTML2L(hidden_size=4)), **options
    ),
}
"""The optimizers that keep the contract. Adam is the control: where Adam passes, the check is right."""

each_optimizer = pytest.mark.parametrize("make", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))


class Net(nn.Module):
    """Two layers, of which the second may use the weights of the first."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.second.weight = self.first.weight
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * normal(*parameter.shape, seed=index))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(inputs).tanh())
        return output


def loss_of(net: nn.Module, seed: int = 10) -> Tensor:
    """Mean square error of the network on eight examples that follow from the seed."""
    like = next(net.parameters())
    inputs, targets = normal(8, 4, seed=seed).to(like), normal(8, 4, seed=seed + 1).to(like)
    loss: Tensor = (net(inputs) - targets).square().mean()
    return loss


def train(net: nn.Module, optimizer: Optimizer, steps: int = 3, scheduler: Any = None) -> list[Tensor]:
    """Train for some steps and return copies of the parameters."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [parameter.detach().clone() for parameter in net.parameters()]
