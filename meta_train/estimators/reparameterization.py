r"""Reparameterization gradient of the smoothed meta-loss: backpropagation at perturbed meta-parameters.

.. math:: g = \frac 1 K \sum_k \tfrac 1 2 \big( \nabla L(w + \varepsilon_k) + \nabla L(w - \varepsilon_k) \big)

is an unbiased estimate of :math:`\nabla_w \mathrm E_\varepsilon L(w + \varepsilon)` (Metz et al. 2019, section 4.1)
if inner gradients are differentiated too (``second_derivatives``); by default they count as constants, as in
:mod:`.truncated_bptt`. Of low variance over short windows; over long ones, where inner training is chaotic, gradients
explode and their average is worthless.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.common.strict import Count
from learned_optim.meta_train.estimators.base import Combination, Directions, Part, WindowShare
from learned_optim.meta_train.estimators.perturbation import (
    PerturbationEstimator,
    antithetic,
    as_particles,
    first_copy,
)
from learned_optim.meta_train.estimators.truncated_bptt import backpropagate, check_replay
from learned_optim.meta_train.inner.particles import ParticleRule, as_meta_grads
from learned_optim.meta_train.inner.unroll import Unroll
from learned_optim.rules import UpdateRule


class PairGradients(NamedTuple):
    """Backpropagation through the share of one window: k of its K antithetic pairs."""

    grads: Tensor
    """Mean gradient of each pair, ``(k, M)``."""
    meta_losses: Tensor
    """Meta-loss of each particle, ``(2 k,)``."""
    unrolled: Unroll
    """The particles' window, detached."""


@dataclass(frozen=True)
class Reparameterization(PerturbationEstimator):
    """Backpropagation, averaged over antithetic perturbations.

    The next window starts from where the first particles have come to.

    Args:
        second_derivatives: whether to differentiate through the inner gradients too.
        replay_coordinates: number of coordinates, the same for all particles, that :func:`truncated_bptt` replays.
    """

    second_derivatives: bool = False
    replay_coordinates: Count | None = None

    name = "reparameterization"
    reports: ClassVar[tuple[str, ...]] = ("variance",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_replay(self.second_derivatives, self.replay_coordinates)

    def sums_length(self, meta_parameters: int, pieces: int) -> int:
        """A gradient for each of the K pairs."""
        return self.pairs * pieces * meta_parameters

    def train_share(
        self, rule: UpdateRule, window: WindowShare, directions: Directions, learned: dict[str, Tensor]
    ) -> Part:
        """Differentiate through the share's particles; the gradients of its own pairs among zeros."""
        result = self.pair_gradients(rule, window, directions)
        return self._part(result, window.share.scatter(result.grads).flatten(), window)

    @torch.no_grad()
    def combine(
        self, rule: UpdateRule, directions: Directions, sums: Tensor, learned: dict[str, Tensor]
    ) -> Combination:
        """The mean over the pairs; reports its variance, if there are several."""
        grads = sums.view(directions.noise.shape).to(directions.noise)
        report = {"variance": grads.var(0).sum() / len(grads)} if len(grads) > 1 else {}
        return Combination(as_meta_grads(rule, grads.mean(0)), report)

    def _part(self, result: PairGradients, sums: Tensor, window: WindowShare) -> Part:
        inner, losses = first_copy(result.unrolled, window.share.count)
        return Part(sums, window.share.fraction * result.meta_losses.mean(), losses, inner)

    def pair_gradients(self, rule: UpdateRule, window: WindowShare, directions: Directions) -> PairGradients:
        """Gradients of the share's pairs one by one, before any mean."""
        task, inner, steps, generator, share = window
        with torch.no_grad():
            particles = as_particles(inner, share.count, 2 * self.pairs)
        meta_parameters = antithetic(rule, share.select(directions.noise)).requires_grad_()
        (grads,), meta_losses, unrolled = backpropagate(
            lambda: ParticleRule(rule, meta_parameters),
            (meta_parameters,),
            task,
            particles,
            steps,
            generator,
            self.reduction(task),
            self.outer_batches,
            self.second_derivatives,
            self.replay_coordinates,
            share.team,
        )
        above, below = grads.chunk(2)
        return PairGradients((above + below) / 2, meta_losses, unrolled)
