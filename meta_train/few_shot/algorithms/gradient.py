"""Algorithms whose adaptation is a short training from a learned starting point."""

from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from learned_optim.meta_train.few_shot.algorithms.base import Adapted, Algorithm
from learned_optim.meta_train.few_shot.episodes import Episodes, Examples
from learned_optim.meta_train.few_shot.inner import ScaledRule
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.inner.unroll import InnerOptimizer, start, unroll
from learned_optim.rules import UpdateRule

NO_RANDOMNESS = torch.Generator()
"""The generator that the unroll passes on and nothing draws from: the learner's batches have been drawn already."""


class Point(NamedTuple):
    """A point in the training of B learners."""

    parameters: Tensor
    """``(B, N)``"""
    loss: Tensor
    """Loss on the batch of the next step, ``(B,)``."""
    grad: Tensor
    """Gradient of the loss, ``(B, N)``."""


class AdaptedParameters(Adapted):
    """Learners with parameters ``(B, N)``; ``support`` ``(B, m, ...)`` are the inputs that these were adapted on."""

    def __init__(self, learner: Learner, parameters: Tensor, support: Tensor) -> None:
        self.learner, self.parameters, self.support = learner, parameters, support

    def predict(self, inputs: Tensor, *, transductive: bool = True) -> Tensor:
        """Predictions ``(B, n, outputs)`` with the adapted parameters."""
        return self.learner.predict(self.parameters, inputs, None if transductive else self.support)


class GradientAlgorithm(Algorithm):
    """A learned starting point and an inner optimizer.

    Args:
        initial: the first starting point, ``(N,)``.
        inner: the optimizer, a module; what in it requires a gradient is learned too. None: :meth:`points` is the
            sub-class's own and takes the steps.
        steps: inner steps in meta-training.
        batch_size: support examples of an inner step; None: all.
    """

    def __init__(
        self, initial: Tensor, inner: InnerOptimizer | None, steps: int = 1, batch_size: int | None = None
    ) -> None:
        super().__init__()
        self.initial = nn.Parameter(initial.detach().clone())
        self.inner, self.steps, self.batch_size = inner, steps, batch_size

    def starting_points(self, learner: Learner, count: int) -> Tensor:
        """Starting points of ``count`` learners, ``(count, N)``."""
        return self.initial.expand(count, -1)

    def _inner_for(self, learner: Learner) -> InnerOptimizer:
        """The inner optimizer; a rule may use the learner's tensors, by their fresh parameters."""
        if self.inner is None:
            raise TypeError(f"{type(self).__name__} has no inner optimizer: it must take the steps in points()")
        if not isinstance(self.inner, UpdateRule):
            return self.inner
        scales = learner.scales(self.inner)
        return self.inner if scales is None else ScaledRule(self.inner, scales)

    def points(
        self, learner: Learner, batches: Iterator[Examples], count: int, steps: int, *, second_derivatives: bool = False
    ) -> Iterator[Point]:
        """The starting point of ``count`` learners, and where they are after each inner step.

        Differentiable in grad mode, with ``second_derivatives`` through the inner gradients as well.

        Args:
            learner: the module.
            batches: one for each inner step, and one more for the loss after the last.
            count: B.
            steps: inner steps.
            second_derivatives: let gradients flow through the inner gradients as well.
        """
        adapted, inner = learner.with_batches(self.starting_points(learner, count), batches), self._inner_for(learner)
        state = start(inner, adapted, NO_RANDOMNESS, second_derivatives=second_derivatives)
        yield Point(state.parameters, state.initial_loss, state.grad)
        for _ in range(steps):
            window = unroll(inner, adapted, state, 1, NO_RANDOMNESS, second_derivatives=second_derivatives)
            state = window.state
            yield Point(state.parameters, window.losses[0], state.grad)

    def judged_points(
        self, learner: Learner, episodes: Episodes, generator: torch.Generator, *, second_derivatives: bool = False
    ) -> list[Point]:
        """The points of meta-training: ``steps`` steps on support examples; the last loss is that of the queries."""
        steps = islice(minibatches(episodes.support, self.batch_size, generator), self.steps)
        batches = chain(steps, [episodes.query])
        count = len(episodes.query[0])
        return list(self.points(learner, batches, count, self.steps, second_derivatives=second_derivatives))

    @torch.no_grad()
    def adapt(self, learner: Learner, support: Examples, steps: int, generator: torch.Generator) -> Iterator[Adapted]:
        """The learners at the starting point, and after each inner step on the support examples."""
        batches = minibatches(support, self.batch_size, generator)
        for point in self.points(learner, batches, len(support[0]), steps):
            yield AdaptedParameters(learner, point.parameters, support[0])


def minibatches(examples: Examples, size: int | None, generator: torch.Generator) -> Iterator[Examples]:
    """Endlessly many batches of ``size`` examples of each task, none twice before all have come; None: all at once."""
    inputs, targets = examples
    count, rows = inputs.shape[:2]
    if size is None or size >= rows:
        yield from repeat(examples)
    assert size is not None  # for the type checker
    task = torch.arange(count, device=inputs.device)[:, None]
    while True:
        order = torch.rand(count, rows, generator=generator).argsort(1).to(inputs.device)
        for chosen in order[:, : rows - rows % size].split(size, 1):
            yield inputs[task, chosen], targets[task, chosen]
