"""Scores of trainings from their losses: final loss, divergence, and speed-ups over a reference with their bands."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from learned_optim.meta_train.benchmark.evaluation import Edge, final_loss, mean_and_band, resampled, weighted_means
from learned_optim.meta_train.benchmark.held_out import look_steps
from learned_optim.meta_train.benchmark.suites import SuiteProblem
from learned_optim.meta_train.benchmark.timing import Timing
from learned_optim.meta_train.inner.speedups import running_final, speedup, steps_to

DIVERGED = 2.0  # initial losses; noise alone does not double a loss
POINTS = 200  # of a stored or drawn curve
RESAMPLES = 200  # a band of speed-ups to some percent; each takes two passes over all losses
LARGEST_RATIO = 10.0  # of losses in means, so that no problem whose loss goes to zero decides them


class EqualSeconds(NamedTuple):
    """Tuned Adam's training of as many seconds as an optimizer's took."""

    steps: int
    """Steps of Adam that fit into these seconds."""
    final: tuple[float, float, float]
    """Mean final loss of a training of that length and its bootstrap 95% band."""
    held_out: float
    """Loss on data held out at the last look before its end, mean over seeds; not a number where none are."""


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
    accuracy: np.ndarray | None = None
    """Shares of right predictions there, likewise; None: no classes are predicted."""
    not_held_out: str = ""
    """Why no data are held out; empty where they are."""
    timing: Timing | None = None
    """Seconds of one of its steps in a single training; None: not measured."""
    equal_seconds: EqualSeconds | None = None
    """What tuned Adam does in the same time; None: not measured."""
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
    def held_out_best_step(self) -> float:
        """The step at which it is lowest, median over seeds: where it rises afterwards, training overfits."""
        if self.held_out is None:
            return math.nan
        return float(np.median(self.looks[self.held_out.argmin(axis=0)]))

    @functools.cached_property
    def accuracy_end(self) -> float:
        """Share of right predictions on data held out, mean over seeds, when training ends; not a number where none."""
        return math.nan if self.accuracy is None else float(self.accuracy[-1].mean())

    @functools.cached_property
    def accuracy_best(self) -> float:
        """The highest during training instead, of each seed."""
        return math.nan if self.accuracy is None else float(self.accuracy.max(axis=0).mean())

    @property
    def looks(self) -> np.ndarray:
        """The steps at which the data held out are looked at."""
        return np.array(look_steps(len(self.losses) - 1))

    @functools.cached_property
    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean loss and its band at 200 steps at most; each is the mean since the step before it."""
        last = len(self.losses) - 1
        steps = np.unique(np.linspace(0, last, min(last, POINTS) + 1).round().astype(int))
        sums = np.add.reduceat(self.losses, np.concatenate([[0], steps[:-1] + 1]), axis=0)
        return steps, *mean_and_band(sums / np.diff(steps, prepend=-1)[:, None])

    @functools.cached_property
    def held_out_curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean loss on data held out and its band at each look; none where no data are held out."""
        losses = np.full((len(self.looks), 1), np.nan) if self.held_out is None else self.held_out
        return self.looks, *mean_and_band(losses)


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
    held_out_end: float | None = None
    """Loss on data held out over that of the tuned reference when training ends, geometric mean over the problems with
    such data (each ratio between 1/10 and 10); None: there are none."""
    held_out_best: float | None = None
    """The same of the lowest losses during training."""
    better_in_equal_seconds: int | None = None
    """Problems with a lower final loss than the reference has after as many seconds; None: not measured on all."""


def problem_speedups(result: Result, reference: Result, cost: float = 1.0) -> np.ndarray:
    """Speed-up on one problem: that of the means over all seeds first, then those of resampled seeds."""
    seeds = result.losses.shape[1]
    weights = np.column_stack([np.full(seeds, 1 / seeds), resampled(seeds, RESAMPLES)])
    own, other = (weighted_means(losses, weights) for losses in (result.losses, reference.losses))
    return speedup(own, other, cost, diverged=result.diverged @ weights > 0)


def cost(result: Result, reference: Result) -> float | None:
    """Seconds of a step over those of the reference; None where they were not measured."""
    if result.timing is None or reference.timing is None:
        return None
    return result.timing.step / reference.timing.step


def seconds_to(result: Result, reference: Result) -> float | None:
    """Seconds until an optimizer reaches the reference's final loss: steps to it times the seconds of a step.

    Infinite where that loss is not reached; None where seconds were not measured.
    """
    if result.timing is None:
        return None
    own, other = (running_final(each.losses.mean(1, keepdims=True)) for each in (result, reference))
    return result.timing.step * float(steps_to(own, other[-1])[0])


def at_equal_seconds(result: Result, reference: Result, longer: Result) -> EqualSeconds | None:
    """The reference's training of as many seconds as an optimizer's took, at the same rate.

    A training at a constant rate does not know how long it will be, so that a shorter one is the beginning of a longer
    one. A rate that is tuned for the reference's own steps need not be the best one for more of them.

    Args:
        result: the optimizer's, with its timing.
        reference: tuned, of equal steps, with its timing.
        longer: the reference's training of as many steps or more.

    Returns:
        None where seconds were not measured, or more steps would fit than ``longer`` has.
    """
    factor = cost(result, reference)
    steps = 0 if factor is None else max(1, round(factor * (len(result.losses) - 1)))
    if not 0 < steps < len(longer.losses):
        return None
    mean, low, high = (float(each[0]) for each in mean_and_band(final_loss(longer.losses[: steps + 1])[None]))
    looked = reference if steps < len(reference.losses) else longer  # the one with more looks until then
    held_out = math.nan if looked.held_out is None else float(looked.held_out[looked.looks <= steps][-1].mean())
    return EqualSeconds(steps, (mean, low, high), held_out)


def mean_ratio(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Geometric mean of the ratios of losses, each between 1/10 and 10; those that are no numbers are left out."""
    ratios = [
        min(max(value / other if other else math.inf, 1 / LARGEST_RATIO), LARGEST_RATIO) if value != other else 1.0
        for value, other in zip(values, others, strict=True)
        if not (math.isnan(value) or math.isnan(other))
    ]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else None


def score(results: Sequence[Result], references: Sequence[Result], *, in_seconds: bool = False) -> Score:
    """Sum up one optimizer's results; ``references`` are those of the tuned reference on the same problems.

    ``in_seconds``: speed-ups count seconds instead of steps; all results have timings then.
    """
    pairs = list(zip(results, references, strict=True))
    costs = [(cost(*pair) or math.nan) if in_seconds else 1.0 for pair in pairs]
    logs = np.mean([np.log(problem_speedups(*pair, factor)) for pair, factor in zip(pairs, costs, strict=True)], axis=0)
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
        held_out_end=mean_ratio(*([each.held_out_end for each in group] for group in (results, references))),
        held_out_best=mean_ratio(*([each.held_out_best for each in group] for group in (results, references))),
        better_in_equal_seconds=_better_in_equal_seconds(results),
    )


def _better_in_equal_seconds(results: Sequence[Result]) -> int | None:
    pairs = [(result.final[0], result.equal_seconds) for result in results if result.equal_seconds is not None]
    return sum(final < equal.final[0] for final, equal in pairs) if len(pairs) == len(results) else None
