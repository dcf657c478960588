r"""The inverse-variance combination of the reparameterization and the ES gradient (Metz et al. 2019, section 4.2).

Both estimate the same gradient from the same perturbations and batches. Of each meta-parameter on its own, with the
variances :math:`v` of the two means,

.. math:: g = w\, g_\mathrm{ES} + (1 - w)\, g_\mathrm{RP}, \qquad
          w = \frac{1 / v_\mathrm{ES}}{1 / v_\mathrm{ES} + 1 / v_\mathrm{RP}} .

Over short windows that is backpropagation; where its variance explodes, it is ES.

These weights are the best ones if the two are uncorrelated. They share perturbations, and where they are strongly
correlated, the combination can have up to 1.46 times the variance of the better one. With the covariance :math:`c` of
the two,

.. math:: w = \frac{v_\mathrm{RP} - c}{v_\mathrm{ES} + v_\mathrm{RP} - 2 c} \quad \text{cut to } [0, 1]

never has more than either; that is the default, and ``covariance=False`` gives the paper's weights.

The moments are those of the K pairs of the window, as in the paper. Then weights and estimates come from the same
samples, which biases the result a little when K is small; with ``variance_decay`` the weights come from running
averages over the windows *before*, independent of the present samples, and the combination is as unbiased as its
parents.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.common.strict import Decay
from learned_optim.meta_train.estimators.base import Combination, Directions, Part, WindowShare
from learned_optim.meta_train.estimators.reparameterization import Reparameterization
from learned_optim.meta_train.inner.particles import as_meta_grads
from learned_optim.rules import UpdateRule


class PairMoments(NamedTuple):
    """Moments over the K pairs of a window, ``(M,)`` each, of the two estimates."""

    es_mean: Tensor
    rp_mean: Tensor
    es: Tensor
    """Variance of ES."""
    rp: Tensor
    """Variance of the reparameterization gradient."""
    covariance: Tensor

    @classmethod
    def of(cls, es: Tensor, rp: Tensor) -> "PairMoments":
        """The moments of the pairs' estimates, ``(K, M)`` each."""
        products = (es - es.mean(0)) * (rp - rp.mean(0))
        return cls(es.mean(0), rp.mean(0), es.var(0), rp.var(0), products.sum(0) / (len(products) - 1))


MOMENTS = ("es", "rp", "covariance")
"""Names of what is learned over the windows: running averages of the two variances, and of the covariance."""


@dataclass(frozen=True)
class Combined(Reparameterization):
    """ES and reparameterization gradients, weighted elementwise by their inverse variances.

    Reports the weight of ES for each meta-parameter, ``es_weight`` ``(M,)``, and the variances of the two means over
    this window's pairs, summed over the meta-parameters, ``es_variance`` and ``rp_variance``. A meta-parameter whose
    backpropagated gradient is not finite is left to ES. There must be two pairs or more.

    Args:
        covariance: take the covariance of the two into account.
        variance_decay: decay of the running averages of these moments, which decide the weights; 0: only this window's.
    """

    covariance: bool = True
    variance_decay: Decay = 0.0

    name = "combined"
    reports = ("es_weight", "es_variance", "rp_variance")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.variance_decay < 1:
            raise ValueError(f"variance_decay must lie in [0, 1), got {self.variance_decay}")

    def directions(
        self, rule: UpdateRule, pieces: int, memory: dict[str, Tensor], generator: torch.Generator
    ) -> Directions:
        """Perturbations drawn afresh for the window.

        Raises:
            ValueError: there is but one pair, which has no variance.
        """
        if self.pairs * pieces < 2:
            raise ValueError("the combination needs two pairs or more for variances; raise pairs, groups or instances")
        return super().directions(rule, pieces, memory, generator)

    def sums_length(self, meta_parameters: int, pieces: int) -> int:
        """A slope and a gradient for each of the K pairs."""
        return self.pairs * pieces * (1 + meta_parameters)

    def train_share(
        self, rule: UpdateRule, window: WindowShare, directions: Directions, learned: dict[str, Tensor]
    ) -> Part:
        """Differentiate through the share's particles; slopes and gradients of its own pairs among zeros."""
        result = self.pair_gradients(rule, window, directions)
        samples = torch.cat([self.slopes(result.meta_losses)[:, None].double(), result.grads.double()], 1)
        return self._part(result, window.share.scatter(samples).flatten(), window)

    @torch.no_grad()
    def combine(
        self, rule: UpdateRule, directions: Directions, sums: Tensor, learned: dict[str, Tensor]
    ) -> Combination:
        """The weighted mean of both estimates; takes the window into the running averages."""
        noise = directions.noise
        samples = sums.view(len(noise), -1).to(noise)
        return self._combined(rule, PairMoments.of(samples[:, :1] * noise, samples[:, 1:]), len(noise), learned)

    def _combined(self, rule: UpdateRule, moments: PairMoments, pairs: int, learned: dict[str, Tensor]) -> Combination:
        weight = self.es_weight(moments, learned)
        es, rp = moments.es_mean, moments.rp_mean
        combination = torch.where(weight == 1, es, weight * es + (1 - weight) * rp)  # where: rp may not be finite
        variances = {"es_variance": moments.es.sum() / pairs, "rp_variance": moments.rp.sum() / pairs}
        return Combination(as_meta_grads(rule, combination), {"es_weight": weight, **variances})

    def check_learned(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` unless there is nothing yet, or all running averages ``(M,)``."""
        if names and set(names) != set(MOMENTS):
            raise ValueError(f"combined keeps es, rp and covariance, got {', '.join(names)}")

    def es_weight(self, moments: PairMoments, learned: dict[str, Tensor]) -> Tensor:
        """The weight of ES ``(M,)`` for a window with these moments; takes them into the running averages."""
        current = {name: getattr(moments, name) for name in MOMENTS}
        finite = current["rp"].isfinite()
        known = current
        if self.variance_decay > 0:
            known = dict(learned) or current
            learned.update(
                {
                    name: torch.where(finite, known[name].lerp(value, 1 - self.variance_decay), known[name])
                    for name, value in current.items()
                }
            )
        covariance = known["covariance"] if self.covariance else 0.0
        weight: Tensor = (known["rp"] - covariance) / (known["es"] + known["rp"] - 2 * covariance)
        # Zero over zero: nothing depends on this meta-parameter, and any weight will do.
        return weight.nan_to_num(0.5).clamp(0.0, 1.0).masked_fill(~finite, 1.0)
