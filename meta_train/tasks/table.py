"""Small tables: perceptrons that predict a number or a class from a few columns, as most people's first models do."""

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Batch, DataTask, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.mlp import ACTIVATIONS, Activation, scale_parameters
from learned_optim.meta_train.tasks.sampling import (
    check_choices,
    check_range,
    choose,
    log_uniform,
    log_uniform_integer,
)

Table = Literal["diabetes", "cancer", "wine", "friedman"]
SPLIT_RANGES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""Share of the rows, after they were shuffled once, at which each split begins and ends."""
FRIEDMAN_ROWS, FRIEDMAN_NOISE = 1000, 1.0


@dataclass(frozen=True)
class TableFamily(TaskFamily):
    """Predict the target of a table by a perceptron with PyTorch's initialisation.

    The tables come with scikit-learn. "diabetes" (442 rows, 10 columns) and "friedman" (1,000 drawn rows, 10 columns;
    Friedman 1991) have numbers as targets, and the loss is the mean squared error in units of their variance; "cancer"
    (569, 30) and "wine" (178, 13) have classes, and the loss is the cross-entropy. Columns and numbers are scaled to
    mean zero and variance one over the whole table. Ranges ``(low, high)`` are drawn for every task: sizes
    log-uniformly, layers uniformly.

    Args:
        table: one of the four.
        layers: range of the number of hidden layers.
        width: range of the units of each hidden layer.
        activations: one is drawn.
        batch_size: range of the mini-batch size.
        gain: range of the factor on the initial parameters.
    """

    table: Table = "diabetes"
    layers: tuple[int, int] = (1, 2)
    width: tuple[int, int] = (32, 64)
    activations: tuple[Activation, ...] = ("relu",)
    batch_size: tuple[int, int] = (32, 32)
    gain: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        check_range("layers", self.layers, 0)
        check_range("width", self.width, 1)
        check_range("batch_size", self.batch_size, 1)
        check_range("gain", self.gain, 0, included=False)
        check_choices("activations", self.activations, ACTIVATIONS)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw an architecture; ``split`` chooses the rows."""
        columns, targets = rows(self.table)
        first, last = (round(share * len(columns)) for share in SPLIT_RANGES[split])
        classes = 0 if targets.is_floating_point() else int(targets.max()) + 1  # of the whole table
        layers = int(rng.integers(self.layers[0], self.layers[1] + 1))
        return TableTask(
            (columns[first:last], targets[first:last]),
            log_uniform_integer(rng, self.batch_size),
            classes=classes,
            widths=[log_uniform_integer(rng, self.width) for _ in range(layers)],
            activation=choose(rng, self.activations),
            gain=log_uniform(rng, self.gain),
        )


class TableTask(DataTask):
    """Perceptrons of one architecture on one table.

    Args:
        data: columns ``(rows, columns)``, and numbers or classes ``(rows,)``.
        batch_size: rows of a batch.
        classes: how many there are; 0 if the targets are numbers.
        widths: widths of the hidden layers.
        activation: a name of :data:`~learned_optim.meta_train.tasks.mlp.ACTIVATIONS`.
        gain: factor on the initial parameters.
    """

    same_operations = True

    def __init__(
        self,
        data: tuple[Tensor, Tensor],
        batch_size: int,
        *,
        classes: int,
        widths: list[int],
        activation: str,
        gain: float,
    ) -> None:
        super().__init__(data, batch_size)
        self.classes, self.widths, self.activation, self.gain = classes, widths, activation, gain

    def module(self) -> nn.Module:
        """A perceptron with fresh weights."""
        layers: list[nn.Module] = []
        sizes = [self.data[0].shape[1], *self.widths]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), ACTIVATIONS[self.activation]()]
        return scale_parameters(nn.Sequential(*layers, nn.Linear(sizes[-1], max(1, self.classes))), self.gain)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error, or mean cross-entropy in nats."""
        columns, targets = batch
        outputs = module(columns)
        return F.cross_entropy(outputs, targets) if self.classes else F.mse_loss(outputs[:, 0], targets)

    def accuracy(self, module: nn.Module, batch: Batch) -> Tensor | None:
        """Share of rows whose largest logit is that of their class; None if the targets are numbers."""
        columns, targets = batch
        right: Tensor = module(columns).argmax(-1) == targets
        return right.float().mean() if self.classes else None


@functools.cache
def rows(table: Table) -> tuple[Tensor, Tensor]:
    """Columns ``(rows, columns)`` and targets ``(rows,)`` of a table, scaled, in an order that is always the same.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"table {table!r} comes with scikit-learn, which is not installed; run 'pip install learned-optim[demo]'"
        ) from error
    if table == "friedman":
        columns, targets = datasets.make_friedman1(FRIEDMAN_ROWS, noise=FRIEDMAN_NOISE, random_state=0)
    else:
        load = {"diabetes": datasets.load_diabetes, "cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}
        columns, targets = load[table](return_X_y=True)
    order = np.random.default_rng(0).permutation(len(columns))
    columns, targets = columns[order], targets[order]
    scaled = torch.tensor((columns - columns.mean(0)) / columns.std(0), dtype=torch.float32)
    if np.issubdtype(targets.dtype, np.integer):
        return scaled, torch.tensor(targets, dtype=torch.int64)
    return scaled, torch.tensor((targets - targets.mean()) / targets.std(), dtype=torch.float32)
