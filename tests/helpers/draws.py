"""Random draws in tests: generators and modules that follow from a seed, and bounds on statistics of draws."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.tasks import Task

SIGMAS = 5.0  # a correct statistic is further off than this once in two million draws


def generator(seed: int = 0) -> torch.Generator:
    """A generator that starts at the seed."""
    return torch.Generator().manual_seed(seed)


def assert_normal(values: Tensor, deviation: float) -> None:
    """Mean 0 and standard deviation as given, within the scatter of so many independent draws."""
    count = values.numel()
    assert abs(float(values.mean())) < SIGMAS * deviation / math.sqrt(count)
    assert float(values.std()) == pytest.approx(deviation, rel=SIGMAS / math.sqrt(2 * count))


def drawn(task: Task, seed: int = 0) -> Any:
    """The module of a task, drawn from the seed."""
    with fixed_global_state(seed):
        return task.module()
