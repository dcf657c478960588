"""The combination of ES and reparameterization: its weights, and its variance against its parents'."""

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks.estimators.toy_problems import RateSchedule, RuggedPlane
from helpers.particles import PARTICLE_RULES, ROUNDING, STEPS, Still, generator, noisy_quadratics, randomised
from learned_optim.meta_train.estimators import (
    ES,
    Combined,
    Reparameterization,
)
from learned_optim.meta_train.estimators.combined import PairMoments
from learned_optim.meta_train.inner.particles import flat_meta_parameters
from learned_optim.meta_train.inner.unroll import start
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.rules import RuleState

pytestmark = pytest.mark.usefixtures("double", "one_thread")


# Variance and weights of the combination


class Watched(Combined):
    """Keeps the moments of its last window, the gradients of both parents among them."""

    seen: ClassVar[list[PairMoments]] = []

    def es_weight(self, moments: PairMoments, learned: dict[str, Tensor]) -> Tensor:
        self.seen[:] = [moments]
        return super().es_weight(moments, learned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "log_rate", "steps"),
    [(0.3, 0.0, 5), (0.1, 0.0, 20), (0.3, -1.0, 10)],
    ids=["neither-is-much-better", "each-is-better-at-one", "backpropagation-is-better"],
)
def test_combination_has_no_more_variance_than_either_parent(sigma: float, log_rate: float, steps: int) -> None:
    """Variance over 120 windows from one state, of both meta-parameters and in sum, on a rugged loss.

    The weights come from the moments of 60 windows before. Where one parent is much better, the combination is about
    that parent: a tenth, and 2% in the sum, are allowed for the sampling errors of the weights.
    """
    rule, task = RateSchedule(100, log_rate).double(), VectorizedTask(RuggedPlane(), 1, seed=0)
    state = ES().start(rule, task, start(rule, task, generator()), generator())
    combined = Watched(sigma, pairs=16, variance_decay=0.98, second_derivatives=True)
    before: dict[str, Tensor] = {}
    for seed in range(60):
        combined.window(rule, task, state, steps, generator(10_000 + seed), before)
    samples: dict[str, list[Tensor]] = {"es": [], "reparameterization": [], "combined": []}
    for seed in range(120):
        estimate = combined.window(rule, task, state, steps, generator(seed), dict(before))
        (seen,) = combined.seen
        of_parents = {"es": seen.es_mean, "reparameterization": seen.rp_mean}
        for name, grads in {**of_parents, "combined": parameters_to_vector(estimate.grads)}.items():
            samples[name].append(grads)
        if seed < 3:  # the parents by themselves
            parents = (ES(sigma, pairs=16), Reparameterization(sigma, pairs=16, second_derivatives=True))
            for parent in parents:
                alone = parent.window(rule, task, state, steps, generator(seed)).grads
                torch.testing.assert_close(parameters_to_vector(alone), of_parents[parent.name])
    es, rp, both = (torch.stack(rows).var(0) for rows in samples.values())
    assert float(both.sum()) <= 1.02 * min(float(es.sum()), float(rp.sum()))
    assert bool((both <= 1.1 * torch.minimum(es, rp)).all())
    if steps == 5:
        assert float(both[0]) < 0.85 * min(float(es[0]), float(rp[0]))  # two alike: half, if they are independent
    if steps == 20:
        assert float(es[0]) < 0.5 * float(rp[0])
        assert float(rp[1]) < 0.5 * float(es[1])


def test_weights_are_inverse_variances() -> None:
    es = torch.tensor([[1.0, 2.0, 1.0, 0.0], [3.0, 2.0, 5.0, 0.0]])  # variances 2, 0, 8, 0
    rp = torch.tensor([[1.0, 1.0, math.inf, 0.0], [2.0, 5.0, 1.0, 0.0]])  # 0.5, 8, none, 0
    weight = Combined(covariance=False).es_weight(PairMoments.of(es, rp), {})
    torch.testing.assert_close(weight, torch.tensor([0.2, 1.0, 1.0, 0.5]))


def test_running_variances_weigh_the_next_window() -> None:
    estimator = Combined(covariance=False, variance_decay=0.75)
    learned: dict[str, Tensor] = {}

    def weight(es: list[list[float]], rp: list[list[float]]) -> float:
        return float(estimator.es_weight(PairMoments.of(torch.tensor(es), torch.tensor(rp)), learned))

    assert weight([[0.0], [2.0]], [[0.0], [4.0]]) == pytest.approx(0.8)  # variances 2 and 8; nothing is known yet
    assert weight([[0.0], [4.0]], [[0.0], [math.nan]]) == 1.0  # what is not finite has no weight, and is not remembered
    assert {name: float(value) for name, value in learned.items()} == {"es": 2.0, "rp": 8.0, "covariance": 4.0}
    weight([[0.0], [4.0]], [[0.0], [0.0]])  # variances 8 and 0
    assert weight([[0.0], [4.0]], [[0.0], [4.0]]) == pytest.approx(6.0 / (3.5 + 6.0))


def test_weights_take_the_covariance_into_account() -> None:
    """Against the minimum of the variance of the combined samples over a grid of weights."""
    rp = torch.randn(50, 3, generator=generator())
    es = torch.stack([2.0 * rp[:, 0], 0.3 * rp[:, 1] + torch.randn(50, generator=generator(1)), -0.5 * rp[:, 2]], 1)
    grid = torch.linspace(0, 1, 1001)[:, None, None]
    best = grid[(grid * es + (1 - grid) * rp).var(1).argmin(0)][:, 0, 0]
    torch.testing.assert_close(Combined().es_weight(PairMoments.of(es, rp), {}), best, rtol=0, atol=0.0006)
    assert best[0] == 0.0
    assert 0.2 < best[1] < 0.6
    assert best[2] > 0.6


def test_combination_is_the_reported_weighted_mean() -> None:
    rule, task = randomised(PARTICLE_RULES["lstm-l2l"]()), noisy_quadratics()
    state = ES().start(rule, task, start(rule, task, generator(1)), generator())
    results = {
        estimator.name: estimator.window(rule, task, state, STEPS, generator(2))
        for estimator in (ES(0.05), Reparameterization(0.05), Combined(0.05, covariance=False))
    }
    weight = results["combined"].report["es_weight"]
    assert weight.shape == flat_meta_parameters(rule).shape
    es, rp, combined = (parameters_to_vector(results[name].grads) for name in ("es", "reparameterization", "combined"))
    torch.testing.assert_close(combined, weight * es + (1 - weight) * rp, rtol=ROUNDING, atol=1e-14)
    assert 0 < float(weight.min()) < float(weight.max()) < 1


def test_non_finite_backpropagation_gives_all_weight_to_es() -> None:
    class Explosive(Still):
        """Weight 1 gives finite updates with an infinite derivative."""

        def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
            return -0.1 * grad * (self.weight + (self.weight * 0).abs().sqrt()), {}

    rule, task = Explosive(), noisy_quadratics()
    state = ES().start(rule, task, start(rule, task, generator(1)), generator())
    assert not bool(Reparameterization().window(rule, task, state, 2, generator(2)).grads[0].isfinite())
    combined = Combined().window(rule, task, state, 2, generator(2))
    assert combined.grads[0] == ES().window(rule, task, state, 2, generator(2)).grads[0]
    assert bool(combined.grads[0].isfinite())
    assert combined.report["es_weight"].tolist() == [1.0]
