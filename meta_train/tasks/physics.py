"""Physics-informed networks: the loss is the residual of a differential equation."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Batch, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.sampling import (
    check_choices,
    check_not_negative,
    check_range,
    choose,
    log_uniform_integer,
)

FIELD_ACTIVATIONS = ("tanh", "sine")


@dataclass(frozen=True)
class PhysicsFamily(TaskFamily):
    """Solve ``-u'' + reaction u^3 = f`` on [0, 1] with ``u(0) = u(1) = 0`` by a network (Raissi et al. 2019).

    The right-hand side belongs to the solution ``sum_k a_k sin(k pi x)``, ``a_k ~ N(0, 1/k^2)``, of every instance's
    own, so that all splits are disjoint. The loss is the mean squared residual at random points over the mean square of
    f, plus ``boundary`` times the squared values at both ends. Derivatives of u are carried forward through the layers.

    The default rule is not meta-trained on this family: it stands for what that rule has not seen.

    Args:
        modes: range of the number of terms of the solution.
        reaction: strength of the nonlinear term.
        layers: range of the number of hidden layers.
        width: range of their units, drawn log-uniformly.
        activations: "tanh" or "sine"; one is drawn.
        points: range of the number of points of a batch, drawn log-uniformly.
        boundary: weight of the boundary values.
    """

    modes: tuple[int, int] = (1, 4)
    reaction: float = 1.0
    layers: tuple[int, int] = (2, 3)
    width: tuple[int, int] = (16, 32)
    activations: tuple[Literal["tanh", "sine"], ...] = ("tanh",)
    points: tuple[int, int] = (32, 64)
    boundary: float = 1.0

    def __post_init__(self) -> None:
        check_range("modes", self.modes, 1)
        check_range("layers", self.layers, 1)
        check_range("width", self.width, 1)
        check_range("points", self.points, 1)
        check_choices("activations", self.activations, FIELD_ACTIVATIONS)
        check_not_negative(reaction=self.reaction, boundary=self.boundary)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw an architecture and the number of terms."""
        layers = int(rng.integers(self.layers[0], self.layers[1] + 1))
        return PhysicsTask(
            modes=int(rng.integers(self.modes[0], self.modes[1] + 1)),
            reaction=self.reaction,
            widths=[log_uniform_integer(rng, self.width) for _ in range(layers)],
            activation=choose(rng, self.activations),
            points=log_uniform_integer(rng, self.points),
            boundary=self.boundary,
        )


class PhysicsTask(Task):
    """Equations whose solutions have the same number of terms; the options are those of the family."""

    def __init__(
        self, modes: int, reaction: float, widths: list[int], activation: str, points: int, boundary: float
    ) -> None:
        self.modes, self.reaction, self.boundary = modes, reaction, boundary
        self.widths, self.activation, self.points = widths, activation, points

    def module(self) -> nn.Module:
        """A network, and the coefficients of the solution as a buffer."""
        return Field(self.widths, self.activation, torch.randn(self.modes) / torch.arange(1, self.modes + 1))

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """Points in [0, 1], ``(instances, points)``."""
        return torch.rand(instances, self.points, generator=generator)

    def hold_out(self) -> tuple[Task, Task]:
        """Points are drawn afresh for every batch: there is nothing to hold out."""
        return self, self

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Relative residual and boundary values."""
        assert isinstance(module, Field)
        ends = torch.arange(2, dtype=batch.dtype, device=batch.device)
        values, second = module(torch.cat([batch, ends]))
        inside = values[:-2]
        source = module.source(batch, self.reaction)
        residual = self.reaction * inside**3 - second[:-2] - source
        loss: Tensor = residual.square().mean() / source.square().mean() + self.boundary * values[-2:].square().sum()
        return loss


class Field(nn.Module):
    """A perceptron ``u(x)`` from one number to one, and the solution that it looks for."""

    coefficients: Tensor

    def __init__(self, widths: list[int], activation: str, coefficients: Tensor) -> None:
        super().__init__()
        self.register_buffer("coefficients", coefficients)
        self.activation = activation
        self.hidden = nn.ModuleList(nn.Linear(*sizes) for sizes in itertools.pairwise([1, *widths]))
        self.last = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` and ``u''`` at the points ``x``, each ``(points,)``."""
        values, first, second = 2 * x[:, None] - 1, torch.full_like(x, 2.0)[:, None], torch.zeros_like(x)[:, None]
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            values, first, second = layer(values), first @ layer.weight.T, second @ layer.weight.T
            if self.activation == "tanh":
                values = values.tanh()
                slope = 1 - values.square()
                curvature = -2 * values * slope
            else:
                values, slope = values.sin(), values.cos()
                curvature = -values
            first, second = slope * first, slope * second + curvature * first.square()
        return self.last(values).squeeze(-1), (second @ self.last.weight.T).squeeze(-1)

    def solution(self, x: Tensor) -> Tensor:
        """The values that ``u`` is to take, ``(points,)``."""
        return torch.sin(self._phases(x)) @ self.coefficients

    def source(self, x: Tensor, reaction: float) -> Tensor:
        """``f`` at the points ``x``."""
        frequencies = math.pi * torch.arange(1, len(self.coefficients) + 1, device=x.device)
        bent = torch.sin(self._phases(x)) @ (frequencies.square() * self.coefficients)
        return bent + reaction * self.solution(x) ** 3

    def _phases(self, x: Tensor) -> Tensor:
        """``k pi x``, ``(points, modes)``."""
        return math.pi * x[:, None] * torch.arange(1, len(self.coefficients) + 1, device=x.device)
