"""Baselines that compare examples with each other in a learned space, and train nothing on the support examples."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.few_shot.algorithms.base import Adapted, Algorithm, MetaGradient
from learned_optim.meta_train.few_shot.episodes import Episodes, Examples
from learned_optim.meta_train.few_shot.learner import Learner


class ComparisonAlgorithm(Algorithm):
    """Classification by comparing features of a query with those of the support examples.

    The features are what the learner's last layer sees; that layer itself is not used.

    Args:
        initial: the learner's first parameters, ``(N,)``.
    """

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.initial = nn.Parameter(initial.detach().clone())

    @abstractmethod
    def logits(self, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Logits ``(B, n, ways)`` from features.

        Args:
            support: ``(B, m, features)``.
            labels: one-hot, ``(B, m, ways)``.
            queries: ``(B, n, features)``.
        """

    def features(self, learner: Learner, inputs: Tensor, beside: Tensor | None = None) -> Tensor:
        """Features ``(B, n, features)``; ``beside`` as of :meth:`Learner.predict`."""
        return learner.predict(self.initial, inputs, beside, features=True)

    def meta_gradient(self, learner: Learner, episodes: Episodes, generator: torch.Generator) -> MetaGradient:
        """Gradient of the query loss."""
        with torch.enable_grad():
            (adapted,) = self.compare(learner, episodes.support)
            loss = learner.few_shot.losses(adapted.predict(episodes.query[0]), episodes.query[1]).mean()
            grads = torch.autograd.grad(loss, self.learned(), allow_unused=True, materialize_grads=True)
        return MetaGradient(grads, loss.detach(), loss.detach())

    @torch.no_grad()
    def adapt(self, learner: Learner, support: Examples, steps: int, generator: torch.Generator) -> Iterator[Adapted]:
        """The learners with their support examples; there are no steps."""
        yield from self.compare(learner, support)

    def compare(self, learner: Learner, support: Examples) -> Iterator[Adapted]:
        """:meth:`adapt` with a graph in grad mode.

        Raises:
            ValueError: the task is no classification.
        """
        if learner.few_shot.ways is None:
            raise ValueError(f"{type(self).__name__} classifies; {type(learner.few_shot).__name__} is a regression")
        yield ComparedExamples(self, learner, support)


class ComparedExamples(Adapted):
    """B tasks, whose support examples queries are compared with."""

    def __init__(self, algorithm: ComparisonAlgorithm, learner: Learner, support: Examples) -> None:
        self.algorithm, self.learner, self.inputs = algorithm, learner, support[0]
        self.labels = F.one_hot(support[1], learner.few_shot.outputs).to(algorithm.initial.dtype)
        self.features = algorithm.features(learner, self.inputs)

    def predict(self, inputs: Tensor, *, transductive: bool = True) -> Tensor:
        """Logits ``(B, n, ways)`` of the inputs ``(B, n, ...)``, from their likeness to the support examples."""
        queries = self.algorithm.features(self.learner, inputs, None if transductive else self.inputs)
        return self.algorithm.logits(self.features, self.labels, queries)
