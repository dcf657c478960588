"""Pre-training on all tasks together, then fine-tuning: the baseline that knows of no episodes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.few_shot.algorithms.base import MetaGradient
from learned_optim.meta_train.few_shot.algorithms.gradient import GradientAlgorithm
from learned_optim.meta_train.few_shot.episodes import Episodes
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.inner.unroll import InnerOptimizer


class Pretraining(GradientAlgorithm):
    """One learner for all tasks at once, as the starting point of fine-tuning.

    In classification it learns to tell all classes of meta-training apart, with a last layer of its own in place of the
    learner's; fine-tuning starts with the learner's, which is as it was initialised.

    Args:
        initial: the first starting point, ``(N,)``.
        inner: the optimizer that fine-tunes.
        steps: its steps, where nothing else is said.
        features: width of the learner's last hidden layer, in classification.
        classes: number of all classes of meta-training, in classification.
    """

    def __init__(
        self, initial: Tensor, inner: InnerOptimizer, steps: int = 1, *, features: int = 0, classes: int = 0
    ) -> None:
        super().__init__(initial, inner, steps)
        self.head = nn.Parameter(initial.new_zeros(classes, features)) if classes else None

    def meta_gradient(self, learner: Learner, episodes: Episodes, generator: torch.Generator) -> MetaGradient:
        """Gradient of the loss on all examples, support and queries, of all episodes."""
        inputs, targets = (torch.cat(pair, 1) for pair in zip(episodes.support, episodes.query, strict=True))
        with torch.enable_grad():
            if self.head is None:
                loss = learner.few_shot.losses(learner.predict(self.initial, inputs), targets).mean()
            else:
                assert episodes.classes is not None  # for the type checker: a head comes with classes
                features = learner.predict(self.initial, inputs.flatten(0, 1)[None], features=True)[0]
                loss = F.cross_entropy(features @ self.head.t(), episodes.classes.gather(1, targets).flatten())
            grads = torch.autograd.grad(loss, self.learned(), allow_unused=True, materialize_grads=True)
        return MetaGradient(grads, loss.detach(), loss.detach())
