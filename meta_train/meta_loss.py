"""From the losses of an unroll to the one number that meta-training lowers."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

MetaLossName = Literal["mean", "log"]

FLOOR = 1e-6  # relative to the initial loss: progress below it no longer counts, and log stays finite


def mean_loss(losses: Tensor, initial_loss: Tensor) -> Tensor:
    """Mean over the window and the instances (Andrychowicz et al. 2016, equation 3 with all weights equal)."""
    return losses.mean()


def log_loss(losses: Tensor, initial_loss: Tensor) -> Tensor:
    """Mean of ``log(loss / initial loss)``: every task counts alike, and late progress as much as early.

    After Wichrowska et al. 2017, section 4.2.
    """
    return ((losses / initial_loss).clamp(min=0) + FLOOR).log().mean()


META_LOSSES: dict[MetaLossName, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean_loss, "log": log_loss}
"""``(losses (steps, B), initial loss (B,)) -> 0-d``, by the name that stands in a configuration."""
