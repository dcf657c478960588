r"""MAML: a starting point from which a few gradient steps lead far (Finn et al. 2017, section 2.2).

With :math:`U` the inner training and :math:`L` the loss on the queries, the meta-gradient is that of :math:`L(U(w))`:

.. math:: \nabla_w L(U(w)) = U'(w)^\top \, \nabla L(U(w)) ,

averaged over tasks. The unroll ends with the second factor, so that one product with the transposed Jacobian remains.
:math:`U'` holds second derivatives of the inner loss. Whatever else the inner optimizer learns gets its gradient in the
same product: the rates of Meta-SGD, the weights of an :class:`UpdateRule`.

On a perceptron with gradient descent inside, the same is computed without forming the adapted weights:
:mod:`learned_optim.meta_train.few_shot.low_rank`.
"""

from itertools import islice
from typing import ClassVar

import torch

from learned_optim.meta_train.few_shot.algorithms.base import MetaGradient
from learned_optim.meta_train.few_shot.algorithms.gradient import GradientAlgorithm, minibatches
from learned_optim.meta_train.few_shot.episodes import Episodes
from learned_optim.meta_train.few_shot.inner import SGD
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.few_shot.low_rank import LowRankSGD, applies, is_cheaper


class QueryTrained(GradientAlgorithm):
    """Base of the algorithms that learn from the query loss after the inner training; see the module's formula."""

    second_derivatives: ClassVar[bool] = True

    def meta_gradient(self, learner: Learner, episodes: Episodes, generator: torch.Generator) -> MetaGradient:
        """Gradient of the query loss after the inner training, through its steps."""
        with torch.enable_grad():
            points = self.judged_points(learner, episodes, generator, second_derivatives=self.second_derivatives)
            final = points[-1]
            directions = final.grad.detach() / len(final.grad)
            grads = torch.autograd.grad(final.parameters, self.learned(), directions)
        return MetaGradient(grads, final.loss.detach().mean(), points[0].loss.detach().mean())


class MAML(QueryTrained):
    """Model-agnostic meta-learning with an inner optimizer; see the module's formula."""

    low_rank: bool | None = None
    """Whether adapted weights are never formed, if possible; None: where it is cheaper. The result is the same."""

    def meta_gradient(self, learner: Learner, episodes: Episodes, generator: torch.Generator) -> MetaGradient:
        """Gradient of the query loss after the inner training, by the cheaper of two ways."""
        inputs = episodes.support[0]
        rows = inputs.shape[1] if self.batch_size is None else min(self.batch_size, inputs.shape[1])
        wanted = is_cheaper(learner, rows * self.steps) if self.low_rank is None else self.low_rank
        if wanted and type(self.inner) is SGD and applies(learner, inputs):
            return self._by_low_rank(learner, episodes, self.inner.lr, generator)
        return super().meta_gradient(learner, episodes, generator)

    def _by_low_rank(self, learner: Learner, episodes: Episodes, lr: float, generator: torch.Generator) -> MetaGradient:
        with torch.enable_grad():
            learners = LowRankSGD(learner, self.initial, lr, len(episodes.query[0]))
            batches = islice(minibatches(episodes.support, self.batch_size, generator), self.steps)
            support_losses = [learners.step(batch, second_derivatives=self.second_derivatives) for batch in batches]
            meta_loss = learners.losses(episodes.query).mean()
            grads = torch.autograd.grad(meta_loss, [self.initial])
        return MetaGradient(grads, meta_loss.detach(), support_losses[0].detach().mean())
