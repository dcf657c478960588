"""Low-rank matrix factorisation and completion by a product of two or more matrices: deep linear networks."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Batch, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.quadratic import random_rotation
from learned_optim.meta_train.tasks.sampling import (
    check_not_negative,
    check_range,
    log_uniform,
    log_uniform_integer,
)


@dataclass(frozen=True)
class FactorizationFamily(TaskFamily):
    """Mean squared error of ``W_L ... W_2 W_1`` on the observed entries of a random matrix of low rank.

    The target's singular values run geometrically from 1 down to 1/condition between random rotations, all times one
    factor that makes its entries of order one. Every instance draws its own target and entries, so that all splits are
    disjoint. Ranges ``(low, high)`` are drawn log-uniformly for every task, depth uniformly.

    Args:
        size: range of rows and of columns, at least 2.
        rank: range of the target's rank, at most its size.
        surplus: range of the inner width above the rank: 1 is just the rank.
        depth: range of the number of factors, at least 2; above, a deep linear network.
        condition: range of the ratio of the target's largest to its smallest singular value.
        observed: range of the fraction of entries that are known: 1 is factorisation, less is completion.
        minibatch: range of the fraction of these that one inner step sees.
        noise: standard deviation of fixed noise on the target's entries.
        gain: range of the factor on the initial matrices, whose entries have the deviation 1/sqrt(columns).
    """

    size: tuple[int, int] = (8, 32)
    rank: tuple[int, int] = (1, 4)
    surplus: tuple[float, float] = (1.0, 2.0)
    depth: tuple[int, int] = (2, 2)
    condition: tuple[float, float] = (1.0, 10.0)
    observed: tuple[float, float] = (1.0, 1.0)
    minibatch: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0
    gain: tuple[float, float] = (0.5, 1.0)

    def __post_init__(self) -> None:
        check_range("size", self.size, 2)
        check_range("rank", self.rank, 1)
        check_range("surplus", self.surplus, 1)
        check_range("depth", self.depth, 2)
        check_range("condition", self.condition, 1)
        check_range("gain", self.gain, 0, included=False)
        for name, bounds in (("observed", self.observed), ("minibatch", self.minibatch)):
            check_range(name, bounds, 0, included=False)
            if bounds[1] > 1:
                raise ValueError(f"{name} is a fraction, got {list(bounds)}")
        check_not_negative(noise=self.noise)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw sizes, rank, depth and fractions."""
        rows, columns = log_uniform_integer(rng, self.size), log_uniform_integer(rng, self.size)
        rank = min(log_uniform_integer(rng, self.rank), rows, columns)
        width = round(rank * log_uniform(rng, self.surplus))
        depth = int(rng.integers(self.depth[0], self.depth[1] + 1))
        return FactorizationTask(
            sizes=[columns, *[width] * (depth - 1), rows],
            rank=rank,
            condition=log_uniform(rng, self.condition),
            observed=log_uniform(rng, self.observed),
            minibatch=log_uniform(rng, self.minibatch),
            noise=self.noise,
            gain=log_uniform(rng, self.gain),
        )


class FactorizationTask(Task):
    """Targets of one size and rank.

    Args:
        sizes: columns of ``W_1``, of ``W_2``, ..., and rows of the last.
        rank: rank of the target.
        condition, observed, minibatch, noise, gain: as drawn by the family.
    """

    same_operations = True

    def __init__(
        self,
        sizes: list[int],
        rank: int,
        condition: float,
        observed: float,
        minibatch: float,
        noise: float,
        gain: float,
    ) -> None:
        self.sizes, self.rank, self.condition = sizes, rank, condition
        self.observed, self.minibatch, self.noise, self.gain = observed, minibatch, noise, gain

    def module(self) -> nn.Module:
        """A random target and its observed entries as buffers, the factors as parameters."""
        rows, columns = self.sizes[-1], self.sizes[0]
        left, right = random_rotation(rows)[:, : self.rank], random_rotation(columns)[:, : self.rank]
        values = torch.logspace(0, -math.log10(self.condition), self.rank)
        target = left * values @ right.T
        target = target / target.square().mean().sqrt() + self.noise * torch.randn(rows, columns)
        order = torch.randperm(rows * columns)
        known = (order < max(1, round(self.observed * rows * columns))).to(target).view(rows, columns)
        return FactorProduct(self.sizes, self.gain, target, known)

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """The entries that this step may see, 0 or 1, ``(instances, rows, columns)``."""
        shape = (instances, self.sizes[-1], self.sizes[0])
        if self.minibatch == 1:
            return torch.ones(instances, 1, 1)
        return (torch.rand(shape, generator=generator) < self.minibatch).to(torch.get_default_dtype())

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error of the entries that are observed and seen; at least one counts."""
        assert isinstance(module, FactorProduct)
        seen = batch * module.known
        errors = seen * (module() - module.target).square()
        loss: Tensor = errors.sum() / seen.sum().clamp(min=1)
        return loss


class FactorProduct(nn.Module):
    """``W_L ... W_1``."""

    target: Tensor
    known: Tensor

    def __init__(self, sizes: list[int], gain: float, target: Tensor, known: Tensor) -> None:
        super().__init__()
        self.register_buffer("target", target)
        self.register_buffer("known", known)
        self.factors = nn.ParameterList(
            gain / math.sqrt(columns) * torch.randn(rows, columns) for columns, rows in itertools.pairwise(sizes)
        )

    def forward(self) -> Tensor:
        """The product, ``(rows, columns)``."""
        first, *others = self.factors
        product: Tensor = first
        for factor in others:
            product = factor @ product
        return product
