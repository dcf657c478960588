"""Random changes to the tasks of any family: scale of the loss, noise in the labels, size of the mini-batches."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Batch, DataTask, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.sampling import check_range, log_uniform, log_uniform_integer


@dataclass(frozen=True)
class Augmentation:
    """Random changes to tasks; each range ``(low, high)`` is drawn for every task. The defaults change nothing.

    Parameters are rescaled by the trainer (``unroll.rescale``), since that is no matter of the task.

    Args:
        loss_factor: range of a factor on the loss, drawn log-uniformly: optimizers are to ignore its scale.
        label_noise: range of the probability that a row's labels are those of a random row instead, at every step anew.
        batch_size: range of the rows of a mini-batch, drawn log-uniformly; None: the family's own.
        rows: range of the rows of data that there are, drawn log-uniformly, the rows at random; None: all.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    loss_factor: tuple[float, float] = (1.0, 1.0)
    label_noise: tuple[float, float] = (0.0, 0.0)
    batch_size: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_range("loss_factor", self.loss_factor, 0, included=False)
        check_range("label_noise", self.label_noise, 0)
        if self.label_noise[1] > 1:
            raise ValueError(f"label_noise is a probability, got {list(self.label_noise)}")
        if self.batch_size is not None:
            check_range("batch_size", self.batch_size, 1)
        if self.rows is not None:
            check_range("rows", self.rows, 1)

    def of(self, family: TaskFamily) -> TaskFamily:
        """The family with these changes; the family itself if there are none."""
        return family if self == Augmentation() else AugmentedFamily(family, self)


@dataclass(frozen=True)
class AugmentedFamily(TaskFamily):
    """A family whose tasks are changed at random, in every split."""

    family: TaskFamily
    augmentation: Augmentation

    @property
    def evaluation_only(self) -> str:
        """The family's."""
        return self.family.evaluation_only

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw a task, then what is changed.

        Raises:
            ValueError: the task has no labels or no mini-batches, and these are to be changed.
        """
        task = self.family.sample(rng, split)
        loss_factor = log_uniform(rng, self.augmentation.loss_factor)
        label_noise = float(rng.uniform(*self.augmentation.label_noise))
        if self.augmentation.batch_size is not None:
            if not hasattr(task, "batch_size"):
                raise ValueError(f"augment.batch_size: {type(task).__name__} has no mini-batches")
            task = copy.copy(task)
            task.batch_size = log_uniform_integer(rng, self.augmentation.batch_size)
        if self.augmentation.rows is not None:
            task = with_rows(task, log_uniform_integer(rng, self.augmentation.rows), rng)
        if label_noise and not (isinstance(task, DataTask) and len(task.data) > 1):
            raise ValueError(f"augment.label_noise: {type(task).__name__} has no labels")
        return AugmentedTask(task, loss_factor, label_noise)


def with_rows(task: Task, count: int, rng: np.random.Generator) -> Task:
    """A task of data with so many of its rows, drawn at random; all of them where there are fewer.

    Raises:
        ValueError: the task has no rows of data.
    """
    if not isinstance(task, DataTask):
        raise ValueError(f"augment.rows: {type(task).__name__} has no rows of data")
    rows = torch.from_numpy(rng.permutation(len(task.data[0]))[:count])
    task = copy.copy(task)
    task.data = tuple(tensor[rows] for tensor in task.data)
    return task


class AugmentedTask(Task):
    """A task with another scale of the loss and noise in its labels.

    Args:
        task: the task; for noise a :class:`DataTask` whose last tensor holds the labels.
        loss_factor: factor on the loss.
        label_noise: probability that a row's labels are replaced.
    """

    def __init__(self, task: Task, loss_factor: float, label_noise: float) -> None:
        self.task, self.loss_factor, self.label_noise = task, loss_factor, label_noise

    @property
    def loss_bound(self) -> float | None:
        """The task's, times the factor."""
        bound = self.task.loss_bound
        return None if bound is None else self.loss_factor * bound

    def hold_out(self) -> tuple[Task, Task]:
        """The task's parts; labels that tell how well it generalises are left as they are."""
        inner, outer = self.task.hold_out()
        return (
            AugmentedTask(inner, self.loss_factor, self.label_noise),
            AugmentedTask(outer, self.loss_factor, label_noise=0.0),
        )

    def module(self) -> nn.Module:
        """The task's."""
        return self.task.module()

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """The task's, some labels replaced by those of rows drawn from all the data."""
        batch = self.task.batch(instances, generator)
        if not self.label_noise:
            return batch
        assert isinstance(self.task, DataTask)
        *inputs, labels = batch
        every_label = self.task.data[-1]
        replaced = torch.rand(labels.shape[:2], generator=generator) < self.label_noise
        rows = torch.randint(len(every_label), (int(replaced.sum()),), generator=generator)
        labels = labels.index_put((replaced,), every_label[rows])
        return (*inputs, labels)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The task's, times the factor."""
        return self.loss_factor * self.task.loss(module, batch)

    def accuracy(self, module: nn.Module, batch: Batch) -> Tensor | float | None:
        """The task's."""
        return self.task.accuracy(module, batch)
