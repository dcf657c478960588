"""Curved valleys and rugged bowls: Rosenbrock's and Rastrigin's functions in random coordinates."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Batch, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.quadratic import random_rotation
from learned_optim.meta_train.tasks.sampling import (
    check_choices,
    check_not_negative,
    check_range,
    choose,
    log_uniform,
    log_uniform_integer,
)

Surface = Literal["rosenbrock", "rastrigin"]
SURFACES = ("rosenbrock", "rastrigin")


@dataclass(frozen=True)
class ValleyFamily(TaskFamily):
    """Deterministic test functions of global optimization, with ``u = R (c * x - b) + 1`` for the coordinates ``x``.

    - "rosenbrock": ``sum_i steepness (u_{i+1} - u_i^2)^2 + (1 - u_i)^2``, a curved valley to the minimum 0 at u = 1.
    - "rastrigin": ``sum_i (u_i - 1)^2 + steepness (1 - cos 2 pi (u_i - 1))``, many local minima around the same.

    ``R`` is a random rotation, ``b`` standard normal, ``c`` a random scale of each coordinate; all differ between
    instances, so that all splits are disjoint.

    Args:
        surfaces: one is drawn.
        dimensions: range of the number of coordinates, at least 2, drawn log-uniformly.
        steepness: range of the weight above, drawn log-uniformly (Rosenbrock: 100; Rastrigin: 10).
        rotated: whether the axes are turned at random.
        coordinate_scale: range of ``c``, log-uniform for each coordinate.
        initial_deviation: standard deviation of ``c * x`` at the start.
    """

    surfaces: tuple[Surface, ...] = ("rosenbrock",)
    dimensions: tuple[int, int] = (2, 20)
    steepness: tuple[float, float] = (1.0, 100.0)
    rotated: bool = True
    coordinate_scale: tuple[float, float] = (1.0, 1.0)
    initial_deviation: float = 1.0

    def __post_init__(self) -> None:
        check_choices("surfaces", self.surfaces, SURFACES)
        check_range("dimensions", self.dimensions, 2)
        check_range("steepness", self.steepness, 0, included=False)
        check_range("coordinate_scale", self.coordinate_scale, 0, included=False)
        check_not_negative(initial_deviation=self.initial_deviation)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw surface, dimension and steepness."""
        return ValleyTask(
            choose(rng, self.surfaces),
            log_uniform_integer(rng, self.dimensions),
            log_uniform(rng, self.steepness),
            self.rotated,
            self.coordinate_scale,
            self.initial_deviation,
        )


class ValleyTask(Task):
    """Functions of one surface, dimension and steepness; the options are those of the family."""

    same_operations = True

    def __init__(
        self,
        surface: Surface,
        dimension: int,
        steepness: float,
        rotated: bool,
        coordinate_scale: tuple[float, float],
        initial_deviation: float,
    ) -> None:
        self.surface, self.dimension, self.steepness = surface, dimension, steepness
        self.rotated, self.coordinate_scale, self.initial_deviation = rotated, coordinate_scale, initial_deviation

    def module(self) -> nn.Module:
        """Random coordinates as buffers, a starting point as the parameter."""
        rotation = random_rotation(self.dimension) if self.rotated else torch.eye(self.dimension)
        offset = torch.randn(self.dimension)
        low, high = (math.log(bound) for bound in self.coordinate_scale)
        scale = torch.empty(self.dimension).uniform_(low, high).exp()
        return Coordinates(rotation, offset, scale, self.initial_deviation * torch.randn(self.dimension) / scale)

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """Nothing: the loss is deterministic."""
        return torch.zeros(instances)

    def hold_out(self) -> tuple[Task, Task]:
        """The loss is deterministic: there is nothing to hold out."""
        return self, self

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The surface's height."""
        u: Tensor = module()
        if self.surface == "rosenbrock":
            head, tail = u[:-1], u[1:]
            return (self.steepness * (tail - head.square()).square() + (1 - head).square()).sum()
        waves = 1 - torch.cos(2 * math.pi * (u - 1))
        return ((u - 1).square() + self.steepness * waves).sum()


class Coordinates(nn.Module):
    """``u = R (c * x - b) + 1``."""

    rotation: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, rotation: Tensor, offset: Tensor, scale: Tensor, point: Tensor) -> None:
        super().__init__()
        self.register_buffer("rotation", rotation)
        self.register_buffer("offset", offset)
        self.register_buffer("scale", scale)
        self.point = nn.Parameter(point)

    def forward(self) -> Tensor:
        """``u``, shape ``(dimension,)``."""
        return self.rotation @ (self.scale * self.point - self.offset) + 1
