"""Tasks: an ordinary ``nn.Module``, a stream of batches and a loss."""

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

Split = Literal["train", "validation", "test"]
"""A part of the data, and so of the distribution over tasks."""

Batch = Any
"""Whatever one inner step needs: a tensor, or a nest of tuples and dicts of tensors."""


class Task(ABC):
    """One kind of optimizee. Many *instances* of it, each with parameters of its own, are trained side by side."""

    same_operations: ClassVar[bool] = False
    """Whether :meth:`loss` does the same operations in every call, whatever the values are, without counters or
    Python's random numbers. Saying so makes trainings of small models faster: they record the operations once."""

    @abstractmethod
    def module(self) -> nn.Module:
        """A freshly initialised module, drawn with torch's global random state (which the caller seeds).

        All calls return the same architecture. Buffers may hold a random problem, such as a quadratic's matrix.
        """

    @abstractmethod
    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """Data of one inner step for every instance: each tensor has the shape ``(instances, ...)``."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Loss of *one* instance on its own batch, a 0-d tensor. It is vectorised by ``torch.func.vmap``."""

    def accuracy(self, module: nn.Module, batch: Batch) -> Tensor | float | None:
        """Share of right predictions of one instance on its batch, in 0..1; None where no classes are predicted.

        Benchmarks show it on data held out. Nothing is trained by it.
        """
        return None

    @property
    def loss_bound(self) -> float | None:
        """The loss above which it no longer matters how high it is; None: relative to the initial loss."""
        return None

    def hold_out(self) -> "tuple[Task, Task]":
        """This task on two disjoint parts of its data: to train on, and to tell how well that generalises.

        Where the data are an endless stream, both may be the task itself.

        Raises:
            ValueError: this task has no such parts.
        """
        raise ValueError(f"{type(self).__name__} holds no data out: define hold_out(), or take training batches")


class TaskFamily(ABC):
    """A distribution over tasks. Sub-classes are frozen dataclasses whose fields are the options of a configuration."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # a misspelt option in a configuration is an error

    @property
    def evaluation_only(self) -> str:
        """Why nothing may be meta-trained on this family, with its options; empty if it may."""
        return ""

    @abstractmethod
    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw a task: architecture, batch size and other choices. ``split`` says from which part of the data."""


HELD_OUT_SHARE = 0.2  # of the rows: enough to see overfitting, and training hardly notices


class DataTask(Task):
    """A task on a data set held in memory: batches are drawn uniformly, with replacement.

    Held out (see :meth:`Task.hold_out`) is the last fifth of the rows.

    Args:
        data: tensors with the same first dimension; a batch holds ``batch_size`` rows of each.
        batch_size: rows of a batch.
    """

    def __init__(self, data: tuple[Tensor, ...], batch_size: int) -> None:
        self.data = data
        self.batch_size = batch_size

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """Rows drawn independently for every instance."""
        shape = (instances, self.batch_size)
        rows = torch.randint(len(self.data[0]), shape, generator=generator).flatten()
        return tuple(tensor.index_select(0, rows).unflatten(0, shape) for tensor in self.data)

    def hold_out(self) -> tuple[Task, Task]:
        """Views of the first four fifths of the rows, and of the last."""
        kept = round((1 - HELD_OUT_SHARE) * len(self.data[0]))
        inner, outer = copy.copy(self), copy.copy(self)
        inner.data = tuple(tensor[:kept] for tensor in self.data)
        outer.data = tuple(tensor[kept:] for tensor in self.data)
        return inner, outer
