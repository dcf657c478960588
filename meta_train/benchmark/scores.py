"""Scores of trainings from their losses: final loss, divergence, and speed-ups over a reference with their bands."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from learned_optim.meta_train.benchmark.evaluation import Edge, final_loss, mean_and_band, resampled, weighted_means
from learned_optim.meta_train.benchmark.suites import SuiteProblem
from learned_optim.meta_train.inner.speedups import speedup

DIVERGED = 2.0  # initial losses; noise alone does not double a loss
POINTS = 200  # of a stored or drawn curve
RESAMPLES = 200  # a band of speed-ups to some percent; each takes two passes over all losses


@dataclass(frozen=True, eq=False)
class Result:
    """The losses of one optimizer on one problem."""

    problem: SuiteProblem
    optimizer: str
    losses: np.ndarray
    """Before each step and after the last, ``(steps + 1, seeds)``; infinite from the first that was not finite."""
    is_rule: bool = False
    rate: float | None = None
    """Learning rate of a baseline; None for a rule, which has none."""
    edge: Edge | None = None
    """End of the tried rates at which a tuned rate lies: it may be understated."""
    tuning: Mapping[float, float] = field(default_factory=dict)
    """Mean final loss of every rate tried, on the tuning seeds; empty where nothing was tuned."""
    held_out: np.ndarray | None = None
    """Losses on data held out, ``(looks, seeds)``, the first before training and the last at its end; None: no such
    data."""
    seconds: float = math.nan
    """Seconds that its trainings took, side by side; NaN for stored runs without them."""
    setting: str = ""
    """A setting that was tuned beside the rate, such as a weight decay, at its best value."""

    @property
    def is_tuned(self) -> bool:
        """Whether this is a hand-designed optimizer at its best rate."""
        return bool(self.tuning)

    @functools.cached_property
    def finals(self) -> np.ndarray:
        """Final loss of each seed."""
        return final_loss(self.losses)

    @functools.cached_property
    def final(self) -> tuple[float, float, float]:
        """Mean final loss and the edges of its bootstrap 95% band."""
        mean, low, high = (float(values[0]) for values in mean_and_band(self.finals[None]))
        return mean, low, high

    @functools.cached_property
    def diverged(self) -> np.ndarray:
        """Whether each seed diverged: not finite at some step, or ended at more than twice the mean initial loss."""
        return np.asarray(~(self.finals <= DIVERGED * self.losses[0].mean()))

    @functools.cached_property
    def held_out_end(self) -> float:
        """Loss on data held out, mean over seeds, when training ends; not a number where none are."""
        return math.nan if self.held_out is None else float(self.held_out[-1].mean())

    @functools.cached_property
    def held_out_best(self) -> float:
        """The lowest during training instead, of each seed."""
        return math.nan if self.held_out is None else float(self.held_out.min(axis=0).mean())

    @functools.cached_property
    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean loss and its band at 200 steps at most; each is the mean since the step before it."""
        last = len(self.losses) - 1
        steps = np.unique(np.linspace(0, last, min(last, POINTS) + 1).round().astype(int))
        sums = np.add.reduceat(self.losses, np.concatenate([[0], steps[:-1] + 1]), axis=0)
        return steps, *mean_and_band(sums / np.diff(steps, prepend=-1)[:, None])


@dataclass(frozen=True)
class Score:
    """The outcome of one optimizer over all problems that it ran on."""

    optimizer: str
    problems: int
    speedup: float
    """Geometric mean over the problems."""
    low: float
    """Lower edge of its bootstrap 95% band: seeds are resampled, problems are as they are."""
    high: float
    better: int
    """Problems with a lower final loss than the tuned reference."""
    diverged: int
    """Training runs, of all problems together."""
    runs: int
    is_rule: bool = False


def problem_speedups(result: Result, reference: Result, cost: float = 1.0) -> np.ndarray:
    """Speed-up on one problem: that of the means over all seeds first, then those of resampled seeds."""
    seeds = result.losses.shape[1]
    weights = np.column_stack([np.full(seeds, 1 / seeds), resampled(seeds, RESAMPLES)])
    own, other = (weighted_means(losses, weights) for losses in (result.losses, reference.losses))
    return speedup(own, other, cost, diverged=result.diverged @ weights > 0)


def score(results: Sequence[Result], references: Sequence[Result], costs: Sequence[float] | None = None) -> Score:
    """Sum up one optimizer's results; ``references`` are those of the tuned reference on the same problems.

    ``costs``: seconds of a step over those of the reference, for a speed-up in seconds.
    """
    pairs = zip(results, references, costs or [1.0] * len(results), strict=True)
    logs = np.mean([np.log(problem_speedups(*triple)) for triple in pairs], axis=0)
    low, high = np.quantile(logs[1:], [0.025, 0.975])
    mean, low, high = (float(np.exp(value)) for value in (logs[0], low, high))
    return Score(
        results[0].optimizer,
        len(results),
        mean,
        low,
        high,
        better=sum(ours.final[0] < theirs.final[0] for ours, theirs in zip(results, references, strict=True)),
        diverged=sum(int(result.diverged.sum()) for result in results),
        runs=sum(result.losses.shape[1] for result in results),
        is_rule=results[0].is_rule,
    )
