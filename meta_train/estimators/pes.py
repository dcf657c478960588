r"""Persistent evolution strategies (Vicol, Metz & Sohl-Dickstein 2021): ES over windows, without truncation bias.

Every particle goes on from where *it* stands, and is credited with all perturbations since the start of its inner
training, :math:`\xi_k \leftarrow \xi_k + \varepsilon_k`:

.. math:: g = \frac 1 K \sum_k \frac{L^+_k - L^-_k}{2 \sigma^2}\, \xi_k ,

where :math:`L^\pm_k` is the meta-loss over this window of the particle whose perturbations have had this sign in all
windows. Summed over the windows of an inner training, this is an unbiased estimate of the gradient of the expected sum
of their meta-losses, where each window's meta-parameters are perturbed anew. The price: the variance grows with the
number of windows since the start, and the states of all particles are kept. Sums begin at zero with every inner
training, so the members of a pool of inner trainings should stand at different stages.
"""

import torch

from learned_optim.meta_train.estimators.base import Estimate, Trajectory
from learned_optim.meta_train.estimators.perturbation import PerturbationEstimator, as_particles, variance_of_mean
from learned_optim.meta_train.particles import as_meta_grads, flat_meta_parameters
from learned_optim.meta_train.unroll import InnerState
from learned_optim.meta_train.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule

PERTURBATION_SUM = "perturbation_sum"


class PES(PerturbationEstimator):
    """Persistent evolution strategies.

    Args: see :class:`PerturbationEstimator`.
    """

    name = "pes"
    reports = ("variance",)

    def start(
        self, rule: UpdateRule, task: VectorizedTask, inner: InnerState, generator: torch.Generator
    ) -> Trajectory:
        """See :meth:`Estimator.start`: all particles at the same point; sums ``(K, M)`` of zeros."""
        groups = self.groups_of(task)
        weights = flat_meta_parameters(rule)
        nothing_yet = weights.new_zeros(self.pairs * groups, len(weights))
        return Trajectory(as_particles(inner, groups, 2 * self.pairs), {PERTURBATION_SUM: nothing_yet})

    @torch.no_grad()
    def window(
        self, rule: UpdateRule, task: VectorizedTask, state: Trajectory, steps: int, generator: torch.Generator
    ) -> Estimate:
        """See :meth:`Estimator.window`."""
        noise = self.perturbations(rule, task, generator)
        total = state.memory[PERTURBATION_SUM] + noise
        meta_losses, window = self.particle_window(rule, noise, task, state.inner, steps, generator)
        slopes = self.slopes(meta_losses)
        return Estimate(
            grads=as_meta_grads(rule, slopes @ total / len(total)),
            meta_loss=meta_losses.mean(),
            losses=window.losses,
            state=Trajectory(window.state, {PERTURBATION_SUM: total}),
            report=variance_of_mean(slopes, total),
        )
