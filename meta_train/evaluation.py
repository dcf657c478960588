"""Training tasks with real optimizers, many seeds at a time, to compare them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

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

BASELINES: dict[str, Callable[[Iterable[Tensor], float], Optimizer]] = {
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "RMSprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "NAG": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
}
"""Hand-designed optimizers, apart from the rate at PyTorch's defaults; NAG's momentum is the customary 0.9."""


class Tuned(NamedTuple):
    """A baseline at the best rate of a grid."""

    name: str
    rate: float
    scores: dict[float, float]
    """Score of every rate on the tuning seeds."""


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
    """A fixed set of tasks of one family on which optimizers are compared.

    Args:
        family: where the tasks come from.
        seeds: number of training runs.
        steps: length of each.
        seed: determines the tasks, their starting points and batches: the same for every optimizer.
        split: part of the data.
    """

    def __init__(self, family: TaskFamily, seeds: int, steps: int, seed: int, split: Split = "test") -> None:
        self.steps, self.seed = steps, seed
        task = family.sample(numpy_generator(seed, "comparison task"), split)
        self.task = VectorizedTask(task, seeds, derive_seed(seed, "comparison instances"))

    def run(self, make_optimizer: MakeOptimizer) -> np.ndarray:
        """Losses ``(steps + 1, seeds)``."""
        with fixed_global_state(derive_seed(self.seed, "comparison dropout")):
            return train(self.task, make_optimizer, self.steps, torch_generator(self.seed, "comparison batches"))

    def tune(self, name: str, rates: Iterable[float] = RATES) -> Tuned:
        """The rate with the lowest mean final loss; run this on a problem of another seed than the comparison's."""
        make = BASELINES[name]
        scores: dict[float, float] = {}
        for rate in rates:
            losses = self.run(lambda parameters, rate=rate: make(parameters, rate))  # type: ignore[misc]
            scores[rate] = float(final_loss(losses).mean())
        return Tuned(name, min(scores, key=lambda rate: scores[rate]), scores)


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
