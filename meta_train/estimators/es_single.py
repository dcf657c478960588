r"""ES-Single (Vicol 2023): one perturbation for a whole inner training, estimated window by window.

As in PES every particle continues from its own state, but its perturbation is drawn once, at the start of the inner
training. With :math:`L^\pm_k` the meta-loss over one window,

.. math:: g = \frac 1 K \sum_k \frac{L^+_k - L^-_k}{2 \sigma^2}\, \varepsilon_k .

Summed over the windows of an inner training, this is full-unroll ES: unbiased for the gradient of the smoothed loss,
with a variance that does not grow with the number of windows. But the gradients of successive windows share their
direction, so that a meta-optimizer which steps at every window sees correlated noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learned_optim.meta_train.estimators.base import Directions
from learned_optim.meta_train.estimators.evolution import EvolutionStrategy
from learned_optim.rules import UpdateRule

PERTURBATION = "perturbation"


@dataclass(frozen=True)
class ESSingle(EvolutionStrategy):
    """Evolution strategies with one perturbation a particle and inner training."""

    name = "es-single"
    persistent = True

    def memory(self, rule: UpdateRule, pieces: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The perturbations ``(K, M)`` of the whole inner training."""
        return {PERTURBATION: self.perturbations(rule, pieces, generator)}

    def directions(
        self, rule: UpdateRule, pieces: int, memory: dict[str, Tensor], generator: torch.Generator
    ) -> Directions:
        """The perturbations that were drawn at the start."""
        noise = memory[PERTURBATION]
        return Directions(noise, noise, memory)
