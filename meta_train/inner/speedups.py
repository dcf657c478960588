"""How many times faster one training is than another: the figure that rules are compared by, and can be trained for."""

import numpy as np
import torch
from torch import Tensor

SLOWEST, FASTEST = 0.25, 10.0
"""Bounds of a speed-up, so that no single problem decides a mean. A diverged training counts as the slowest."""


def running_final(losses: np.ndarray) -> np.ndarray:
    """The final loss that a training would have if it ended at each step: mean of its last tenth, at least of one loss.

    Losses ``(steps + 1, columns)``, which are infinite once they are not finite; the result has the same shape.
    """
    steps = np.arange(len(losses))
    window = np.maximum(1, steps // 10)
    infinite = ~np.isfinite(losses)
    sums = np.cumsum(np.where(infinite, 0, losses)[::-1], axis=0)[::-1]  # from the end, where losses are small
    sums = np.concatenate([sums, np.zeros_like(losses[:1])])
    means = (sums[steps + 1 - window] - sums[steps + 1]) / window[:, None]
    return np.where(infinite, np.inf, means)


def steps_to(running: np.ndarray, target: np.ndarray) -> np.ndarray:
    """First step from 1 on at which each column of ``(steps + 1, columns)`` is down to its target; infinite if none."""
    reached = running[1:] <= target
    return np.where(reached.any(axis=0), 1 + reached.argmax(axis=0), np.inf)


def speedup(
    losses: np.ndarray, reference: np.ndarray, cost: float = 1.0, diverged: np.ndarray | bool = False
) -> np.ndarray:
    """The factor by which a training is faster than a reference, between :data:`SLOWEST` and :data:`FASTEST`.

    Steps that the reference needs to reach its own final loss, over the steps needed to reach it too. Where that loss
    is not reached, steps that the reference needs to reach what *was* reached, over all steps.

    Args:
        losses: mean over seeds, ``(steps + 1, columns)``.
        reference: losses of the reference, of the same shape.
        cost: seconds of a step over those of the reference; 1 compares steps.
        diverged: columns that count as the slowest.
    """
    own, other = running_final(losses), running_final(reference)
    target = other[-1]
    with np.errstate(invalid="ignore"):
        factor = steps_to(other, target) / steps_to(own, target)  # 0 where it is not reached
        behind = steps_to(other, own[-1]) / (len(losses) - 1)
    factor = np.where(factor > 0, factor, behind) / cost
    factor = np.where(np.isfinite(target), factor, FASTEST)  # of a reference that diverged
    return np.where(diverged | ~np.isfinite(own[-1]), SLOWEST, np.clip(factor, SLOWEST, FASTEST))


def log_slowdowns(losses: Tensor, initial_loss: Tensor, copies: int) -> Tensor:
    """Minus the log speed-up of each particle over the median of the curves of all that train the same instances.

    Every task weighs about alike: a loss that is lower by a hundredth where noise is all that is left, and one that is
    a thousand times lower where there is none, count for the steps that they save.

    Args:
        losses: ``(steps, P, b)``, copy by copy: P is ``copies`` times the number of groups.
        initial_loss: ``(P, b)``.
        copies: particles of each group of instances.

    Returns:
        ``(P,)``, without a graph.
    """
    curves = torch.cat([initial_loss[None], losses.detach()]).mean(-1).double().cpu()
    curves = curves.masked_fill((~curves.isfinite()).cummax(0).values, torch.inf).unflatten(1, (copies, -1))
    median = np.median(curves.numpy(), axis=1, keepdims=True)
    flat, reference = curves.flatten(1).numpy(), np.broadcast_to(median, curves.shape).reshape(len(curves), -1)
    return torch.from_numpy(-np.log(speedup(flat, reference))).to(losses)
