"""From losses to figures, on curves whose speed-ups are known."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from helpers.benchmarks import timing
from learned_optim.meta_train.benchmark.evaluation import final_loss
from learned_optim.meta_train.benchmark.report import ratio_text
from learned_optim.meta_train.benchmark.scores import (
    DIVERGED,
    LARGEST_RATIO,
    POINTS,
    Result,
    at_equal_seconds,
    mean_ratio,
    problem_speedups,
    score,
    seconds_to,
)
from learned_optim.meta_train.benchmark.suites import SuiteProblem
from learned_optim.meta_train.inner.speedups import FASTEST, SLOWEST, log_slowdowns, running_final, speedup, steps_to

STEPS = 1000


def falling(factor: float, steps: int = STEPS, seeds: int = 1) -> np.ndarray:
    """Losses that fall by a constant factor a step, ``factor`` times as fast as ``0.99 ** step``."""
    return np.repeat(0.99 ** (factor * np.arange(steps + 1.0))[:, None], seeds, axis=1)


def result(losses: np.ndarray, optimizer: str = "rule", **others: Any) -> Result:
    problem = SuiteProblem("p", "quadratic", len(losses) - 1, seeds=losses.shape[1])
    return Result(problem, optimizer, losses, **others)


def test_running_final_loss_is_that_of_a_training_that_ends_there() -> None:
    rng = np.random.default_rng(0)
    losses = rng.lognormal(size=(231, 3)) * falling(5.0, 230)
    running = running_final(losses)
    for steps in range(len(losses)):
        np.testing.assert_allclose(running[steps], final_loss(losses[: steps + 1]), rtol=1e-12)


def test_running_final_loss_is_exact_where_losses_are_tiny() -> None:
    losses = falling(20.0)  # down to 1e-88; sums from the start would leave 1e-14 at best
    np.testing.assert_allclose(running_final(losses)[-1], final_loss(losses), rtol=1e-9)


def test_running_final_loss_stays_infinite_without_nan() -> None:
    losses = falling(1.0, 50)
    losses[20:] = np.inf
    running = running_final(losses)
    assert np.isfinite(running[:20]).all()
    assert np.isinf(running[20:]).all()


def test_steps_to_counts_from_one_and_unreached_is_infinite() -> None:
    running = np.array([[0.0, 5.0, 5.0], [0.0, 4.0, 5.0], [0.0, 1.0, 5.0], [9.0, 4.0, 5.0]])
    assert steps_to(running, np.array([1.0, 1.0, 1.0])).tolist() == [1.0, 2.0, np.inf]


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 2.0, 4.0])
def test_speedup_is_the_ratio_of_decay_rates(factor: float) -> None:
    """The mean over a last tenth lags a little behind its end; by as much in both, but in fewer steps."""
    found = float(speedup(falling(factor), falling(1.0))[0])
    assert found == pytest.approx(factor, rel=0.08)
    assert (found == 1.0) == (factor == 1.0)


def test_slowdowns_are_relative_to_the_median_particle() -> None:
    """Two groups of three particles, copy by copy; the losses of the second group are a thousand times higher."""
    factors = np.array([[1.0, 1.0], [2.0, 0.5], [0.5, 4.0]])
    curves = np.stack([falling(factor, seeds=2) for factor in factors.flatten()], axis=1) * [[[1], [1000]] * 3]
    losses = torch.from_numpy(curves.reshape(STEPS + 1, 6, 2))
    found = log_slowdowns(losses[1:], losses[0], copies=3)
    # The middle one of each group is the reference: 1 of both.
    expected = -np.log(factors).flatten()
    np.testing.assert_allclose(found, expected, atol=0.08)
    assert found[:2].tolist() == [0.0, 0.0]
    losses[700:, 4] = torch.nan
    diverged = log_slowdowns(losses[1:], losses[0], copies=3)
    assert diverged[4] == -math.log(SLOWEST)
    assert torch.equal(diverged[[0, 1, 2, 3, 5]], found[[0, 1, 2, 3, 5]])


def test_slowdowns_include_the_initial_loss() -> None:
    curves = np.random.default_rng(0).lognormal(size=(6, 5, 1))
    losses = torch.from_numpy(curves)
    median = np.median(curves[:, :, 0], axis=1, keepdims=True)
    expected = -np.log(speedup(curves[:, :, 0], np.repeat(median, 5, axis=1)))
    found = log_slowdowns(losses[1:], losses[0], copies=5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(set(expected)) > 2
    assert not np.allclose(log_slowdowns(losses[2:], losses[1], copies=5), expected)


def test_speedup_is_bounded() -> None:
    assert speedup(falling(100.0), falling(1.0)).tolist() == [FASTEST]
    assert speedup(falling(0.01), falling(1.0)).tolist() == [SLOWEST]


def test_diverged_training_counts_as_the_slowest() -> None:
    losses = falling(5.0)
    assert speedup(losses, falling(1.0))[0] > 4
    losses[-1] = np.inf
    assert speedup(losses, falling(1.0)).tolist() == [SLOWEST]
    assert speedup(falling(5.0), falling(1.0), diverged=np.array([True])).tolist() == [SLOWEST]


def test_any_finite_training_beats_a_diverged_reference() -> None:
    broken = falling(1.0)
    broken[500:] = np.inf
    assert speedup(falling(0.1), broken).tolist() == [FASTEST]
    assert speedup(broken, broken).tolist() == [SLOWEST]


def test_speedup_compares_when_a_plateau_is_reached() -> None:
    """A reference on a plateau reaches its final loss early, and an optimizer that does the same is not faster."""
    plateau = np.maximum(falling(10.0), 0.5)
    assert speedup(plateau, plateau).tolist() == [1.0]
    late = np.maximum(falling(1.0), 0.5)
    assert speedup(late, plateau)[0] < 0.3


@pytest.mark.parametrize(("cost", "expected"), [(2.0, 1.0), (0.5, 4.0)])
def test_speedup_in_seconds_divides_by_the_cost_of_a_step(cost: float, expected: float) -> None:
    assert float(speedup(falling(2.0), falling(1.0), cost)[0]) == pytest.approx(expected, rel=0.08)


class TestSeconds:
    """A reference that falls to 0.99 ** 100 in 100 steps of a tenth of a second, and an optimizer twice as fast."""

    adam = result(falling(1.0, 100), "Adam", timing=timing(0.1))
    ours = result(falling(2.0, 100), timing=timing(0.3))

    def test_seconds_to_the_reference_are_steps_times_seconds_of_a_step(self) -> None:
        assert seconds_to(self.adam, self.adam) == pytest.approx(10.0)
        target = float(final_loss(self.adam.losses)[0])
        step = next(step for step in range(1, 101) if final_loss(self.ours.losses[: step + 1])[0] <= target)
        assert 45 < step < 55
        assert seconds_to(self.ours, self.adam) == pytest.approx(0.3 * step)

    def test_seconds_to_a_loss_that_is_not_reached_are_infinite(self) -> None:
        slow = result(falling(0.5, 100), timing=timing(0.1))
        assert seconds_to(slow, self.adam) == math.inf
        assert seconds_to(result(falling(2.0, 100)), self.adam) is None

    def test_reference_has_as_many_steps_as_fit_into_the_seconds(self) -> None:
        longer = result(falling(1.0, 400), "Adam", held_out=np.arange(26.0)[::-1, None])
        equal = at_equal_seconds(self.ours, self.adam, longer)
        assert equal is not None
        assert equal.steps == 300
        assert equal.final[0] == pytest.approx(float(final_loss(falling(1.0, 300))[0]))
        assert equal.held_out == 25 - 300 // 16  # the look at step 288, of those at every sixteenth
        same = at_equal_seconds(self.adam, self.adam, longer)
        assert same is not None
        assert same.steps == 100
        assert same.final[0] == pytest.approx(self.adam.final[0])

    def test_cheaper_optimizer_is_compared_with_fewer_steps(self) -> None:
        cheap = dataclasses.replace(self.ours, timing=timing(0.05))
        equal = at_equal_seconds(cheap, self.adam, self.adam)
        assert equal is not None
        assert equal.steps == 50
        assert equal.final[0] == pytest.approx(float(final_loss(falling(1.0, 50))[0]))

    def test_no_more_steps_are_made_up_than_were_run(self) -> None:
        assert at_equal_seconds(self.ours, self.adam, self.adam) is None
        assert at_equal_seconds(dataclasses.replace(self.ours, timing=None), self.adam, self.adam) is None

    def test_score_counts_the_problems_won_in_equal_seconds(self) -> None:
        longer = result(falling(1.0, 400), "Adam")
        equal = at_equal_seconds(self.ours, self.adam, longer)
        assert equal is not None
        assert self.adam.final[0] > self.ours.final[0] > equal.final[0]
        ours = dataclasses.replace(self.ours, equal_seconds=equal)
        found = score([ours], [self.adam])
        assert (found.better, found.better_in_equal_seconds) == (1, 0)
        assert score([ours, self.ours], [self.adam, self.adam]).better_in_equal_seconds is None


def test_held_out_loss_is_summed_up_at_the_end_and_at_its_lowest() -> None:
    looks = np.array([4.0, 1.0, 2.0, 3.0])[:, None]
    ours = result(falling(1.0, 3), held_out=looks, accuracy=looks / 10)
    assert (ours.held_out_end, ours.held_out_best, ours.held_out_best_step) == (3.0, 1.0, 1.0)
    assert [ours.accuracy_end, ours.accuracy_best] == pytest.approx([0.3, 0.4])
    adam = result(falling(1.0, 3), "Adam", held_out=looks / 2)
    nothing = result(falling(1.0, 3))
    found = score([ours, nothing], [adam, nothing])
    assert [found.held_out_end, found.held_out_best] == pytest.approx([2.0, 2.0])
    assert score([nothing], [nothing]).held_out_end is None
    assert math.isnan(nothing.held_out_end)


def test_mean_ratio_is_geometric_and_bounded() -> None:
    assert mean_ratio([2.0, 8.0], [1.0, 1.0]) == pytest.approx(4.0)
    assert mean_ratio([1e-9, math.inf, 1.0], [1.0, 1.0, 0.0]) == pytest.approx(LARGEST_RATIO ** (1 / 3))
    assert mean_ratio([math.inf, 0.0], [math.inf, 0.0]) == 1.0
    assert mean_ratio([math.nan, 3.0], [1.0, 1.0]) == pytest.approx(3.0)
    assert mean_ratio([], []) is None


def test_diverged_runs_are_counted_one_by_one() -> None:
    losses = falling(1.0, 100, seeds=4)
    losses[50:, 1] = np.inf
    losses[50:, 2] = DIVERGED * 1.01  # of an initial loss of 1
    losses[50:, 3] = DIVERGED * 0.99
    found = result(losses)
    assert found.diverged.tolist() == [False, True, True, False]
    assert problem_speedups(found, result(falling(0.1, 100, seeds=4)))[0] == SLOWEST


def test_speedup_band_reflects_the_spread_over_seeds() -> None:
    lucky = falling(4.0, seeds=10)
    lucky[:, ::2] = falling(1.0, seeds=5)
    adam = result(falling(1.0, seeds=10), "Adam")
    speeds = problem_speedups(result(lucky), adam)
    low, high = np.quantile(speeds[1:], [0.025, 0.975])
    assert low < speeds[0] < high
    assert np.ptp(problem_speedups(result(falling(2.0, seeds=10)), adam)) < 1e-9


def test_score_is_the_geometric_mean_over_problems() -> None:
    adam = [result(falling(1.0, seeds=3), "Adam")] * 2
    ours = [result(falling(4.0, seeds=3), is_rule=True), result(falling(0.5, seeds=3), is_rule=True)]
    found = score(ours, adam)
    assert found.speedup == pytest.approx(np.sqrt(4.0 * 0.5), rel=0.08)
    assert found.low <= found.speedup <= found.high
    assert (found.better, found.problems, found.diverged, found.runs, found.is_rule) == (1, 2, 0, 6, True)
    assert score(adam, adam).speedup == 1.0
    slow = [dataclasses.replace(each, timing=timing(0.2)) for each in ours]
    timed = [dataclasses.replace(each, timing=timing(0.1)) for each in adam]
    assert score(slow, timed, in_seconds=True).speedup == pytest.approx(found.speedup / 2, rel=0.08)
    assert score(slow, timed).speedup == found.speedup


@pytest.mark.parametrize("steps", [1, 5, POINTS, POINTS + 1, 1234])
def test_stored_curve_is_short_and_averages_what_it_leaves_out(steps: int) -> None:
    losses = np.random.default_rng(0).random((steps + 1, 2))
    at, mean, low, high = result(losses).curve
    assert len(at) == min(steps, POINTS) + 1
    assert (at[0], at[-1]) == (0, steps)
    assert mean[0] == pytest.approx(losses[0].mean())
    assert mean[-1] == pytest.approx(losses[at[-2] + 1 :].mean())
    assert bool((low <= mean).all() and (mean <= high).all())


@pytest.mark.parametrize(("ratio", "text"), [(1.0, "1.00"), (0.123, "0.12"), (0.00254, "0.0025"), (math.inf, "inf")])
def test_ratios_are_shown_with_two_significant_digits(ratio: float, text: str) -> None:
    assert ratio_text(ratio) == text
