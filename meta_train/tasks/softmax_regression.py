"""Softmax regression: convex, on images or on Gaussian classes whose features may be badly scaled."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Batch, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.classification import ClassificationTask
from learned_optim.meta_train.tasks.mlp import image_rows, restriction
from learned_optim.meta_train.tasks.sampling import check_not_negative, check_range, log_uniform, log_uniform_integer


@dataclass(frozen=True)
class SoftmaxRegressionFamily(TaskFamily):
    """One linear layer and a softmax. Ranges ``(low, high)`` are drawn log-uniformly for every task.

    Args:
        dataset: "gaussian", drawn afresh for every task, so that all splits are disjoint; or images: "mnist",
            "cifar10", "digits" ("fashion-mnist" is for evaluation only: configurations refuse it).
        image_size: images are averaged down to this many pixels a side; None keeps them.
        dimensions: range of the number of features of the Gaussian data.
        classes: range of the number of classes of the Gaussian data, at least 2.
        rows: range of the number of rows of the Gaussian data.
        separation: range of the standard deviation of the centres of the classes of the Gaussian data; each class has
            the deviation 1 around its centre.
        condition: range of the squared ratio of the largest to the smallest scale of a feature of the Gaussian data.
        batch_size: range of the mini-batch size.
        weight_decay: the loss has ``weight_decay / 2`` times the squared weights.
        initial_deviation: standard deviation of the initial weights; biases start at 0.
    """

    dataset: Literal["gaussian", "mnist", "cifar10", "digits", "fashion-mnist"] = "gaussian"
    image_size: int | None = None
    dimensions: tuple[int, int] = (2, 50)
    classes: tuple[int, int] = (2, 10)
    rows: tuple[int, int] = (200, 1000)
    separation: tuple[float, float] = (0.3, 3.0)
    condition: tuple[float, float] = (1.0, 1.0)
    batch_size: tuple[int, int] = (16, 128)
    weight_decay: float = 0.0
    initial_deviation: float = 0.01

    def __post_init__(self) -> None:
        check_range("dimensions", self.dimensions, 1)
        check_range("classes", self.classes, 2)
        check_range("rows", self.rows, 2)
        check_range("separation", self.separation, 0, included=False)
        check_range("condition", self.condition, 1)
        check_range("batch_size", self.batch_size, 1)
        check_not_negative(weight_decay=self.weight_decay, initial_deviation=self.initial_deviation)

    @property
    def evaluation_only(self) -> str:
        """The restriction on the data set's use, if there is one."""
        return "" if self.dataset == "gaussian" else restriction(self.dataset)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw the data, or for images the batch size alone; ``split`` chooses the images."""
        if self.dataset == "gaussian":
            data = gaussian_classes(
                rng,
                log_uniform_integer(rng, self.rows),
                log_uniform_integer(rng, self.dimensions),
                log_uniform_integer(rng, self.classes),
                log_uniform(rng, self.separation),
                log_uniform(rng, self.condition),
            )
        else:
            data = image_rows(self.dataset, split, self.image_size)
        batch_size = log_uniform_integer(rng, self.batch_size)
        return SoftmaxRegressionTask(data, batch_size, self.weight_decay, self.initial_deviation)


class SoftmaxRegressionTask(ClassificationTask):
    """Linear layers on one data set."""

    same_operations = True

    def __init__(
        self, data: tuple[Tensor, Tensor], batch_size: int, weight_decay: float, initial_deviation: float
    ) -> None:
        super().__init__(data, batch_size)
        self.weight_decay, self.initial_deviation = weight_decay, initial_deviation

    def module(self) -> nn.Module:
        """A linear layer."""
        layer = nn.Linear(self.data[0].shape[1], self.classes)
        nn.init.normal_(layer.weight, std=self.initial_deviation)
        nn.init.zeros_(layer.bias)
        return layer

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy, in nats, and the penalty of the weights."""
        assert isinstance(module, nn.Linear)
        return super().loss(module, batch) + 0.5 * self.weight_decay * module.weight.square().sum()


def gaussian_classes(
    rng: np.random.Generator, rows: int, dimensions: int, classes: int, separation: float, condition: float
) -> tuple[Tensor, Tensor]:
    """Features ``(rows, dimensions)`` around the centre of each one's class, in float32, and labels ``(rows,)``.

    Scales of the features run geometrically from 1 down to 1/sqrt(condition). Every class has a row.
    """
    labels = rng.permutation(np.arange(max(rows, classes)) % classes)
    centres = separation * rng.standard_normal((classes, dimensions))
    scales = np.logspace(0, -0.5 * math.log10(condition), dimensions)
    features = scales * (centres[labels] + rng.standard_normal((len(labels), dimensions)))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)
