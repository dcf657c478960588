r"""Leap: a starting point from which the paths of training are short (Flennerhag et al. 2019, section 2).

With :math:`f_i` and :math:`w_i` loss and parameters after inner step :math:`i`, a path has the length
:math:`\sum_i \|(w_{i+1} - w_i,\, f_{i+1} - f_i)\|` on the loss surface. The end of each of its pieces is held
fixed, the Jacobian :math:`\partial w_i / \partial w_0` taken as the identity, which leaves

.. math:: -\sum_i \frac{(w_{i+1} - w_i) + (f_{i+1} - f_i) \nabla f_i}{\|(w_{i+1} - w_i,\, f_{i+1} - f_i)\|} .

A step that increases a noisy loss counts as one that has decreased it as much (the paper's stabiliser).
"""

import torch

from learned_optim.meta_train.few_shot.algorithms.base import MetaGradient
from learned_optim.meta_train.few_shot.algorithms.gradient import GradientAlgorithm, minibatches
from learned_optim.meta_train.few_shot.episodes import Episodes
from learned_optim.meta_train.few_shot.learner import Learner


class Leap(GradientAlgorithm):
    """Leap with the length of the path; see the module's formula. Query examples are not used."""

    @torch.no_grad()
    def meta_gradient(self, learner: Learner, episodes: Episodes, generator: torch.Generator) -> MetaGradient:
        """The direction that lengthens the paths of the inner trainings, averaged over the episodes."""
        batches = minibatches(episodes.support, self.batch_size, generator)
        path = self.points(learner, batches, len(episodes.support[0]), self.steps)
        point = first = next(path)
        direction = torch.zeros_like(point.grad)
        for following in path:
            moved = following.parameters - point.parameters
            fallen = -(following.loss - point.loss).abs()
            length = (moved.square().sum(1) + fallen.square()).sqrt().clamp(min=SHORTEST)
            direction -= (moved + fallen[:, None] * point.grad) / length[:, None]
            point = following
        return MetaGradient((direction.mean(0),), point.loss.mean(), first.loss.mean())


SHORTEST = 1e-12  # a step of no length has no direction either: the numerator is zero, and so is the quotient
