"""Seconds of a training step, measured on the real module with real optimizers, all of them in turn."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from learned_optim.meta_train.common.load import load_of_others
from learned_optim.meta_train.common.seeds import fixed_global_state, torch_generator
from learned_optim.meta_train.tasks import Task

ROUNDS = 15  # medians of fewer wander
FEWEST_ROUNDS = 3  # of models so slow that 15 take too long
SECONDS_A_ROUND = 0.05  # of one optimizer: long against the clock, short against what else goes on in the machine
SECONDS = 1.5  # of one optimizer in all rounds, about
MakeOptimizer = Callable[[nn.Module], Optimizer]


@dataclass(frozen=True)
class Timing:
    """Seconds of a step of a real training: one module and one seed, in the loop that a user writes."""

    model: float
    """Batch, forward and backward: the median over the rounds of all optimizers, since these do the same."""
    optimizer: float
    """The optimizer's own step: the median over its rounds."""
    quartiles: tuple[float, float]
    """Lower and upper quartile of its whole steps over the rounds."""
    rounds: int
    others: float | None = None
    """The load of the machine by other processes; None where the system does not tell."""

    @property
    def step(self) -> float:
        """Seconds of a whole step."""
        return self.model + self.optimizer

    @property
    def share(self) -> float:
        """The optimizer's share of a step."""
        return self.optimizer / self.step


def time_steps(
    task: Task, makers: Mapping[str, MakeOptimizer], device: torch.device, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Optimizer -> seconds of a step of one instance. All take turns, so that a busy moment strikes all alike.

    Args:
        task: what is trained.
        makers: what makes each optimizer for a module.
        device: where the module lies. A GPU is waited for after backward and after the step.
        rounds: turns of each optimizer, of 0.05 seconds or one step; fewer if a step takes more than 0.1 seconds.
    """
    trainings = {name: _Training(task, make, device) for name, make in makers.items()}
    for training in trainings.values():
        training.seconds(2)  # the first steps also allocate
    once = {name: sum(training.seconds(2)) for name, training in trainings.items()}
    steps = {name: max(1, round(SECONDS_A_ROUND / seconds)) for name, seconds in once.items()}
    longest = max(steps[name] * seconds for name, seconds in once.items())
    rounds = min(rounds, max(FEWEST_ROUNDS, round(SECONDS / longest)))
    others = load_of_others()
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, training in trainings.items():
            measured[name].append(training.seconds(steps[name]))
    parts = {name: np.array(seconds) for name, seconds in measured.items()}  # (rounds, 2)
    model = float(np.median(np.concatenate([seconds[:, 0] for seconds in parts.values()])))
    return {name: _timing(model, seconds, others) for name, seconds in parts.items()}


class _Training:
    """One real training, advanced a few steps at a time."""

    def __init__(self, task: Task, make: MakeOptimizer, device: torch.device) -> None:
        self.task, self.device = task, device
        with fixed_global_state(0):
            self.module = task.module().to(device)
        self.optimizer = make(self.module)
        self.generator = torch_generator(0, "timing batches")

    def seconds(self, steps: int) -> tuple[float, float]:
        """Take some steps; the mean seconds of batch, forward and backward, and those of the optimizer's step."""
        model = optimizer = 0.0
        self._wait()
        for _ in range(steps):
            began = time.perf_counter()
            batch = tree_map(lambda tensor: tensor[0].to(self.device), self.task.batch(1, self.generator))
            self.optimizer.zero_grad()
            self.task.loss(self.module, batch).backward()
            self._wait()
            halfway = time.perf_counter()
            self.optimizer.step()
            self._wait()
            model, optimizer = model + halfway - began, optimizer + time.perf_counter() - halfway
        return model / steps, optimizer / steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _timing(model: float, seconds: np.ndarray, others: float | None) -> Timing:
    """From the seconds of a model's and an optimizer's part in each round, ``(rounds, 2)``."""
    low, high = (float(value) for value in np.quantile(seconds.sum(1), [0.25, 0.75]))
    return Timing(model, float(np.median(seconds[:, 1])), (low, high), len(seconds), others)
