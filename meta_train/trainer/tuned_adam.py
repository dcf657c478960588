"""Adam at the best rate for a validation task: the line that a meta-trained rule should get below."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learned_optim.meta_train.benchmark.cache import Cache, task_fingerprint
from learned_optim.meta_train.benchmark.evaluation import train
from learned_optim.meta_train.inner.vectorize import VectorizedTask

RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4)
"""The rates that may be tried. Adam's best one on small networks and quadratics hardly ever lies outside."""
TRIED = slice(2, 7)
"""Those that are tried in any case; the next one is too while the best lies at an end."""

Train = Callable[[VectorizedTask, torch.Generator], tuple[Tensor, Tensor]]
"""A training of a task on batches of a generator: losses ``(steps, B)`` after each step, and initial ones ``(B,)``."""


class Drawn(NamedTuple):
    """A task of a validation suite."""

    task: VectorizedTask
    seed: int
    """It was drawn with; batches and dropout follow from it."""
    number: int
    """Among the tasks of the suite."""


def tuned_adam(
    drawn: Drawn, logarithm: Callable[[Drawn, Train], float], steps: int, solved: float, cache: Cache
) -> float:
    """The lowest score of a task over :data:`RATES`.

    Args:
        drawn: the task.
        logarithm: scores a training of it.
        steps: length of the training.
        solved: lower bound of a score that is part of ``logarithm``.
        cache: where the score of each rate is stored.
    """
    key = {
        "validation": task_fingerprint(drawn.task),
        "batches": [drawn.seed, drawn.number],
        "steps": steps,
        "solved": solved,
        "instances": drawn.task.instances,
        "device": drawn.task.device.type,
        "optimizer": "Adam",
    }
    scores: dict[float, float] = {}

    def score(place: int) -> None:
        rate = RATES[place]
        found = cache.get({**key, "rate": rate}, lambda: {"logarithm": np.array([logarithm(drawn, adam(rate, steps))])})
        scores[rate] = float(found["logarithm"][0])

    first, last = TRIED.start, TRIED.stop - 1
    for place in range(first, last + 1):
        score(place)
    if any(map(math.isnan, scores.values())):
        return math.nan  # the task itself is no number, whatever the rate
    while first > 0 and min(scores, key=scores.__getitem__) == RATES[first]:
        first -= 1
        score(first)
    while last < len(RATES) - 1 and min(scores, key=scores.__getitem__) == RATES[last]:
        last += 1
        score(last)
    return min(scores.values())


def adam(rate: float, steps: int) -> Train:
    """Training by Adam at a rate."""

    def run(task: VectorizedTask, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        losses = train(task, lambda parameters: torch.optim.Adam(parameters, lr=rate), steps, generator)
        initial, *_ = values = torch.from_numpy(losses)
        return values[1:], initial

    return run
