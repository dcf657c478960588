"""Random quadratics: the paper's, and ill-conditioned ones with a known spectrum."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Batch, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.sampling import check_range, log_uniform, log_uniform_integer


@dataclass(frozen=True)
class QuadraticFamily(TaskFamily):
    """``||W x - y||^2 + noise`` (Andrychowicz et al. 2016, section 3.1).

    With ``condition = None`` the entries of ``W`` and ``y`` are standard normal, as in the paper. With a range
    ``(low, high)`` the squared singular values of ``W`` run geometrically from 1 down to 1/condition, condition
    log-uniform in the range, between random rotations; the optimum is standard normal.

    Args:
        dimensions: range of the number of coordinates, drawn log-uniformly.
        condition: range of the condition number of the Hessian, or None for the paper's Gaussian matrices.
        noise: standard deviation of Gaussian noise in every residual, drawn afresh at every step.
        initial_deviation: standard deviation of the starting point (released code of the paper: 0.01).
    """

    dimensions: tuple[int, int] = (10, 10)
    condition: tuple[float, float] | None = None
    noise: float = 0.0
    initial_deviation: float = 0.01

    def __post_init__(self) -> None:
        check_range("dimensions", self.dimensions, 1)
        if self.condition is not None:
            check_range("condition", self.condition, 1)
        if not (self.noise >= 0 and self.initial_deviation >= 0):
            raise ValueError(
                f"noise and initial_deviation must not be negative, got {self.noise} and {self.initial_deviation}"
            )

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw dimension and condition; every instance draws its own ``W`` and ``y``, so all splits are disjoint."""
        dimension = log_uniform_integer(rng, self.dimensions)
        condition = None if self.condition is None else log_uniform(rng, self.condition)
        return QuadraticTask(dimension, condition, self.noise, self.initial_deviation)


class QuadraticTask(Task):
    """Quadratics of one dimension and condition number."""

    def __init__(self, dimension: int, condition: float | None, noise: float, initial_deviation: float) -> None:
        self.dimension, self.condition = dimension, condition
        self.noise, self.initial_deviation = noise, initial_deviation

    def module(self) -> nn.Module:
        """A random ``W`` and ``y`` as buffers, a starting point as the parameter."""
        return Quadratic(self.dimension, self.condition, self.initial_deviation)

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """Noise in the residuals, ``(instances, dimension)``."""
        if self.noise == 0:
            return torch.zeros(instances, 1)
        return self.noise * torch.randn(instances, self.dimension, generator=generator)

    def hold_out(self) -> tuple[Task, Task]:
        """Noise is drawn afresh for every batch: there is nothing to hold out."""
        return self, self

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Squared norm of the (noisy) residual."""
        residual: Tensor = module() + batch
        return residual.square().sum()


class Quadratic(nn.Module):
    """The residual ``W x - y`` of one quadratic."""

    matrix: Tensor
    target: Tensor

    def __init__(self, dimension: int, condition: float | None, initial_deviation: float) -> None:
        super().__init__()
        if condition is None:
            matrix = torch.randn(dimension, dimension)
            target = torch.randn(dimension)
        else:
            left, _ = torch.linalg.qr(torch.randn(dimension, dimension))
            right, _ = torch.linalg.qr(torch.randn(dimension, dimension))
            singular_values = torch.logspace(0, -0.5 * math.log10(condition), dimension)
            matrix = left * singular_values @ right
            target = matrix @ torch.randn(dimension)
        self.register_buffer("matrix", matrix)
        self.register_buffer("target", target)
        self.point = nn.Parameter(initial_deviation * torch.randn(dimension))

    def forward(self) -> Tensor:
        """Residual, shape ``(dimension,)``."""
        return self.matrix @ self.point - self.target
