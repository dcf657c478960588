"""Seconds of a training step, measured on the real module with real optimizers, all of them in turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._pytree import tree_map

from learned_optim.meta_train.benchmark.contenders import Contender
from learned_optim.meta_train.benchmark.evaluation import comparison_task
from learned_optim.meta_train.benchmark.suites import SuiteProblem
from learned_optim.meta_train.common.seeds import fixed_global_state, torch_generator
from learned_optim.meta_train.tasks import Task

ROUNDS = 15  # medians of fewer wander
SECONDS_A_ROUND = 0.05  # of one optimizer: long against the clock, short against what else goes on in the machine
RATE = 1e-4  # of whatever is tuned: its steps take equally long at every rate, and here nothing can overflow


@dataclass(frozen=True)
class Timing:
    """Seconds of a whole training step: batch, forward, backward and update."""

    median: float
    quartiles: tuple[float, float, float]
    """Median, lower and upper quartile over the rounds."""
    rounds: int


def time_steps(
    problem: SuiteProblem, contenders: Sequence[Contender], device: torch.device, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Optimizer -> seconds of a step of one instance. All take turns, so that a busy moment strikes all alike."""
    task = comparison_task(problem.build(), problem.split, problem.draw)
    trainings = {contender.name: _Training(task, contender, problem.steps, device) for contender in contenders}
    for training in trainings.values():
        training.seconds(2)  # the first steps also allocate
    steps = {name: max(1, round(SECONDS_A_ROUND * 2 / training.seconds(2))) for name, training in trainings.items()}
    measured: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, training in trainings.items():
            measured[name].append(training.seconds(steps[name]) / steps[name])
    return {name: _timing(seconds) for name, seconds in measured.items()}


class _Training:
    """One real training, advanced a few steps at a time."""

    def __init__(self, task: Task, contender: Contender, steps: int, device: torch.device) -> None:
        self.task, self.device = task, device
        with fixed_global_state(0):
            self.module = task.module().to(device)
        self.optimizer = contender.for_module(self.module, contender.rate or RATE, steps)
        self.generator = torch_generator(0, "timing batches")

    def seconds(self, steps: int) -> float:
        """Take some steps; the time that they took."""
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            batch = tree_map(lambda tensor: tensor[0].to(self.device), self.task.batch(1, self.generator))
            self.optimizer.zero_grad()
            self.task.loss(self.module, batch).backward()
            self.optimizer.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _timing(seconds: Sequence[float]) -> Timing:
    low, median, high = (float(value) for value in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return Timing(median, (median, low, high), len(seconds))
