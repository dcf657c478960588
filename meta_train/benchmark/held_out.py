"""Losses on data held out from a training, looked at some 25 times while it goes on."""

import numpy as np
import torch
from torch import Tensor

from learned_optim.meta_train.benchmark.evaluation import Problem
from learned_optim.meta_train.common.seeds import torch_generator

LOOKS = 25  # of a training, evenly spaced: every 4% of the steps; the best of them is the loss of early stopping


class HeldOut:
    """The record of one training, whose :meth:`look` a problem's run calls.

    The rows are drawn once, so that all looks, and all optimizers, see the same.

    Args:
        problem: the problem that is trained, whose held-out data give the batches.
    """

    def __init__(self, problem: Problem) -> None:
        self.task = problem.task
        self.steps = look_steps(problem.steps)
        self.batch = self.task.outer_batch(torch_generator(problem.seed, "held out", problem.block))
        self.losses = np.full((len(self.steps), self.task.instances), np.inf)

    @torch.no_grad()
    def look(self, step: int, parameters: Tensor) -> None:
        """Record the losses at ``parameters`` ``(seeds, N)`` if this is a step to look at."""
        if step in self.steps:
            losses = self.task.losses(parameters, self.batch).double().cpu().numpy()
            self.losses[self.steps.index(step)] = np.where(np.isfinite(losses), losses, np.inf)


def look_steps(steps: int) -> list[int]:
    """The steps of a training after which held-out losses are taken: 0, the last, and those in between."""
    return [int(step) for step in np.unique(np.linspace(0, steps, LOOKS + 1).round().astype(int))]
