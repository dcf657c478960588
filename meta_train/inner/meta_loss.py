"""The meta-loss: the one number, made from the losses of an unroll, that meta-training lowers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learned_optim.meta_train.inner.vectorize import VectorizedTask

MetaLossName = Literal["mean", "final", "log", "log-of-mean", "speedup"]
Reduction = Callable[[Tensor, Tensor], Tensor]
"""``(losses (steps, B), initial loss (B,)) -> 0-d``"""

FLOOR = 1e-6  # relative to the initial loss: progress below it no longer counts, and log stays finite
BOUND = 1.5  # initial losses; a classifier that knows nothing starts at ln C, so that this is the usual 1.5 ln C


def mean_of_window(losses: Tensor, initial_loss: Tensor) -> Tensor:
    """Mean over the window and the instances (Andrychowicz et al. 2016, equation 3 with all weights equal)."""
    return losses.mean()


def end_of_window(losses: Tensor, initial_loss: Tensor) -> Tensor:
    """Mean over the instances after the last step of the window (Lv et al. 2017; Metz et al. 2022)."""
    return losses[-1].mean()


def mean_log_ratio(losses: Tensor, initial_loss: Tensor) -> Tensor:
    """Mean of ``log(loss / initial loss)``: every task counts alike, and late progress as much as early.

    After Wichrowska et al. 2017, section 4.2.
    """
    return ((losses / initial_loss).clamp(min=0) + FLOOR).log().mean()


def log_ratio_of_mean(losses: Tensor, initial_loss: Tensor) -> Tensor:
    """``log(mean loss of the window / initial loss)``, in the mean over instances.

    As :func:`mean_log_ratio`, but the losses of small batches, of which some are nearly zero by chance, do not decide.
    """
    return ((losses.mean(0) / initial_loss).clamp(min=0) + FLOOR).log().mean()


META_LOSSES: dict[MetaLossName, Reduction] = {
    "mean": mean_of_window,
    "final": end_of_window,
    "log": mean_log_ratio,
    "log-of-mean": log_ratio_of_mean,
}
"""Reductions by the name that stands in a configuration; ``speedup`` is none, as it compares particles."""


@dataclass(frozen=True)
class MetaLoss:
    """A meta-loss: the losses of a window that count, and their weights.

    Args:
        name: how they become one number: one of :data:`META_LOSSES`; or ``"speedup"``, which compares particles over
            whole inner trainings, see :func:`learned_optim.meta_train.inner.speedups.log_slowdowns`.
        bounded: no loss counts as more than the task's :attr:`Task.loss_bound` or, of a task that has none, 1.5 times
            its initial loss (Metz et al. 2022; Moudgil et al. 2025).
        clamp: no loss counts as more than this (Metz et al. 2019: 10), in the loss's own unit.
        outer_batches: fresh batches after each inner step on which the losses are taken (Metz et al. 2019: 5); 0: the
            losses on the batch that also yields the next inner gradient.

    A loss that is not finite counts as the lower of the bounds, if there is one.

    Raises:
        ValueError: ``"speedup"`` with a bound: it needs none, as a diverged training counts as four times slower.
    """

    name: MetaLossName = "mean"
    bounded: bool = False
    clamp: float | None = None
    outer_batches: int = 0

    def __post_init__(self) -> None:
        if self.compares and (self.bounded or self.clamp is not None):
            raise ValueError("meta_loss 'speedup' needs no bound; leave out bounded and clamp")

    @property
    def compares(self) -> bool:
        """Whether it compares all particles of a window with each other."""
        return self.name == "speedup"

    @classmethod
    def of(cls, given: "MetaLoss | MetaLossName") -> "MetaLoss":
        """``given``, or that of this name."""
        return given if isinstance(given, cls) else cls(given)  # type: ignore[arg-type]

    def reduction(self, task: VectorizedTask) -> Reduction:
        """The function of a window's losses, bounds included.

        Raises:
            ValueError: for ``"speedup"``, which only estimators of losses alone can take.
        """
        if self.compares:
            raise ValueError("meta_loss 'speedup' has no gradient; take the estimator 'es' with it")
        reduce, clamp = META_LOSSES[self.name], self.clamp
        if not self.bounded and clamp is None:
            return reduce
        own = task.task.loss_bound

        def reduce_bounded(losses: Tensor, initial_loss: Tensor) -> Tensor:
            bound = torch.full_like(initial_loss, torch.inf)
            if self.bounded:
                bound = BOUND * initial_loss if own is None else torch.full_like(initial_loss, own)
            if clamp is not None:
                bound = bound.clamp(max=clamp)
            counted = losses.isfinite() & (losses < bound)
            return reduce(torch.where(counted, losses, bound), initial_loss)

        return reduce_bounded
