r"""Evolution strategies: the gradient of the smoothed meta-loss from losses alone.

.. math:: g = \frac 1 K \sum_k \frac{L(w + \varepsilon_k) - L(w - \varepsilon_k)}{2 \sigma^2}\, \varepsilon_k

is an unbiased estimate of :math:`\nabla_w \mathrm E_\varepsilon L(w + \varepsilon)` (antithetic, with common random
numbers; the base of Metz et al. 2019 and Vicol et al. 2021). Nothing is differentiated with respect to the rule, so
memory does not grow with the window, and losses may be as rugged as they like; but the variance grows with the number
of meta-parameters, M.

Over a window of a longer inner training this is *truncated* ES: the state at its start counts as given, and the
estimate is biased as that of truncated backpropagation is. With the window as long as the horizon it is full-unroll
ES, as VeLO was trained with.
"""

import torch

from learned_optim.meta_train.estimators.base import Estimate, Trajectory
from learned_optim.meta_train.estimators.perturbation import (
    PerturbationEstimator,
    as_particles,
    first_copy,
    variance_of_mean,
)
from learned_optim.meta_train.particles import as_meta_grads
from learned_optim.meta_train.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule


class ES(PerturbationEstimator):
    """Antithetic evolution strategies. The next window starts from where the first particles have come to.

    Args: see :class:`PerturbationEstimator`.
    """

    name = "es"
    reports = ("variance",)

    @torch.no_grad()
    def window(
        self, rule: UpdateRule, task: VectorizedTask, state: Trajectory, steps: int, generator: torch.Generator
    ) -> Estimate:
        """See :meth:`Estimator.window`."""
        groups = self.groups_of(task)
        noise = self.perturbations(rule, task, generator)
        particles = as_particles(state.inner, groups, 2 * self.pairs)
        meta_losses, window = self.particle_window(rule, noise, task, particles, steps, generator)
        slopes = self.slopes(meta_losses)
        inner, losses = first_copy(window, groups)
        return Estimate(
            grads=as_meta_grads(rule, slopes @ noise / len(noise)),
            meta_loss=meta_losses.mean(),
            losses=losses,
            state=Trajectory(inner, {}),
            report=variance_of_mean(slopes, noise),
        )
