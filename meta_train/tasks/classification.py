"""The base of all tasks that classify rows of a data set."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Batch, DataTask


class ClassificationTask(DataTask):
    """A module from inputs to logits; labels run from 0 to ``classes - 1``.

    Args:
        data: inputs ``(rows, ...)`` and labels ``(rows,)``.
        batch_size: rows of a batch.
    """

    def __init__(self, data: tuple[Tensor, Tensor], batch_size: int) -> None:
        super().__init__(data, batch_size)
        self.classes = int(data[1].max()) + 1

    @property
    def loss_bound(self) -> float:
        """Half as much again as that of a network that finds all classes equally likely."""
        return 1.5 * math.log(self.classes)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy, in nats."""
        inputs, labels = batch
        return F.cross_entropy(module(inputs), labels)

    def accuracy(self, module: nn.Module, batch: Batch) -> Tensor:
        """Share of rows whose largest logit is that of their label."""
        inputs, labels = batch
        right: Tensor = module(inputs).argmax(-1) == labels
        return right.float().mean()
