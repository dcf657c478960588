"""Losses and accuracies on data held out from a training, looked at some 25 times while it goes on."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from learned_optim.meta_train.benchmark.cache import held_out_fingerprint
from learned_optim.meta_train.benchmark.evaluation import Problem, comparison_task
from learned_optim.meta_train.benchmark.suites import SuiteProblem
from learned_optim.meta_train.common.seeds import cpu_by_default, torch_generator
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.tasks import TaskFamily

LOOKS = 25  # of a training, evenly spaced: every 4% of the steps; the best of them is the loss of early stopping
ROWS = 500  # of a look, unless a suite says otherwise: an accuracy to two percent, in little time beside the training

ENDLESS = "every batch is new data, so the training loss is that of unseen data"
SWITCHED_OFF = "switched off (held_out = 0)"


@dataclass(frozen=True)
class HoldOut:
    """What is held out of the trainings of a problem."""

    rows: int
    """Rows of a look; 0: all data are trained on."""
    absent: str = ""
    """Why there are no held-out losses, in words; empty where there are."""
    fingerprint: str = ""
    """Of what is measured; empty where nothing is."""


@cpu_by_default()
def hold_out_of(problem: SuiteProblem, family: TaskFamily) -> HoldOut:
    """Find out what a problem holds out, and take a look at one fresh module, so that mistakes show before training.

    Args:
        problem: its ``held_out`` asks for a number of rows; None: :data:`ROWS` where the task has data to hold out.
        family: that of the problem.

    Raises:
        ConfigError: rows are asked for that the task does not have, or a look at them fails.
    """
    rows = ROWS if problem.held_out is None else problem.held_out
    if not rows:
        return HoldOut(0, SWITCHED_OFF)
    try:
        parts = comparison_task(family, problem.split, problem.draw).hold_out()
    except ValueError as error:
        if problem.held_out is None:
            return HoldOut(0, str(error))
        raise ConfigError(f"problem {problem.name!r}: held_out = {rows}: {error}; or set held_out = 0") from error
    if parts[0] is parts[1]:
        return HoldOut(problem.held_out or 0, ENDLESS)
    try:
        record = HeldOut(Problem(family, 1, 1, 0, problem.split, problem.draw, held_out=rows))
        record.look(0, record.task.initial_parameters)
    except Exception as error:  # whatever a user's code raises
        message = f"problem {problem.name!r}: the data held out cannot be evaluated: {type(error).__name__}: {error}"
        raise ConfigError(message) from error
    accuracies = record.accuracies
    if accuracies is not None and not 0 <= accuracies[0, 0] <= 1:
        raise ConfigError(
            f"problem {problem.name!r}: accuracy(model, batch) gives the share of right predictions, between 0 and 1, "
            f"got {accuracies[0, 0]:g}"
        )
    return HoldOut(rows, fingerprint=held_out_fingerprint(parts[1], record.batch))


class HeldOut:
    """The record of one training, whose :meth:`look` a problem's run calls.

    The rows are drawn once, so that all looks, and all optimizers, see the same. Modules are in evaluation mode.

    Args:
        problem: the problem that is trained, whose held-out data give the batches.
    """

    def __init__(self, problem: Problem) -> None:
        self.task = problem.task
        self.steps = look_steps(problem.steps)
        self.batch = self.task.outer_batch(torch_generator(problem.seed, "held out", problem.block))
        self.losses = np.full((len(self.steps), self.task.instances), np.inf)
        self.accuracies: np.ndarray | None = None
        """As ``losses``, 0 after divergence; None where no classes are predicted."""

    def look(self, step: int, parameters: Tensor) -> None:
        """Record the losses at ``parameters`` ``(seeds, N)`` if this is a step to look at."""
        if step not in self.steps:
            return
        number = self.steps.index(step)
        losses, accuracies = self.task.evaluate(parameters, self.batch)
        finite = losses.isfinite().cpu()
        self.losses[number] = losses.double().cpu().masked_fill(~finite, np.inf)
        if accuracies is not None:
            self.accuracies = np.zeros_like(self.losses) if self.accuracies is None else self.accuracies
            self.accuracies[number] = accuracies.double().cpu().masked_fill(~finite, 0.0)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored of a training."""
        return {"held_out": self.losses} | ({} if self.accuracies is None else {"accuracy": self.accuracies})


def look_steps(steps: int) -> list[int]:
    """The steps of a training after which held-out losses are taken: 0, the last, and those in between."""
    return [int(step) for step in np.unique(np.linspace(0, steps, LOOKS + 1).round().astype(int))]
