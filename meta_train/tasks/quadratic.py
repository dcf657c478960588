"""Random quadratics: the paper's, and ill-conditioned, badly scaled and noisy ones with a known spectrum."""

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
    log_uniform,
    log_uniform_integer,
)

SPECTRA = ("geometric", "random")


@dataclass(frozen=True)
class QuadraticFamily(TaskFamily):
    """``||W x - y||^2 + noise`` (Andrychowicz et al. 2016, section 3.1).

    With ``condition = None`` the entries of ``W`` and ``y`` are standard normal, as in the paper. With a range
    ``(low, high)`` the squared singular values of ``W`` run from 1 down to 1/condition, condition log-uniform in the
    range, between random rotations; the optimum is standard normal.

    Args:
        dimensions: range of the number of coordinates, drawn log-uniformly.
        condition: range of the condition number of the Hessian, or None for the paper's Gaussian matrices.
        noise: standard deviation of Gaussian noise in every residual, drawn afresh at every step. The gradient's noise
            has the covariance ``4 noise^2 W^T W``, large where the loss is steep, as that of mini-batches.
        initial_deviation: standard deviation of the starting point (released code of the paper: 0.01).
        spectrum: with a condition, squared singular values between the two extremes: "geometric" or, drawn
            log-uniformly for every instance, "random".
        rotated: with a condition, whether the principal axes are turned at random; if not, coordinates are independent.
        gradient_noise: standard deviation of Gaussian noise in every coordinate of the gradient; the loss has none.
        coordinate_scale: range of a log-uniform factor on each coordinate by itself: ``f(c * x)`` from ``x_0 / c`` (Lv
            et al. 2017, section 4.1). None: no such factor.
    """

    dimensions: tuple[int, int] = (10, 10)
    condition: tuple[float, float] | None = None
    noise: float = 0.0
    initial_deviation: float = 0.01
    spectrum: Literal["geometric", "random"] = "geometric"
    rotated: bool = True
    gradient_noise: float = 0.0
    coordinate_scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_range("dimensions", self.dimensions, 1)
        if self.condition is not None:
            check_range("condition", self.condition, 1)
        elif self.spectrum != "geometric" or not self.rotated:
            raise ValueError("spectrum and rotated need a condition: Gaussian matrices have a spectrum of their own")
        if self.coordinate_scale is not None:
            check_range("coordinate_scale", self.coordinate_scale, 0, included=False)
        check_choices("spectrum", (self.spectrum,), SPECTRA)
        check_not_negative(
            noise=self.noise, initial_deviation=self.initial_deviation, gradient_noise=self.gradient_noise
        )

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw dimension and condition; every instance draws its own ``W`` and ``y``, so all splits are disjoint."""
        dimension = log_uniform_integer(rng, self.dimensions)
        condition = None if self.condition is None else log_uniform(rng, self.condition)
        return QuadraticTask(
            dimension,
            condition,
            self.noise,
            self.initial_deviation,
            spectrum=self.spectrum,
            rotated=self.rotated,
            gradient_noise=self.gradient_noise,
            coordinate_scale=self.coordinate_scale,
        )


class QuadraticTask(Task):
    """Quadratics of one dimension and condition number; the options are those of the family."""

    same_operations = True

    def __init__(
        self,
        dimension: int,
        condition: float | None,
        noise: float,
        initial_deviation: float,
        *,
        spectrum: str = "geometric",
        rotated: bool = True,
        gradient_noise: float = 0.0,
        coordinate_scale: tuple[float, float] | None = None,
    ) -> None:
        self.dimension, self.condition = dimension, condition
        self.noise, self.gradient_noise, self.initial_deviation = noise, gradient_noise, initial_deviation
        self.spectrum, self.rotated, self.coordinate_scale = spectrum, rotated, coordinate_scale

    def module(self) -> nn.Module:
        """A random ``W`` and ``y`` as buffers, a starting point as the parameter."""
        if self.condition is None:
            matrix = torch.randn(self.dimension, self.dimension)
            target = torch.randn(self.dimension)
        else:
            matrix = conditioned_matrix(self.dimension, self.condition, self.spectrum, self.rotated)
            target = matrix @ torch.randn(self.dimension)
        point = self.initial_deviation * torch.randn(self.dimension)
        if self.coordinate_scale is not None:
            low, high = (math.log(bound) for bound in self.coordinate_scale)
            scale = torch.empty(self.dimension).uniform_(low, high).exp()
            matrix, point = matrix * scale, point / scale
        return Quadratic(matrix, target, point)

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """Noise in the residuals and in the gradient, each ``(instances, dimension)``, or ``(instances, 1)`` zeros."""
        return tuple(
            deviation * torch.randn(instances, self.dimension, generator=generator)
            if deviation
            else torch.zeros(instances, 1)
            for deviation in (self.noise, self.gradient_noise)
        )

    def hold_out(self) -> tuple[Task, Task]:
        """Noise is drawn afresh for every batch: there is nothing to hold out."""
        return self, self

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Squared norm of the (noisy) residual, with a (noisy) gradient."""
        assert isinstance(module, Quadratic)
        residual_noise, gradient_noise = batch
        loss: Tensor = (module() + residual_noise).square().sum()
        if self.gradient_noise:
            loss = loss + (gradient_noise * (module.point - module.point.detach())).sum()  # zero, but for its gradient
        return loss


class Quadratic(nn.Module):
    """The residual ``W x - y`` of one quadratic."""

    matrix: Tensor
    target: Tensor

    def __init__(self, matrix: Tensor, target: Tensor, point: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("target", target)
        self.point = nn.Parameter(point)

    def forward(self) -> Tensor:
        """Residual, shape ``(dimension,)``."""
        return self.matrix @ self.point - self.target


def conditioned_matrix(dimension: int, condition: float, spectrum: str, rotated: bool) -> Tensor:
    """``W`` whose squared singular values run from 1 down to 1/condition, drawn with torch's global random state."""
    left, right = (random_rotation(dimension) if rotated else torch.eye(dimension) for _ in range(2))
    exponents = torch.linspace(0, 1, dimension)
    if spectrum == "random" and dimension > 2:
        exponents[1:-1] = torch.rand(dimension - 2)
    singular_values = 10 ** (-0.5 * math.log10(condition) * exponents)
    return left * singular_values @ right


def random_rotation(dimension: int) -> Tensor:
    """An orthogonal matrix, drawn with torch's global random state."""
    rotation: Tensor = torch.linalg.qr(torch.randn(dimension, dimension)).Q
    return rotation
