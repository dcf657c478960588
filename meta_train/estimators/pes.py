r"""Persistent evolution strategies (Vicol, Metz & Sohl-Dickstein 2021): ES over windows, without truncation bias.

Every particle continues from its own state, and is credited with all perturbations since the start of its inner
training, :math:`\xi_k \leftarrow \xi_k + \varepsilon_k`:

.. math:: g = \frac 1 K \sum_k \frac{L^+_k - L^-_k}{2 \sigma^2}\, \xi_k ,

where :math:`L^\pm_k` is the meta-loss over this window of the particle whose perturbations have had this sign in all
windows. Summed over the windows of an inner training, this is an unbiased estimate of the gradient of the expected sum
of their meta-losses, where each window's meta-parameters are perturbed anew. The price: the variance grows with the
number of windows since the start, and the states of all particles are kept. Sums begin at zero with every inner
training, so the members of a pool of inner trainings should stand at different stages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learned_optim.meta_train.estimators.base import Directions
from learned_optim.meta_train.estimators.evolution import EvolutionStrategy
from learned_optim.meta_train.inner.particles import flat_meta_parameters
from learned_optim.rules import UpdateRule

PERTURBATION_SUM = "perturbation_sum"


@dataclass(frozen=True)
class PES(EvolutionStrategy):
    """Persistent evolution strategies."""

    name = "pes"
    persistent = True

    def memory(self, rule: UpdateRule, pieces: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Sums of perturbations ``(K, M)``, which begin with zeros."""
        weights = flat_meta_parameters(rule)
        return {PERTURBATION_SUM: weights.new_zeros(self.pairs * pieces, len(weights))}

    def directions(
        self, rule: UpdateRule, pieces: int, memory: dict[str, Tensor], generator: torch.Generator
    ) -> Directions:
        """Perturbations drawn afresh for the window, credited with all since the start."""
        noise = self.perturbations(rule, pieces, generator)
        total = memory[PERTURBATION_SUM] + noise
        return Directions(noise, total, {PERTURBATION_SUM: total})
