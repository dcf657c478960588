"""Training tasks with real optimizers, many seeds at a time, to compare them."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim.meta_train.benchmark.stepping import ForEach, stepper
from learned_optim.meta_train.benchmark.stepping import MakeOptimizer as MakeOptimizer
from learned_optim.meta_train.common.seeds import (
    cpu_by_default,
    derive_seed,
    fixed_global_state,
    numpy_generator,
    torch_generator,
)
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Split, Task, TaskFamily

Look = Callable[[int, Tensor], None]
"""A function of the steps done and the parameters ``(instances, N)``, called before each step and after all."""

RATES = tuple(float(f"{mantissa}e{exponent}") for exponent in range(0, -6, -1) for mantissa in (3, 1))[1:]
"""The grid 1, 0.3, 0.1, ... 1e-5 on which baselines are tuned."""

LADDER = tuple(float(f"{mantissa}e{exponent}") for exponent in range(-7, 2) for mantissa in (1, 3))
"""1e-7, 3e-7 ... 30: climbed or descended beyond a grid whose end is its best. SGD's best rate on small networks often
exceeds 1."""

MOMENTUM = 0.9  # customary


def _cosine(optimizer: Optimizer, steps: int) -> Optimizer:
    """``optimizer`` with its rate on a cosine from its value to zero after ``steps``."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


BASELINES: dict[str, Callable[[Iterable[Tensor], float, int], Optimizer]] = {
    "Adam": lambda parameters, lr, steps: torch.optim.Adam(parameters, lr=lr),
    "AdamW": lambda parameters, lr, steps: torch.optim.AdamW(parameters, lr=lr),
    "AdamW-cosine": lambda parameters, lr, steps: _cosine(torch.optim.AdamW(parameters, lr=lr), steps),
    "RMSprop": lambda parameters, lr, steps: torch.optim.RMSprop(parameters, lr=lr),
    "SGD": lambda parameters, lr, steps: torch.optim.SGD(parameters, lr=lr),
    "Momentum": lambda parameters, lr, steps: torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM),
    "NAG": lambda parameters, lr, steps: torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, nesterov=True),
}
"""Hand-designed optimizers from (parameters, rate, steps of the whole training), else at PyTorch's defaults."""


def _adamw_cosine(parameters: Iterable[Tensor], lr: float, steps: int, decay: float) -> Optimizer:
    return _cosine(torch.optim.AdamW(parameters, lr=lr, weight_decay=decay), steps)


def _adamw_linear(parameters: Iterable[Tensor], lr: float, steps: int, decay: float) -> Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


DECAYED: dict[str, Callable[..., Optimizer]] = {
    "AdamW-cosine+decay": _adamw_cosine,
    "AdamW-linear+decay": _adamw_linear,
}
"""Optimizers whose weight decay is tuned as well as their rate, which falls to zero at the last step; from parameters,
rate, steps of the whole training, and ``decay``."""

Edge = Literal["lower", "upper"]


class Tuned(NamedTuple):
    """An optimizer at the best of the rates that were tried."""

    rate: float
    scores: dict[float, float]
    """Score of every rate on the tuning seeds; the lowest is the best."""

    @property
    def edge(self) -> Edge | None:
        """The end of the tried rates at which the best one lies, if any: a rate beyond it might do better."""
        if self.rate == min(self.scores):
            return "lower"
        return "upper" if self.rate == max(self.scores) else None


def tune(score: Callable[[float], float], rates: Iterable[float] = RATES) -> Tuned:
    """The rate with the lowest score, of equals the lowest.

    While the best one lies at an end of those tried, the next rate of :data:`LADDER` beyond it is tried too.

    Args:
        score: rate -> mean final loss; infinite where a training diverges.
        rates: tried in any case.
    """
    scores = {rate: score(rate) for rate in rates}
    while True:
        tuned = Tuned(min(scores, key=lambda rate: (scores[rate], rate)), scores)
        above = [rate for rate in LADDER if rate > max(scores)] if tuned.rate == max(scores) else []
        below = [rate for rate in LADDER if rate < min(scores)] if tuned.rate == min(scores) else []
        if not (above or below):
            return tuned
        rate = above[0] if above else below[-1]
        scores[rate] = score(rate)


LOOK_EVERY = 20  # steps between looks at whether a run is still finite; a look waits for a GPU


def train(
    task: VectorizedTask,
    make_optimizer: MakeOptimizer | ForEach,
    steps: int,
    generator: torch.Generator,
    tick: Callable[[], None] = lambda: None,
    *,
    by_tensor: bool = False,
    look: Look = lambda step, parameters: None,
) -> np.ndarray:
    """Train every instance of ``task`` and record its loss before each step and after the last.

    One optimizer steps all instances. For one that treats every coordinate by itself, as all of :data:`BASELINES` do,
    that is the same as one optimizer for each; others are made by a
    :class:`~learned_optim.meta_train.benchmark.stepping.ForEach`. When all of them have diverged, training ends early.

    Args:
        task: what is trained, from its initial parameters.
        make_optimizer: the optimizer of all instances, or what makes one for each.
        steps: number of updates.
        generator: where batches are drawn from.
        tick: called after each step.
        by_tensor: give the optimizer the tensors of every instance, in their shapes: a learned rule may use these. If
            not, one tensor of all coordinates, which is faster.
        look: called with the number of steps done and the parameters, as long as the training goes on.

    Returns:
        Losses ``(steps + 1, instances)``, float64; what follows a non-finite loss counts as infinite.
    """
    runs = stepper(task, task.initial_parameters.clone(), make_optimizer, by_tensor=by_tensor)
    losses = torch.full((steps + 1, task.instances), torch.inf, dtype=torch.float64, device=task.device)
    for step in range(steps + 1):
        losses[step] = runs.losses(task.batch(generator))
        if step % LOOK_EVERY == 0 and not losses[step].isfinite().any():
            break
        look(step, runs.shown)
        if step < steps:
            runs.step()
            tick()
    broken = (~losses.isfinite()).cummax(dim=0).values
    return losses.masked_fill(broken, torch.inf).cpu().numpy()


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
        seeds: number of training runs, which advance side by side.
        steps: length of each.
        seed: determines what differs between the runs, namely starting points, batches and random problems such as a
            quadratic's matrix; the same for every optimizer.
        split: part of the data.
        draw: which task of the family; of no effect if the family draws nothing.
        block: counts further runs of the same seed.
        device: where they are trained.
        held_out: rows of a batch of the data that are held out, see :meth:`~Task.hold_out`; 0: all data are trained on.
    """

    @cpu_by_default()
    def __init__(
        self,
        family: TaskFamily,
        seeds: int,
        steps: int,
        seed: int,
        split: Split = "test",
        draw: int = 0,
        block: int = 0,
        device: torch.device | str = "cpu",
        held_out: int = 0,
    ) -> None:
        self.steps, self.seed, self.block = steps, seed, block
        task, outer = comparison_task(family, split, draw), None
        if held_out:
            task, outer = task.hold_out()
            if hasattr(outer, "batch_size"):
                outer.batch_size = held_out
        self.has_held_out = outer is not None and outer is not task
        self.task = VectorizedTask(
            task, seeds, derive_seed(seed, "comparison instances", block), device=device, outer=outer
        )

    @cpu_by_default()
    def run(
        self,
        make_optimizer: MakeOptimizer | ForEach,
        tick: Callable[[], None] = lambda: None,
        *,
        by_tensor: bool = False,
        look: Look = lambda step, parameters: None,
    ) -> np.ndarray:
        """Losses ``(steps + 1, seeds)``; see :func:`train`."""
        with fixed_global_state(derive_seed(self.seed, "comparison dropout", self.block), self.task.device):
            return train(self.task, make_optimizer, self.steps, self.generator(), tick, by_tensor=by_tensor, look=look)

    def generator(self) -> torch.Generator:
        """The generator of the batches, at its start."""
        return torch_generator(self.seed, "comparison batches", self.block)


def comparison_task(family: TaskFamily, split: Split = "test", draw: int = 0) -> Task:
    """The task number ``draw`` of a family on which optimizers are compared."""
    return family.sample(numpy_generator(draw, "comparison task"), split)


def mean_and_band(
    losses: np.ndarray, resamples: int = 1000, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds and its bootstrap confidence band, each ``(steps + 1,)``, from losses ``(steps + 1, seeds)``.

    A band reaches infinity where enough resamples hold a diverged run. With very few seeds it is too narrow.
    """
    means = weighted_means(losses, resampled(losses.shape[1], resamples))
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(means, quantiles, axis=1, method="nearest")  # others subtract infinities
    return losses.mean(axis=1), low, high


def resampled(seeds: int, resamples: int) -> np.ndarray:
    """Weights ``(seeds, resamples)`` of bootstrap means, always the same."""
    picks = np.random.default_rng(0).integers(seeds, size=(resamples, seeds))
    return np.stack([np.bincount(pick, minlength=seeds) for pick in picks], axis=1) / seeds


def weighted_means(losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means ``(steps, columns)`` of losses ``(steps, seeds)``; infinite where an infinite loss has a weight."""
    infinite = ~np.isfinite(losses)
    means: np.ndarray = np.where(infinite, 0, losses) @ weights
    return np.where(infinite @ weights > 0, np.inf, means) if infinite.any() else means
