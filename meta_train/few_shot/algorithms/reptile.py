r"""Reptile: move the starting point towards where the inner training has led (Nichol et al. 2018, algorithm 2).

The meta-gradient is :math:`w - U(w)`, averaged over tasks; with gradient descent inside, the rate times the sum
:math:`g_1 + \dots + g_k` of the inner gradients, each of a minibatch of its own. Their other combinations are what the
paper compares in section 6.2: :math:`g_k` alone is first-order MAML with a separate tail minibatch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.meta_train.few_shot.algorithms.base import MetaGradient
from learned_optim.meta_train.few_shot.algorithms.gradient import GradientAlgorithm
from learned_optim.meta_train.few_shot.episodes import Episodes
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.inner.unroll import InnerOptimizer


class Reptile(GradientAlgorithm):
    """Reptile; see the module's formula.

    Args:
        initial: the first starting point, ``(N,)``.
        inner: the inner optimizer.
        steps: inner steps in meta-training; with one, Reptile is training on all tasks together.
        batch_size: support examples of an inner step; None: all.
        combination: factors of the inner gradients, one for each step, instead of ``w - U(w)``.

    Raises:
        ValueError: there are not as many factors as steps.
    """

    def __init__(
        self,
        initial: Tensor,
        inner: InnerOptimizer,
        steps: int = 5,
        batch_size: int | None = None,
        combination: Sequence[float] | None = None,
    ) -> None:
        super().__init__(initial, inner, steps, batch_size)
        if combination is not None and len(combination) != steps:
            raise ValueError(f"combination must have a factor for each of {steps} inner steps, got {combination}")
        self.combination = combination

    @torch.no_grad()
    def meta_gradient(self, learner: Learner, episodes: Episodes, generator: torch.Generator) -> MetaGradient:
        """The way back from the ends of the inner trainings, or a combination of their gradients."""
        points = self.judged_points(learner, episodes, generator)
        final = points[-1]
        if self.combination is None:
            direction = self.initial - final.parameters.mean(0)
        else:
            inner_grads = torch.stack([point.grad.mean(0) for point in points[:-1]])
            direction = torch.tensor(self.combination, dtype=inner_grads.dtype, device=inner_grads.device) @ inner_grads
        return MetaGradient((direction,), final.loss.mean(), points[0].loss.mean())
