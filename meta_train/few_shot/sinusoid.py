"""Sine waves, each to be learned from a few points (Finn et al. 2017, section 5.1)."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learned_optim.meta_train.few_shot.episodes import Episodes, Examples, FewShotTask
from learned_optim.meta_train.tasks import Split
from learned_optim.meta_train.tasks.sampling import check_range


@dataclass(frozen=True)
class Sinusoid(FewShotTask):
    """``y = a sin(x - p)`` with ``a`` uniform in 0.1..5, ``p`` in 0..pi and ``x`` in -5..5, and a ReLU perceptron.

    Splits differ in their random numbers alone: no wave comes twice.

    Args:
        shots: points to learn from.
        queries: points that the meta-loss is taken on.
        hidden: units of each hidden layer.
        evaluation_queries: points of an episode in evaluations.
    """

    shots: int = 10
    queries: int = 10
    hidden: tuple[int, ...] = (40, 40)
    evaluation_queries: int = 100

    def __post_init__(self) -> None:
        sizes = (self.shots, self.queries, self.evaluation_queries, *self.hidden)
        check_range("the smallest and largest of shots, queries and hidden", (min(sizes), max(sizes)), 1)
        if not self.hidden:
            raise ValueError("hidden must name one layer or more, got none")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """A place on the wave."""
        return (1,)

    @property
    def features(self) -> int:
        """Units of the last hidden layer."""
        return self.hidden[-1]

    def embedding(self) -> nn.Sequential:
        """The hidden layers."""
        pairs = itertools.pairwise((1, *self.hidden))
        return nn.Sequential(*(layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())))

    def episodes(
        self, count: int, generator: torch.Generator, split: Split = "train", queries: int | None = None
    ) -> Episodes:
        """Episodes of one wave each, with points drawn along it."""
        amplitude = _uniform((count, 1, 1), 0.1, 5.0, generator)
        phase = _uniform((count, 1, 1), 0.0, math.pi, generator)

        def points(number: int) -> Examples:
            x = _uniform((count, number, 1), -5.0, 5.0, generator)
            return x, amplitude * (x - phase).sin()

        return Episodes(points(self.shots), points(self.queries if queries is None else queries))


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)
