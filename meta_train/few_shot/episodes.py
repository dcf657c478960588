"""Few-shot tasks: a learner, and episodes with examples to learn from and examples to be judged by."""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from learned_optim.meta_train.tasks import Batch, Split, Task

Examples = tuple[Tensor, Tensor]
"""Inputs ``(B, n, ...)`` and targets ``(B, n, ...)`` of B tasks."""


class Episodes(NamedTuple):
    """B tasks, drawn together."""

    support: Examples
    """Examples that the learner is adapted on."""
    query: Examples
    """Examples that the adapted learner is judged by."""
    classes: Tensor | None = None
    """Number, among all classes of the split, that each label stands for, ``(B, ways)``; None: no classification."""

    def to(self, device: torch.device) -> "Episodes":
        """These episodes on ``device``."""
        moved: Episodes = tree_map(lambda part: None if part is None else part.to(device), self)
        return moved


class FewShotTask(Task):
    """A distribution over small tasks that one learner is adapted to. Sub-classes are frozen dataclasses.

    The learner is :meth:`module`. Batch norm in it must do without running statistics: they are part of no task.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # a misspelt option in a configuration is an error

    evaluation_queries: int
    """Query examples of an episode (of a class, in classification) in evaluations."""

    @property
    def ways(self) -> int | None:
        """Number of classes of an episode; None: regression."""
        return None

    @property
    def training_classes(self) -> int:
        """Number of all classes of meta-training; 0: regression."""
        return 0

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of one example, which users' examples are checked against; None: not known."""
        return None

    @property
    @abstractmethod
    def features(self) -> int:
        """Size of what :meth:`embedding` returns for an example."""

    @property
    def outputs(self) -> int:
        """Size of a prediction."""
        return 1 if self.ways is None else self.ways

    @abstractmethod
    def embedding(self) -> nn.Sequential:
        """The learner without its last layer, freshly initialised."""

    def module(self) -> nn.Module:
        """The learner: the embedding and a linear layer."""
        return nn.Sequential(*self.embedding(), nn.Linear(self.features, self.outputs))

    @abstractmethod
    def episodes(
        self, count: int, generator: torch.Generator, split: Split = "train", queries: int | None = None
    ) -> Episodes:
        """Draw ``count`` tasks. ``queries``: as :attr:`evaluation_queries`; None: as in meta-training."""

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """The examples of as many tasks to learn from."""
        return self.episodes(instances, generator).support

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of one learner on its examples."""
        inputs, targets = batch
        return self.losses(module(inputs)[None], targets[None])[0]

    def losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of B learners, ``(B,)``.

        Cross-entropy in nats of ``(B, n, ways)`` and labels ``(B, n)``, or squared error of ``(B, n, outputs)``.
        """
        if self.ways is None:
            return (predictions - targets).square().flatten(1).mean(1)
        each = F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(targets.shape).mean(1)
