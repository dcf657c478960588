"""Convolutional networks that classify small images: the CIFAR-10 network of the 2016 paper, and random ones."""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.data.readers import CLASSES
from learned_optim.meta_train.tasks.base import Split, Task, TaskFamily
from learned_optim.meta_train.tasks.classification import ClassificationTask
from learned_optim.meta_train.tasks.mlp import ACTIVATIONS, Activation, restriction
from learned_optim.meta_train.tasks.sampling import check_range, log_uniform, log_uniform_integer

Norm = Literal["none", "batch", "layer"]
NORMS: tuple[str, ...] = ("none", "batch", "layer")
SMALLEST_IMAGE, LARGEST_IMAGE = 8, 32  # pixels a side


@dataclass(frozen=True)
class ConvNetFamily(TaskFamily):
    """Classify images by a convolutional network.

    The defaults are the network for CIFAR-10 of Andrychowicz et al. 2016, section 3.3: three convolutions 5 x 5 of 16
    channels, each with batch norm, ReLU and 2 x 2 max-pooling, then 32 hidden units with batch norm and ReLU, then the
    logits; PyTorch's initial weights. Ranges ``(low, high)`` are drawn for every task: sizes log-uniformly, layers
    uniformly. Convolutions keep the size of the image, pooling halves it (rounded down) as long as it is above 1.

    Args:
        dataset: "cifar10", "mnist" or "digits" ("fashion-mnist" is for evaluation only: configurations refuse it).
        classes: labels to keep, renumbered from 0 in this order; None keeps all. CIFAR-5 and CIFAR-2 of the paper are
            subsets of five and two.
        examples: images that are drawn from the split for every task, without replacement; None takes all. With few, a
            network can overfit within the horizon, and training and validation loss part.
        image_size: range of the pixels a side, 8 to 32, to which images are averaged down; None keeps them.
        layers: range of the number of convolutions.
        channels: range of the channels of all convolutions.
        kernel_sizes: odd sizes, of which one is drawn.
        hidden: range of the units of the hidden layer behind the convolutions; None: no such layer.
        activations: one is drawn.
        norms: one is drawn. "batch" takes the statistics of each batch (nothing is averaged for later), "layer" those
            of all channels and pixels of each image.
        batch_size: range of the mini-batch size, at least 2.
        gain: range of the factor on the initial weights of convolutions and linear layers.
    """

    dataset: Literal["cifar10", "mnist", "digits", "fashion-mnist"] = "cifar10"
    classes: tuple[int, ...] | None = None
    examples: int | None = None
    image_size: tuple[int, int] | None = None
    layers: tuple[int, int] = (3, 3)
    channels: tuple[int, int] = (16, 16)
    kernel_sizes: tuple[int, ...] = (5,)
    hidden: tuple[int, int] | None = (32, 32)
    activations: tuple[Activation, ...] = ("relu",)
    norms: tuple[Norm, ...] = ("batch",)
    batch_size: tuple[int, int] = (128, 128)
    gain: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        check_range("layers", self.layers, 1)
        check_range("channels", self.channels, 1)
        check_range("batch_size", self.batch_size, 2)
        check_range("gain", self.gain, 0, included=False)
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"examples must be at least 1, got {self.examples}")
        if self.hidden is not None:
            check_range("hidden", self.hidden, 1)
        if self.image_size is not None:
            check_range("image_size", self.image_size, SMALLEST_IMAGE)
            if self.image_size[1] > LARGEST_IMAGE:
                raise ValueError(f"image_size must be at most {LARGEST_IMAGE}, got {list(self.image_size)}")
        if not self.kernel_sizes or any(size < 1 or size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd numbers, got {list(self.kernel_sizes)}")
        for name, chosen, known in (
            ("activations", self.activations, tuple(ACTIVATIONS)),
            ("norms", self.norms, NORMS),
        ):
            if not chosen or any(value not in known for value in chosen):
                raise ValueError(f"{name} must be some of {', '.join(known)}, got {list(chosen)}")
        if self.classes is not None:
            distinct = len(set(self.classes)) == len(self.classes) >= 2
            if not distinct or any(not 0 <= label < CLASSES for label in self.classes):
                raise ValueError(
                    f"classes must be two or more different labels in 0..{CLASSES - 1}, got {list(self.classes)}"
                )

    @property
    def evaluation_only(self) -> str:
        """The restriction on the data set's use, if there is one."""
        return restriction(self.dataset)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw an architecture; ``split`` chooses the images."""
        image_size = None if self.image_size is None else log_uniform_integer(rng, self.image_size)
        pixels, labels = images(self.dataset, split, image_size, self.classes)
        if self.examples is not None and self.examples < len(labels):
            rows = torch.from_numpy(rng.choice(len(labels), self.examples, replace=False))
            pixels, labels = pixels[rows], labels[rows]
        return ConvNetTask(
            (pixels, labels),
            classes=CLASSES if self.classes is None else len(self.classes),
            batch_size=log_uniform_integer(rng, self.batch_size),
            channels=[log_uniform_integer(rng, self.channels)] * int(rng.integers(*self.layers, endpoint=True)),
            kernel_size=self.kernel_sizes[int(rng.integers(len(self.kernel_sizes)))],
            hidden=None if self.hidden is None else log_uniform_integer(rng, self.hidden),
            activation=self.activations[int(rng.integers(len(self.activations)))],
            norm=self.norms[int(rng.integers(len(self.norms)))],
            gain=log_uniform(rng, self.gain),
        )


class ConvNetTask(ClassificationTask):
    """Convolutional networks of one architecture on one data set: ``(images, channels, size, size)`` and labels."""

    def __init__(
        self,
        images_and_labels: tuple[Tensor, Tensor],
        classes: int,
        batch_size: int,
        channels: list[int],
        kernel_size: int,
        hidden: int | None,
        activation: str,
        norm: str,
        gain: float,
    ) -> None:
        super().__init__(images_and_labels, batch_size)
        self.classes, self.channels, self.kernel_size, self.hidden = classes, channels, kernel_size, hidden
        self.activation, self.norm, self.gain = activation, norm, gain

    def module(self) -> nn.Module:
        """A network with fresh weights."""
        _, inputs, _, size = self.data[0].shape
        layers: list[nn.Module] = []
        for outputs in self.channels:
            # A bias would be taken out by the norm.
            padding, bias = self.kernel_size // 2, self.norm == "none"
            layers.append(nn.Conv2d(inputs, outputs, self.kernel_size, padding=padding, bias=bias))
            layers += [*self._norm(outputs, images=True), ACTIVATIONS[self.activation]()]
            if size > 1:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            inputs = outputs
        layers.append(nn.Flatten())
        features = inputs * size**2
        if self.hidden is not None:
            layers.append(nn.Linear(features, self.hidden, bias=self.norm == "none"))
            layers += [*self._norm(self.hidden, images=False), ACTIVATIONS[self.activation]()]
            features = self.hidden
        layers.append(nn.Linear(features, self.classes))
        with torch.no_grad():
            for layer in layers:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    for parameter in layer.parameters():
                        parameter.mul_(self.gain)
        return nn.Sequential(*layers)

    def _norm(self, features: int, *, images: bool) -> list[nn.Module]:
        if self.norm == "batch":  # running averages would be written to, which nothing here reads
            kind = nn.BatchNorm2d if images else nn.BatchNorm1d
            return [kind(features, track_running_stats=False)]
        return [nn.GroupNorm(1, features)] if self.norm == "layer" else []


@functools.lru_cache(maxsize=8)  # by size and split: 500 MB each for all of CIFAR-10 at 32 pixels a side
def images(
    dataset: str, split: Split, image_size: int | None, classes: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Images as floats in 0..1, ``(images, channels, size, size)``, and their labels ``(images,)``."""
    pixels, labels = data.load(dataset, split)
    if classes is not None:
        chosen = torch.tensor(classes)
        matches = labels[:, None] == chosen
        kept = matches.any(1)
        pixels, labels = pixels[kept], matches[kept].int().argmax(1)
    return pixels.float() / 255 if image_size is None else data.pooled(pixels, image_size), labels
