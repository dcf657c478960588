"""Families that no rule can be meta-trained on, each for one reason."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.tasks import Batch, Split, Task, TaskFamily

Fault = Literal[
    "none", "nan", "zero", "negative", "parameters", "module", "first dimension", "batches", "constant", "code"
]


class OddTask(Task):
    """Linear regression with a fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.modules = self.batches = 0

    def module(self) -> nn.Module:
        self.modules += 1
        if self.fault == "parameters":
            return nn.Identity()
        return nn.Linear(3, self.modules if self.fault == "module" else 1)

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        self.batches += 1
        rows = 3 + self.batches if self.fault == "batches" else 4
        shape = (rows, 3) if self.fault == "first dimension" else (instances, rows, 3)
        return torch.randn(shape, generator=generator)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        if self.fault == "code":
            raise KeyError("targets")
        error: Tensor = (module(batch) - batch.sum(-1, keepdim=True)).square().mean()
        factor = {"nan": math.nan, "zero": 0.0, "negative": -1.0}.get(self.fault, 1.0)
        if self.fault == "constant":
            error = batch.square().mean() + 0 * error
        loss: Tensor = factor * error
        return loss


@dataclass(frozen=True)
class OddFamily(TaskFamily):
    """Tasks with one fault."""

    fault: Fault = "none"

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        return OddTask(self.fault)
