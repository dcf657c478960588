"""Training from scratch: every task starts at a random point of its own."""

import torch
from torch import Tensor

from learned_optim.meta_train.few_shot.algorithms.base import MetaGradient
from learned_optim.meta_train.few_shot.algorithms.gradient import GradientAlgorithm
from learned_optim.meta_train.few_shot.episodes import Episodes
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.inner.unroll import InnerOptimizer
from learned_optim.meta_train.inner.vectorize import VectorizedTask


class Scratch(GradientAlgorithm):
    """The baseline that learns nothing across tasks.

    Args:
        initial: a learner's parameters, ``(N,)``; only their number matters.
        inner: the optimizer.
        seed: seed of the starting points.
    """

    def __init__(self, initial: Tensor, inner: InnerOptimizer, seed: int = 0) -> None:
        super().__init__(initial, inner)
        self.initial.requires_grad_(False)
        self.seed = seed

    def starting_points(self, learner: Learner, count: int) -> Tensor:
        """Random starting points, one for each of ``count`` learners, ``(count, N)``."""
        return VectorizedTask(learner.few_shot, count, self.seed, device=learner.device).initial_parameters

    def meta_gradient(self, learner: Learner, episodes: Episodes, generator: torch.Generator) -> MetaGradient:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError("training from scratch learns nothing across tasks")
