r"""Reparameterization gradient of the smoothed meta-loss: backpropagation at perturbed meta-parameters.

.. math:: g = \frac 1 K \sum_k \tfrac 1 2 \big( \nabla L(w + \varepsilon_k) + \nabla L(w - \varepsilon_k) \big)

is an unbiased estimate of :math:`\nabla_w \mathrm E_\varepsilon L(w + \varepsilon)` (Metz et al. 2019, section 4.1)
if inner gradients are differentiated too (``second_derivatives``); by default they count as constants, as in
:mod:`.truncated_bptt`. Of low variance over short windows; over long ones, where inner training is chaotic, gradients
explode and their average is worthless.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.estimators.base import Combination, Estimate, Part, Trajectory
from learned_optim.meta_train.estimators.perturbation import (
    PerturbationEstimator,
    antithetic,
    as_particles,
    first_copy,
)
from learned_optim.meta_train.estimators.truncated_bptt import backpropagate, check_replay
from learned_optim.meta_train.inner.meta_loss import MetaLoss, MetaLossName
from learned_optim.meta_train.inner.particles import ParticleRule, as_meta_grads
from learned_optim.meta_train.inner.shares import Share
from learned_optim.meta_train.inner.unroll import Unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule


class PairGradients(NamedTuple):
    """Backpropagation through one window of K antithetic pairs."""

    grads: Tensor
    """Mean gradient of each pair, ``(K, M)``; of a share of the window, of its own pairs, here and below."""
    meta_losses: Tensor
    """Of each particle, ``(2 K,)``."""
    noise: Tensor
    """Perturbation of each pair, ``(K, M)``."""
    window: Unroll
    """The particles' window, detached."""


class Reparameterization(PerturbationEstimator):
    """Backpropagation, averaged over antithetic perturbations.

    The next window starts from where the first particles have come to.

    Args:
        sigma: see :class:`PerturbationEstimator`.
        pairs: see there.
        groups: see there.
        meta_loss: see there.
        second_derivatives: see :func:`truncated_bptt`.
        replay_coordinates: see :func:`truncated_bptt`; of each particle, the same ones.
    """

    name = "reparameterization"
    reports: ClassVar[tuple[str, ...]] = ("variance",)

    def __init__(
        self,
        sigma: float = 0.01,
        pairs: int = 1,
        groups: int | None = None,
        meta_loss: MetaLoss | MetaLossName = "mean",
        *,
        second_derivatives: bool = False,
        replay_coordinates: int | None = None,
    ) -> None:
        super().__init__(sigma, pairs, groups, meta_loss)
        check_replay(second_derivatives, replay_coordinates)
        self.second_derivatives, self.replay_coordinates = second_derivatives, replay_coordinates

    def window(
        self, rule: UpdateRule, task: VectorizedTask, state: Trajectory, steps: int, generator: torch.Generator
    ) -> Estimate:
        """See :meth:`Estimator.window`."""
        result = self.pair_gradients(rule, task, state, steps, generator)
        inner, losses = first_copy(result.window, self.pieces(task.instances))
        several = len(result.grads) > 1
        return Estimate(
            grads=as_meta_grads(rule, result.grads.mean(0)),
            meta_loss=result.meta_losses.mean(),
            losses=losses,
            state=Trajectory(inner, {}),
            report={"variance": result.grads.var(0).sum() / len(result.grads)} if several else {},
        )

    def lengths(self, meta_parameters: int, pieces: int) -> tuple[int, int]:
        """See :meth:`Estimator.lengths`: a sum over the pairs, and one for the report."""
        return 0, meta_parameters + 1

    def part(
        self,
        rule: UpdateRule,
        task: VectorizedTask,
        state: Trajectory,
        steps: int,
        generator: torch.Generator,
        share: Share,
    ) -> Part:
        """See :meth:`Estimator.part`: sums over its own pairs."""
        result = self.pair_gradients(rule, task, state, steps, generator, share)
        return self._part(result, self._sums(result, share), share)

    def combine(
        self, rule: UpdateRule, pieces: int, memory: dict[str, Tensor], generator: torch.Generator, sums: Tensor
    ) -> Combination:
        """See :meth:`Estimator.combine`."""
        pairs = self.pairs * pieces
        mean, squares = sums[:-1] / pairs, sums[-1]
        variance = (squares - pairs * mean.square().sum()) / (pairs * max(1, pairs - 1))
        return Combination(as_meta_grads(rule, mean), {}, {"variance": variance} if pairs > 1 else {})

    def _sums(self, result: PairGradients, share: Share) -> Tensor:
        grads = result.grads.double()
        return torch.cat([grads.sum(0), grads.square().sum()[None]])

    def _part(self, result: PairGradients, sums: Tensor, share: Share) -> Part:
        inner, losses = first_copy(result.window, share.count)
        meta_loss = share.fraction * result.meta_losses.double().mean()
        return Part(sums.new_empty(0), sums, meta_loss, losses, inner)

    def pair_gradients(
        self,
        rule: UpdateRule,
        task: VectorizedTask,
        state: Trajectory,
        steps: int,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> PairGradients:
        """Gradients of the pairs one by one, before any mean; of the share's, if the window is divided."""
        share = Share.whole(self.pieces(task.instances)) if share is None else share
        with torch.no_grad():
            noise = share.of_pairs(self.perturbations(rule, share.pieces, generator))
            particles = as_particles(state.inner, share.count, 2 * self.pairs)
        meta_parameters = antithetic(rule, noise).requires_grad_()
        (grads,), meta_losses, window = backpropagate(
            lambda: ParticleRule(rule, meta_parameters),
            (meta_parameters,),
            task,
            particles,
            steps,
            generator,
            self.reduction(task),
            self.meta_loss.outer_batches,
            self.second_derivatives,
            self.replay_coordinates,
            share.team,
        )
        above, below = grads.chunk(2)
        return PairGradients((above + below) / 2, meta_losses, noise, window)
