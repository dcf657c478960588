"""Small residual perceptrons, normalised before or after each block, that classify images."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Split, Task, TaskFamily
from learned_optim.meta_train.tasks.classification import ClassificationTask
from learned_optim.meta_train.tasks.conv_net import NORMS
from learned_optim.meta_train.tasks.mlp import ACTIVATIONS, Activation, image_rows, restriction, scale_parameters
from learned_optim.meta_train.tasks.sampling import (
    check_choices,
    check_range,
    choose,
    log_uniform,
    log_uniform_integer,
)

PLACES = ("pre", "post")


@dataclass(frozen=True)
class ResidualFamily(TaskFamily):
    """A linear layer, residual blocks ``x + V act(U x)``, and a linear layer to the logits (He et al. 2016).

    Ranges ``(low, high)`` are drawn for every task: sizes log-uniformly, blocks uniformly; PyTorch's initialisation.

    Args:
        dataset: "mnist", "cifar10" or "digits" ("fashion-mnist" is for evaluation only: configurations refuse it).
        image_size: images are averaged down to this many pixels a side; None keeps them.
        blocks: range of the number of residual blocks.
        width: range of the units of the residual stream.
        hidden: range of the units inside a block.
        activations: one is drawn.
        norms: "none", "layer" or "batch" (with the statistics of the batch); one is drawn.
        places: one is drawn. "pre": norm(x) enters each block, and another norm stands before the logits; "post": the
            norm of the sum leaves it.
        batch_size: range of the mini-batch size, at least 2, which batch norm needs.
        gain: range of the factor on the initial parameters, those of the norms apart.
    """

    dataset: Literal["mnist", "cifar10", "digits", "fashion-mnist"] = "mnist"
    image_size: int | None = None
    blocks: tuple[int, int] = (1, 4)
    width: tuple[int, int] = (16, 64)
    hidden: tuple[int, int] = (16, 64)
    activations: tuple[Activation, ...] = ("relu",)
    norms: tuple[Literal["none", "layer", "batch"], ...] = ("layer",)
    places: tuple[Literal["pre", "post"], ...] = ("pre",)
    batch_size: tuple[int, int] = (32, 128)
    gain: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        check_range("blocks", self.blocks, 1)
        check_range("width", self.width, 1)
        check_range("hidden", self.hidden, 1)
        check_range("batch_size", self.batch_size, 2)
        check_range("gain", self.gain, 0, included=False)
        check_choices("activations", self.activations, ACTIVATIONS)
        check_choices("norms", self.norms, NORMS)
        check_choices("places", self.places, PLACES)

    @property
    def evaluation_only(self) -> str:
        """The restriction on the data set's use, if there is one."""
        return restriction(self.dataset)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw an architecture; ``split`` chooses the images."""
        return ResidualTask(
            image_rows(self.dataset, split, self.image_size),
            log_uniform_integer(rng, self.batch_size),
            blocks=int(rng.integers(self.blocks[0], self.blocks[1] + 1)),
            width=log_uniform_integer(rng, self.width),
            hidden=log_uniform_integer(rng, self.hidden),
            activation=choose(rng, self.activations),
            norm=choose(rng, self.norms),
            place=choose(rng, self.places),
            gain=log_uniform(rng, self.gain),
        )


class ResidualTask(ClassificationTask):
    """Residual perceptrons of one architecture on one data set; the options are those of the family."""

    def __init__(
        self,
        images_and_labels: tuple[Tensor, Tensor],
        batch_size: int,
        blocks: int,
        width: int,
        hidden: int,
        activation: str,
        norm: str,
        place: str,
        gain: float,
    ) -> None:
        super().__init__(images_and_labels, batch_size)
        self.blocks, self.width, self.hidden, self.gain = blocks, width, hidden, gain
        self.activation, self.norm, self.place = activation, norm, place

    def module(self) -> nn.Module:
        """A residual perceptron with fresh weights."""
        blocks = [
            ResidualBlock(self.width, self.hidden, self.activation, self.norm, self.place) for _ in range(self.blocks)
        ]
        last = normalization(self.norm, self.width) if self.place == "pre" else nn.Identity()
        network = nn.Sequential(
            nn.Linear(self.data[0].shape[1], self.width), *blocks, last, nn.Linear(self.width, self.classes)
        )
        return scale_parameters(network, self.gain)


class ResidualBlock(nn.Module):
    """``x + V act(U norm(x))`` or ``norm(x + V act(U x))``."""

    def __init__(self, width: int, hidden: int, activation: str, norm: str, place: str) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, width))
        self.norm, self.pre = normalization(norm, width), place == "pre"

    def forward(self, stream: Tensor) -> Tensor:
        """``(batch, width)`` to the same."""
        if self.pre:
            stream = stream + self.branch(self.norm(stream))
        else:
            stream = self.norm(stream + self.branch(stream))
        return stream


def normalization(name: str, width: int) -> nn.Module:
    """A module of one of :data:`NORMS`; batch norm keeps no running statistics, which vectorised tasks would share."""
    if name == "layer":
        return nn.LayerNorm(width)
    return nn.BatchNorm1d(width, track_running_stats=False) if name == "batch" else nn.Identity()
