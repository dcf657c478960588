"""Training tasks with real optimizers, many seeds at a time, to compare them."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim.meta_train.seeds import derive_seed, fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.tasks import Split, TaskFamily
from learned_optim.meta_train.vectorize import VectorizedTask

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
"""Parameters -> optimizer: what a user writes, ``lambda parameters: torch.optim.Adam(parameters, lr=1e-3)``."""

RATES = tuple(float(f"{mantissa}e{exponent}") for exponent in range(0, -6, -1) for mantissa in (3, 1))[1:]
"""The grid 1, 0.3, 0.1, ... 1e-5 on which baselines are tuned."""

HIGHER_RATES = (1.0, 3.0, 10.0, 30.0)
"""Tried one by one above a grid whose highest rate is its best: SGD's best rate on small networks often exceeds 1."""

BASELINES: dict[str, Callable[[Iterable[Tensor], float], Optimizer]] = {
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "RMSprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "NAG": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
}
"""Hand-designed optimizers, apart from the rate at PyTorch's defaults; NAG's momentum is the customary 0.9."""


Edge = Literal["lower", "upper"]


class Tuned(NamedTuple):
    """A baseline at the best of the rates that were tried."""

    name: str
    rate: float
    scores: dict[float, float]
    """Score of every rate on the tuning seeds."""

    @property
    def edge(self) -> Edge | None:
        """The end of the tried rates at which the best one lies, if any: a rate beyond it might do better."""
        if self.rate == min(self.scores):
            return "lower"
        return "upper" if self.rate == max(self.scores) else None


def train(task: VectorizedTask, make_optimizer: MakeOptimizer, steps: int, generator: torch.Generator) -> np.ndarray:
    """Train every instance of ``task`` and record its loss before each step and after the last.

    All instances are rows of one parameter. For an optimizer that treats every coordinate by itself, as all of
    :data:`BASELINES` and learned rules do, that is the same as one optimizer for each instance.

    Returns:
        Losses ``(steps + 1, instances)``, float64; what follows a non-finite loss counts as infinite.
    """
    parameters = task.initial_parameters.clone().requires_grad_()
    optimizer = make_optimizer([parameters])
    losses = torch.empty(steps + 1, task.instances, dtype=torch.float64)
    for step in range(steps + 1):
        with torch.no_grad():
            loss, parameters.grad = task.losses_and_grads(parameters, task.batch(generator))
        losses[step] = loss
        if step < steps:
            optimizer.step()
    broken = (~losses.isfinite()).cummax(dim=0).values
    return losses.masked_fill(broken, torch.inf).numpy()


def final_loss(losses: np.ndarray) -> np.ndarray:
    """Mean of the last tenth of the steps, since a mini-batch's loss is noisy; a diverged run is infinite.

    ``(steps + 1, instances)`` to ``(instances,)``.
    """
    last: np.ndarray = losses[-max(1, (len(losses) - 1) // 10) :]
    return np.asarray(last.mean(axis=0))


class Problem:
    """Training runs of one task on which optimizers are compared.

    The task (architecture, batch size: whatever the family draws) depends on ``draw`` alone, so that problems of two
    seeds, one to tune on and one to compare on, hold the same task: a rate that is tuned on one architecture says
    little about another. A family with ranges is a distribution: compare on several draws.

    Args:
        family: where the task comes from.
        seeds: number of training runs.
        steps: length of each.
        seed: determines what differs between the runs, namely starting points, batches and random problems such as a
            quadratic's matrix; the same for every optimizer.
        split: part of the data.
        draw: which task of the family; of no effect if the family draws nothing.
    """

    def __init__(
        self, family: TaskFamily, seeds: int, steps: int, seed: int, split: Split = "test", draw: int = 0
    ) -> None:
        self.steps, self.seed = steps, seed
        task = family.sample(numpy_generator(draw, "comparison task"), split)
        self.task = VectorizedTask(task, seeds, derive_seed(seed, "comparison instances"))

    def run(self, make_optimizer: MakeOptimizer) -> np.ndarray:
        """Losses ``(steps + 1, seeds)``."""
        with fixed_global_state(derive_seed(self.seed, "comparison dropout")):
            return train(self.task, make_optimizer, self.steps, torch_generator(self.seed, "comparison batches"))

    def tune(self, name: str, rates: Iterable[float] = RATES) -> Tuned:
        """The rate with the lowest mean final loss; run this on a problem of another seed than the comparison's.

        While the highest rate is the best, those of :data:`HIGHER_RATES` above it are tried too. Where all rates
        diverge, the lowest is taken.
        """
        scores = {rate: self._score(name, rate) for rate in rates}

        def best() -> float:
            return min(scores, key=lambda rate: (scores[rate], rate))

        for rate in HIGHER_RATES:
            if rate > max(scores) == best():
                scores[rate] = self._score(name, rate)
        return Tuned(name, best(), scores)

    def _score(self, name: str, rate: float) -> float:
        make = BASELINES[name]
        return float(final_loss(self.run(lambda parameters: make(parameters, rate))).mean())


def mean_and_band(
    losses: np.ndarray, resamples: int = 1000, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds and its bootstrap confidence band, each ``(steps + 1,)``, from losses ``(steps + 1, seeds)``.

    A band reaches infinity where enough resamples hold a diverged run. With very few seeds it is too narrow.
    """
    rng = np.random.default_rng(0)
    seeds = losses.shape[1]
    picks = rng.integers(seeds, size=(resamples, seeds))
    counts = np.stack([np.bincount(pick, minlength=seeds) for pick in picks], axis=1) / seeds
    diverged = ~np.isfinite(losses)
    means = np.where(diverged @ counts > 0, np.inf, np.where(diverged, 0, losses) @ counts)
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(means, quantiles, axis=1, method="nearest")  # others subtract infinities
    return losses.mean(axis=1), low, high
