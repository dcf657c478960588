"""Estimators of the smoothed meta-loss against its exact gradient, and particles together against one by one."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.estimators.toy_problems import FirstUnit, InfluenceBalancing
from helpers.numerical_gradients import gaussian_gradient
from helpers.particles import ROUNDING, generator
from helpers.reference import Array
from learned_optim.meta_train.estimators import (
    ES,
    PES,
    Combined,
    ESSingle,
    Estimator,
    Reparameterization,
    TruncatedBPTT,
)
from learned_optim.meta_train.inner.unroll import start
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Batch, Task
from learned_optim.rules import RuleState, UpdateRule

SIGMA = 0.1
REPEATS = 100
QUANTILE = 3.39  # two-sided 99.9% of Student's t with 99 degrees of freedom
CURVATURES, START = np.array([1.0, 0.5]), np.array([1.0, -0.8])
WEIGHTS = np.array([0.5, 0.5])


pytestmark = pytest.mark.usefixtures("double", "one_thread")


# A problem whose smoothed meta-loss is a polynomial, integrated exactly by Gauss-Hermite quadrature


class PolynomialDescent(UpdateRule):
    """``update = -a^3 grad - a b^2 (previous gradient)`` with the meta-parameters a and b."""

    name = "polynomial"

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(WEIGHTS))

    @property
    def settings(self) -> Mapping[str, int]:
        return {}

    @property
    def state_features(self) -> Mapping[str, int]:
        return {"previous": 1}

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        a, b = self.weights.unbind(-1)
        return -(a**3) * grad - a * b**2 * state["previous"][0], {"previous": grad[None]}

    def reset_parameters(self, seed: int) -> None:
        pass


class Bowl(Task):
    """``sum_i h_i x_i^2 / 2``, or with ``linear`` its gradient at the start times x; no noise."""

    def __init__(self, linear: bool = False) -> None:
        self.linear = linear

    def module(self) -> nn.Module:
        module = nn.Module()
        module.point = nn.Parameter(torch.tensor(START))
        return module

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        return torch.zeros(instances, 1)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(module.point, Tensor)
        if self.linear:
            return (torch.tensor(CURVATURES * START) * module.point).sum()
        return (0.5 * torch.tensor(CURVATURES) * module.point.square()).sum()


def losses_of(weights: Array, steps: int, linear: bool = False) -> Array:
    """Losses after each step, ``(windows, steps, *grid)``, with the weights ``(windows, 2, *grid)`` of each window."""
    windows, _, *grid = weights.shape
    shape = (2, *[1] * len(grid))
    point = np.broadcast_to(START.reshape(shape), (2, *grid))
    curvatures, slopes = CURVATURES.reshape(shape), (CURVATURES * START).reshape(shape)
    previous = np.zeros(())
    losses = np.empty((windows, steps, *grid))
    for window in range(windows):
        a, b = weights[window]
        for step in range(steps):
            grad = slopes if linear else curvatures * point
            point = point - a**3 * grad - a * b**2 * previous
            previous = grad
            losses[window, step] = ((slopes * point) if linear else 0.5 * curvatures * point**2).sum(0)
    return losses


def exact_gradient(windows: int, steps: int, counted: Callable[[Array], Array], linear: bool = False) -> Array:
    """Gradient ``(windows, 2)`` of the smoothed ``counted(mean losses (windows, *grid))``, fresh noise each window."""

    def value(flat: Array) -> Array:  # (2 windows, *grid)
        return counted(losses_of(flat.reshape(windows, 2, *flat.shape[1:]), steps, linear).mean(1))

    # At most 4 steps x 3 factors, squared, and one of the noise: 13 nodes are exact up to degree 25.
    return gaussian_gradient(value, np.tile(WEIGHTS, windows), SIGMA, nodes=13).reshape(windows, 2)


def sums_of_grads(estimator: Estimator, task: Task, windows: int, steps: int, repeats: int = REPEATS) -> Tensor:
    """Sum over the windows of an inner training, repeated with other random numbers: ``(repeats, M)``."""
    rule = PolynomialDescent()
    vectorized = VectorizedTask(task, 1, seed=0)
    inner = start(rule, vectorized, generator())
    sums = []
    for repeat in range(repeats):
        random = generator(1000 + repeat)
        state = estimator.start(rule, vectorized, inner, random)
        total = torch.zeros(2)
        for _ in range(windows):
            estimate = estimator.window(rule, vectorized, state, steps, random)
            state = estimate.state
            total += parameters_to_vector(estimate.grads)
        sums.append(total)
    return torch.stack(sums)


def assert_mean_is(samples: Tensor, exact: Array) -> None:
    """Each mean lies in its 99.9% interval, which is so narrow that it would not if it were off by 5%."""
    bound = QUANTILE * samples.std(0) / len(samples) ** 0.5
    expected = torch.from_numpy(exact)
    assert bool((2 * bound <= 0.05 * expected.abs()).all()), "take more samples"
    assert bool(((samples.mean(0) - expected).abs() <= bound).all())


PAIRS = 5000  # of a window; with 100 repeats the intervals are narrow enough, which is asserted
SMOOTHED: dict[str, Callable[[bool], Estimator]] = {
    "reparameterization": lambda second: Reparameterization(SIGMA, PAIRS, second_derivatives=second),
    "es": lambda second: ES(SIGMA, PAIRS),
    "combined": lambda second: Combined(SIGMA, PAIRS, second_derivatives=second),
    "combined-running": lambda second: Combined(SIGMA, PAIRS, variance_decay=0.9, second_derivatives=second),
    "pes": lambda second: PES(SIGMA, PAIRS),
    "es-single": lambda second: ESSingle(SIGMA, PAIRS),
}


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True], ids=["second-derivatives", "constant-gradients"])
@pytest.mark.parametrize("build", list(SMOOTHED.values()), ids=list(SMOOTHED))
def test_estimate_is_the_gradient_of_the_smoothed_meta_loss(build: Callable[[bool], Estimator], linear: bool) -> None:
    (exact,) = exact_gradient(1, 4, lambda losses: losses[0], linear)
    assert_mean_is(sums_of_grads(build(not linear), Bowl(linear), 1, 4), exact)


@pytest.mark.slow
def test_pes_removes_the_bias_of_truncation() -> None:
    """Over two windows, PES has the whole gradient; ES lacks that of the second loss by the first weights."""
    exact = exact_gradient(2, 2, lambda losses: losses.sum(0)).sum(0)
    assert_mean_is(sums_of_grads(PES(SIGMA, 4 * PAIRS), Bowl(), 2, 2), exact)

    first = exact_gradient(2, 2, lambda losses: losses[0])[0]
    second = exact_gradient(2, 2, lambda losses: losses[1])[1]
    truncated = sums_of_grads(ES(SIGMA, PAIRS), Bowl(), 2, 2)
    bound = QUANTILE * truncated.std(0) / REPEATS**0.5  # wide: all pairs of a second window start from one state
    assert bool(((truncated.mean(0) - torch.from_numpy(first + second)).abs() <= bound).all())
    assert bool(((truncated.mean(0) - torch.from_numpy(exact)).abs() > 5 * bound).all())


@pytest.mark.slow
def test_es_single_equals_es_over_the_whole_horizon() -> None:
    (exact,) = exact_gradient(1, 4, lambda losses: 2 * losses[0])  # two windows' means add up to twice the mean
    assert_mean_is(sums_of_grads(ESSingle(SIGMA, PAIRS), Bowl(), 2, 2), exact)
    full = sums_of_grads(ES(SIGMA, PAIRS), Bowl(), 1, 4, repeats=2)
    single = sums_of_grads(ESSingle(SIGMA, PAIRS), Bowl(), 2, 2, repeats=2)
    torch.testing.assert_close(single, 2 * full, rtol=ROUNDING, atol=0)  # the same noise: both draw it first


@pytest.mark.slow
def test_pes_descends_on_influence_balancing_where_truncation_ascends() -> None:
    """At weight 0.5 the sum of 150 losses falls to the left: PES has its slope inside a 99.9% interval."""
    steps, repeats = 150, 12
    rule = InfluenceBalancing().double()
    task = VectorizedTask(FirstUnit(), 1, seed=0)
    inner = start(rule, task, generator())
    free, slopes = rule.expected_first_unit(steps)
    exact = float(((free + 0.5 * slopes - 1) * slopes).sum())
    assert exact > 0

    def total(estimator: Estimator, seed: int, window: int = 1) -> float:
        random = generator(seed)
        state = estimator.start(rule, task, inner, random)
        result = 0.0
        for _ in range(steps // window):
            estimate = estimator.window(rule, task, state, window, random)
            state = estimate.state
            result += window * float(estimate.grads[0])
        return result

    sums = torch.tensor([total(PES(sigma=0.1, pairs=250), seed) for seed in range(repeats)])
    bound = 4.44 * float(sums.std()) / repeats**0.5  # 11 degrees of freedom
    assert bound < 0.25 * exact
    assert abs(float(sums.mean()) - exact) < bound
    assert total(TruncatedBPTT(), 0) < 0
    assert total(ES(sigma=0.1, pairs=250), 0) < 0
    assert total(TruncatedBPTT(), 0, window=steps) == pytest.approx(exact, rel=1e-10)
