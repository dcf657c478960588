"""Autoencoders of small images: perceptrons that squeeze a picture through a few numbers and draw it again."""

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Batch, DataTask, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.mlp import ACTIVATIONS, Activation, image_rows, restriction, scale_parameters
from learned_optim.meta_train.tasks.sampling import (
    check_choices,
    check_range,
    choose,
    log_uniform,
    log_uniform_integer,
)

LOSSES = ("squared", "cross-entropy")


@dataclass(frozen=True)
class AutoencoderFamily(TaskFamily):
    """Perceptrons whose decoder is the mirror image of the encoder, with PyTorch's initialisation.

    Ranges ``(low, high)`` are drawn for every task: sizes log-uniformly, layers uniformly.

    Args:
        dataset: "mnist", "cifar10" or "digits" ("fashion-mnist" is for evaluation only: configurations refuse it).
        image_size: images are averaged down to this many pixels a side; None keeps them.
        layers: range of the number of hidden layers between image and code, and between code and image.
        width: range of the units of each of these; the decoder has the encoder's.
        code: range of the number of units in the middle.
        activations: one is drawn, for all layers but code and output.
        losses: one is drawn. "squared": mean squared error of a pixel; "cross-entropy": with a sigmoid as the last
            step, in nats a pixel.
        batch_size: range of the mini-batch size.
        gain: range of the factor on the initial parameters.
    """

    dataset: Literal["mnist", "cifar10", "digits", "fashion-mnist"] = "mnist"
    image_size: int | None = None
    layers: tuple[int, int] = (1, 1)
    width: tuple[int, int] = (32, 128)
    code: tuple[int, int] = (4, 32)
    activations: tuple[Activation, ...] = ("relu",)
    losses: tuple[Literal["squared", "cross-entropy"], ...] = ("squared",)
    batch_size: tuple[int, int] = (32, 128)
    gain: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        check_range("layers", self.layers, 0)
        check_range("width", self.width, 1)
        check_range("code", self.code, 1)
        check_range("batch_size", self.batch_size, 1)
        check_range("gain", self.gain, 0, included=False)
        check_choices("activations", self.activations, ACTIVATIONS)
        check_choices("losses", self.losses, LOSSES)

    @property
    def evaluation_only(self) -> str:
        """The restriction on the data set's use, if there is one."""
        return restriction(self.dataset)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw an architecture; ``split`` chooses the images."""
        layers = int(rng.integers(self.layers[0], self.layers[1] + 1))
        return AutoencoderTask(
            image_rows(self.dataset, split, self.image_size)[0],
            log_uniform_integer(rng, self.batch_size),
            widths=[log_uniform_integer(rng, self.width) for _ in range(layers)],
            code=log_uniform_integer(rng, self.code),
            activation=choose(rng, self.activations),
            loss=choose(rng, self.losses),
            gain=log_uniform(rng, self.gain),
        )


class AutoencoderTask(DataTask):
    """Autoencoders of one architecture.

    Args:
        images: rows of pixels in 0..1, ``(images, pixels)``.
        batch_size: images of a batch.
        widths: widths of the encoder's hidden layers.
        code: units in the middle.
        activation: a name of :data:`~learned_optim.meta_train.tasks.mlp.ACTIVATIONS`.
        loss: one of :data:`LOSSES`.
        gain: factor on the initial parameters.
    """

    same_operations = True

    def __init__(
        self, images: Tensor, batch_size: int, widths: list[int], code: int, activation: str, loss: str, gain: float
    ) -> None:
        super().__init__((images,), batch_size)
        self.widths, self.code, self.activation, self.loss_name, self.gain = widths, code, activation, loss, gain

    def module(self) -> nn.Module:
        """Encoder and decoder, one after the other."""
        pixels = self.data[0].shape[1]
        sizes = [pixels, *self.widths, self.code, *reversed(self.widths), pixels]
        linear_after = (len(self.widths), len(sizes) - 2)  # code and output
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            layers.append(nn.Linear(inputs, outputs))
            if index not in linear_after:
                layers.append(ACTIVATIONS[self.activation]())
        return scale_parameters(nn.Sequential(*layers), self.gain)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean over pixels and images."""
        (images,) = batch
        if self.loss_name == "squared":
            return F.mse_loss(module(images), images)
        return F.binary_cross_entropy_with_logits(module(images), images)
