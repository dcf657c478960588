r"""ES-Single (Vicol 2023): one perturbation for a whole inner training, estimated window by window.

As in PES every particle goes on from where it stands, but its perturbation is drawn once, at the start of the inner
training. With :math:`L^\pm_k` the meta-loss over one window,

.. math:: g = \frac 1 K \sum_k \frac{L^+_k - L^-_k}{2 \sigma^2}\, \varepsilon_k .

Summed over the windows of an inner training, this is full-unroll ES: unbiased for the gradient of the smoothed loss,
with a variance that does not grow with the number of windows. But the gradients of successive windows share their
direction, so that a meta-optimizer which steps at every window sees correlated noise.
"""

import torch

from learned_optim.meta_train.estimators.base import Estimate, Trajectory
from learned_optim.meta_train.estimators.perturbation import PerturbationEstimator, as_particles, variance_of_mean
from learned_optim.meta_train.particles import as_meta_grads
from learned_optim.meta_train.unroll import InnerState
from learned_optim.meta_train.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule

PERTURBATION = "perturbation"


class ESSingle(PerturbationEstimator):
    """Evolution strategies with one perturbation a particle and inner training.

    Args: see :class:`PerturbationEstimator`.
    """

    name = "es-single"
    reports = ("variance",)

    def start(
        self, rule: UpdateRule, task: VectorizedTask, inner: InnerState, generator: torch.Generator
    ) -> Trajectory:
        """See :meth:`Estimator.start`: all particles at the same point, with the perturbations ``(K, M)`` to keep."""
        noise = self.perturbations(rule, task, generator)
        return Trajectory(as_particles(inner, self.groups_of(task), 2 * self.pairs), {PERTURBATION: noise})

    @torch.no_grad()
    def window(
        self, rule: UpdateRule, task: VectorizedTask, state: Trajectory, steps: int, generator: torch.Generator
    ) -> Estimate:
        """See :meth:`Estimator.window`."""
        noise = state.memory[PERTURBATION]
        meta_losses, window = self.particle_window(rule, noise, task, state.inner, steps, generator)
        slopes = self.slopes(meta_losses)
        return Estimate(
            grads=as_meta_grads(rule, slopes @ noise / len(noise)),
            meta_loss=meta_losses.mean(),
            losses=window.losses,
            state=Trajectory(window.state, state.memory),
            report=variance_of_mean(slopes, noise),
        )
