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

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.estimators.base import Combination, Estimate, Trajectory
from learned_optim.meta_train.estimators.perturbation import first_copy
from learned_optim.meta_train.estimators.reparameterization import PairGradients, Reparameterization
from learned_optim.meta_train.inner.meta_loss import MetaLoss, MetaLossName
from learned_optim.meta_train.inner.particles import as_meta_grads
from learned_optim.meta_train.inner.shares import Share
from learned_optim.meta_train.inner.vectorize import VectorizedTask
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
    def of_samples(cls, es: Tensor, rp: Tensor) -> "PairMoments":
        """From the pairs' estimates, ``(K, M)`` each."""
        products = (es - es.mean(0)) * (rp - rp.mean(0))
        return cls(es.mean(0), rp.mean(0), es.var(0), rp.var(0), products.sum(0) / (len(products) - 1))

    @classmethod
    def of_sums(cls, es: Tensor, rp: Tensor, squares: Tensor, products: Tensor) -> "PairMoments":
        """From the samples of ES ``(K, M)`` and sums over pairs ``(M,)``: of RP, its squares, and ES times RP.

        In float64 differences of such sums are more exact than the samples.
        """
        pairs, rp_mean, es_sum = len(es), rp / len(es), es.double().sum(0)
        variance = (squares - rp * rp_mean) / (pairs - 1)
        covariance = (products - es_sum * rp_mean) / (pairs - 1)
        of_rp = (tensor.to(es) for tensor in (rp_mean, variance.clamp(min=0), covariance))
        rp_mean, variance, covariance = of_rp
        return cls(es.mean(0), rp_mean, es.var(0), variance, covariance)


class Combined(Reparameterization):
    """ES and reparameterization gradients, weighted elementwise by their inverse variances.

    Reports the weight of ES for each meta-parameter, ``es_weight`` ``(M,)``, and the variances of the two means over
    this window's pairs, summed over the meta-parameters, ``es_variance`` and ``rp_variance``. A meta-parameter whose
    backpropagated gradient is not finite is left to ES.

    Args:
        sigma: see :class:`PerturbationEstimator`.
        pairs: see there; with groups, at least two pairs in all.
        groups: see there.
        meta_loss: see there.
        covariance: heed the covariance of the two.
        variance_decay: of the running averages of these moments, which then decide the weights; 0: this window's own.
        second_derivatives: see :func:`truncated_bptt`.
        replay_coordinates: see there.
    """

    name = "combined"
    reports = ("es_weight", "es_variance", "rp_variance")

    def __init__(
        self,
        sigma: float = 0.01,
        pairs: int = 1,
        groups: int | None = None,
        meta_loss: MetaLoss | MetaLossName = "mean",
        *,
        covariance: bool = True,
        variance_decay: float = 0.0,
        second_derivatives: bool = False,
        replay_coordinates: int | None = None,
    ) -> None:
        super().__init__(
            sigma,
            pairs,
            groups,
            meta_loss,
            second_derivatives=second_derivatives,
            replay_coordinates=replay_coordinates,
        )
        if not 0 <= variance_decay < 1:
            raise ValueError(f"variance_decay must lie in [0, 1), got {variance_decay}")
        self.covariance, self.variance_decay = covariance, variance_decay
        self.moments: dict[str, Tensor] = {}

    def window(
        self, rule: UpdateRule, task: VectorizedTask, state: Trajectory, steps: int, generator: torch.Generator
    ) -> Estimate:
        """See :meth:`Estimator.window`.

        Raises:
            ValueError: there is but one pair, which has no variance.
        """
        groups = self.pieces(task.instances)
        if self.pairs * groups < 2:
            raise ValueError("the combination needs two pairs or more for variances; raise pairs, groups or instances")
        result = self.pair_gradients(rule, task, state, steps, generator)
        es_samples = self.slopes(result.meta_losses)[:, None] * result.noise
        grads, memory, report = self._combined(rule, PairMoments.of_samples(es_samples, result.grads), len(es_samples))
        inner, losses = first_copy(result.window, groups)
        return Estimate(grads, result.meta_losses.mean(), losses, Trajectory(inner, memory), report)

    def lengths(self, meta_parameters: int, pieces: int) -> tuple[int, int]:
        """See :meth:`Estimator.lengths`: K slopes, and three sums over the pairs for each meta-parameter."""
        return 0, self.pairs * pieces + 3 * meta_parameters

    def combine(
        self, rule: UpdateRule, pieces: int, memory: dict[str, Tensor], generator: torch.Generator, sums: Tensor
    ) -> Combination:
        """See :meth:`Estimator.combine`; takes the window into the running averages."""
        noise = self.perturbations(rule, pieces, generator)
        slopes, of_rp = sums[: len(noise)], sums[len(noise) :].chunk(3)
        es_samples = slopes.to(noise)[:, None] * noise
        return self._combined(rule, PairMoments.of_sums(es_samples, *of_rp), len(noise))

    def _sums(self, result: PairGradients, share: Share) -> Tensor:
        slopes = self.slopes(result.meta_losses)
        es, rp = (slopes[:, None] * result.noise).double(), result.grads.double()
        return torch.cat([share.among_pairs(slopes), rp.sum(0), rp.square().sum(0), (es * rp).sum(0)])

    def _combined(self, rule: UpdateRule, moments: PairMoments, pairs: int) -> Combination:
        weight = self._weight(moments)
        es, rp = moments.es_mean, moments.rp_mean
        combination = torch.where(weight == 1, es, weight * es + (1 - weight) * rp)  # where: rp may not be finite
        variances = {"es_variance": moments.es.sum() / pairs, "rp_variance": moments.rp.sum() / pairs}
        return Combination(as_meta_grads(rule, combination), {}, {"es_weight": weight, **variances})

    def state_dict(self) -> dict[str, Tensor]:
        """Running averages over pairs, ``(M,)``: variances ``"es"`` and ``"rp"``, ``"covariance"``; empty at first."""
        return dict(self.moments)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`Estimator.load_state_dict`."""
        if tensors and set(tensors) != {"es", "rp", "covariance"}:
            raise ValueError(f"combined keeps es, rp and covariance, got {', '.join(tensors)}")
        self.moments = dict(tensors)

    def _es_weight(self, es_samples: Tensor, rp_samples: Tensor) -> Tensor:
        """:meth:`_weight` from the pairs' estimates, ``(K, M)`` each."""
        return self._weight(PairMoments.of_samples(es_samples, rp_samples))

    def _weight(self, moments: PairMoments) -> Tensor:
        """The weight of ES ``(M,)`` for this window; takes its variances into the running averages."""
        current = {"es": moments.es, "rp": moments.rp, "covariance": moments.covariance}
        finite = current["rp"].isfinite()
        known = self.moments or current
        if self.variance_decay > 0:
            self.moments = {
                name: torch.where(finite, known[name].lerp(value, 1 - self.variance_decay), known[name])
                for name, value in current.items()
            }
        else:
            known = current
        covariance = known["covariance"] if self.covariance else 0.0
        weight = (known["rp"] - covariance) / (known["es"] + known["rp"] - 2 * covariance)
        # Zero over zero: nothing depends on this meta-parameter, and any weight will do.
        return weight.nan_to_num(0.5).clamp(0.0, 1.0).masked_fill(~finite, 1.0)
