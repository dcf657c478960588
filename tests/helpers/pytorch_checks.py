"""Configurations of Adam and of every rule, and the problem, for PyTorch's own checks of its optimizers."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, lr_scheduler

from helpers.contract import adam_inputs, optimizer_inputs
from helpers.rules import normal
from learned_optim import LearnedOptimizer, available_rules


class Configuration(NamedTuple):
    """A kind of optimizer with options, and the rate that these checks may set."""

    kind: type[Optimizer]
    options: Mapping[str, Any]
    rate: float

    def make(self, params: Any, **options: Any) -> Optimizer:
        merged: dict[str, Any] = {**copy.deepcopy(dict(self.options)), **options}
        return self.kind(params, **merged)

    @property
    def direction(self) -> int:
        return 1 if self.options.get("maximize", False) else -1


SHORT = ("default", "maximize", "capturable", "differentiable", "state_dtype")
"""Options that rules other than the default are checked with: the others do not reach the rule."""
LRS = {rule: 0.1 if rule.startswith("lstm-l2l") else 1.0 for rule in available_rules()}
"""The paper's rules see the scale of the gradient, which is hundreds of times that of their own tasks here."""
CONFIGURATIONS = {
    **{f"Adam-{each.desc}": Configuration(Adam, each.kwargs, 0.001) for each in adam_inputs("cpu")},
    "Adam-foreach": Configuration(Adam, {"foreach": True}, 0.001),
    "Adam-fused": Configuration(Adam, {"fused": True}, 0.001),
    **{
        f"{rule}-{each.desc}": Configuration(
            LearnedOptimizer, {"rule": rule, "lr": LRS[rule], **each.kwargs}, LRS[rule]
        )
        for rule in available_rules()
        for each in optimizer_inputs("cpu")
        if rule == "default" or each.desc in SHORT
    },
}
# A step that autograd records may not write to a leaf; PyTorch leaves it out of most checks, too.
UNRECORDED = {name: each for name, each in CONFIGURATIONS.items() if not each.options.get("differentiable")}
KINDS = {name: UNRECORDED[name] for name in ("Adam-default", *(f"{rule}-default" for rule in available_rules()))}


def over(configurations: Mapping[str, Configuration]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("configuration", list(configurations.values()), ids=list(configurations))


class Problem:
    """PyTorch's: the sum of squares of ``weight @ inputs + bias``."""

    def __init__(self, contiguous: bool = True, device: str = "cpu", bias_device: str | None = None) -> None:
        weight, bias = normal(10, 5, 2, seed=1).float(), normal(10, 2, seed=2).float()
        weight, bias = weight[..., 0], bias[..., 0]
        if contiguous:
            weight, bias = weight.contiguous(), bias.contiguous()
        self.weight = nn.Parameter(weight.to(device))
        self.bias = nn.Parameter(bias.to(bias_device or device))
        self.inputs = normal(5, seed=3).float().to(device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self) -> Tensor:
        loss: Tensor = ((self.weight @ self.inputs).to(self.bias.device) + self.bias).square().sum()
        return loss

    def backward(self) -> float:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss()
        loss.backward()
        return loss.item()

    def train(self, optimizer: Optimizer, steps: int, schedulers: Sequence[Any] = ()) -> None:
        for _ in range(steps):
            loss = optimizer.step(self.backward)
            for scheduler in schedulers:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    assert loss is not None
                    scheduler.step(loss)
                else:
                    scheduler.step()

    def copy(self) -> "Problem":
        return copy.deepcopy(self)


def assert_went(problem: Problem, before: float, direction: int) -> None:
    assert direction * (problem.loss().item() - before) > 0


def assert_equal(one: Any, other: Any) -> None:
    """Nested dictionaries and lists are equal, tensors to the bit, dtypes and devices included."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other
