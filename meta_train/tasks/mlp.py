"""Multi-layer perceptrons that classify small images: the paper's networks, and random architectures."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.tasks.base import Split, Task, TaskFamily
from learned_optim.meta_train.tasks.classification import ClassificationTask
from learned_optim.meta_train.tasks.sampling import (
    check_choices,
    check_probability,
    check_range,
    log_uniform,
    log_uniform_integer,
)

Activation = Literal["sigmoid", "tanh", "relu", "gelu", "elu"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
}

PAPER_DEVIATION = 0.01  # of the initial parameters in the released code of Andrychowicz et al. 2016
Initial = Literal["normal", "torch", "xavier"]


def normal(layer: nn.Linear) -> None:
    """Weights and bias as N(0, 0.01^2)."""
    nn.init.normal_(layer.weight, std=PAPER_DEVIATION)
    nn.init.normal_(layer.bias, std=PAPER_DEVIATION)


def xavier(layer: nn.Linear) -> None:
    """Weights uniform within sqrt(6 / (inputs + outputs)), bias at zero."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


INITIAL: dict[str, Callable[[nn.Linear], None]] = {"normal": normal, "torch": lambda layer: None, "xavier": xavier}
"""Name -> what turns a fresh linear layer into one with these initial parameters."""


@dataclass(frozen=True)
class MLPFamily(TaskFamily):
    """Classify images by a perceptron. The defaults are the base network of Andrychowicz et al. 2016, section 3.2.

    Ranges ``(low, high)`` are drawn for every task: sizes log-uniformly, layers uniformly.

    Args:
        dataset: "mnist", "cifar10" or "digits" ("fashion-mnist" is for evaluation only: configurations refuse it).
        image_size: images are averaged down to this many pixels a side; None keeps them.
        layers: range of the number of hidden layers.
        width: range of the units of each hidden layer.
        activations: one is drawn.
        batch_size: range of the mini-batch size.
        initial: "normal": all parameters start as N(0, 0.01^2), as in the paper's released code; "torch": PyTorch's
            default initialisation, which was that of Torch7 too, weights and biases uniform within 1/sqrt(inputs);
            "xavier": weights as Glorot and Bengio 2010, uniform within sqrt(6 / (inputs + outputs)), biases at zero.
        gain: range of the factor on the initial parameters.
        layer_norm: probability of a layer norm before each activation.
    """

    dataset: Literal["mnist", "cifar10", "digits", "fashion-mnist"] = "mnist"
    image_size: int | None = None
    layers: tuple[int, int] = (1, 1)
    width: tuple[int, int] = (20, 20)
    activations: tuple[Activation, ...] = ("sigmoid",)
    batch_size: tuple[int, int] = (128, 128)
    initial: Initial = "normal"
    gain: tuple[float, float] = (1.0, 1.0)
    layer_norm: float = 0.0

    def __post_init__(self) -> None:
        check_range("layers", self.layers, 0)
        check_range("width", self.width, 1)
        check_range("batch_size", self.batch_size, 1)
        check_range("gain", self.gain, 0, included=False)
        check_choices("activations", self.activations, ACTIVATIONS)
        check_choices("initial", (self.initial,), INITIAL)
        check_probability(layer_norm=self.layer_norm)

    @property
    def evaluation_only(self) -> str:
        """The restriction on the data set's use, if there is one."""
        return restriction(self.dataset)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw an architecture; ``split`` chooses the images."""
        layers = int(rng.integers(self.layers[0], self.layers[1] + 1))
        return MLPTask(
            image_rows(self.dataset, split, self.image_size),
            batch_size=log_uniform_integer(rng, self.batch_size),
            widths=[log_uniform_integer(rng, self.width) for _ in range(layers)],
            activation=self.activations[int(rng.integers(len(self.activations)))],
            initial=self.initial,
            gain=log_uniform(rng, self.gain),
            layer_norm=bool(rng.random() < self.layer_norm),
        )


class MLPTask(ClassificationTask):
    """Perceptrons of one architecture on one data set."""

    same_operations = True

    def __init__(
        self,
        images_and_labels: tuple[Tensor, Tensor],
        batch_size: int,
        widths: list[int],
        activation: str,
        initial: str,
        gain: float,
        layer_norm: bool,
    ) -> None:
        super().__init__(images_and_labels, batch_size)
        self.widths, self.activation, self.layer_norm = widths, activation, layer_norm
        self.initial, self.gain = initial, gain

    def module(self) -> nn.Module:
        """A perceptron with fresh weights."""
        sizes = [self.data[0].shape[1], *self.widths]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            norm = [nn.LayerNorm(outputs)] if self.layer_norm else []
            layers += [nn.Linear(inputs, outputs), *norm, ACTIVATIONS[self.activation]()]
        network = nn.Sequential(*layers, nn.Linear(sizes[-1], self.classes))
        for layer in linear_layers(network):
            INITIAL[self.initial](layer)
        return scale_parameters(network, self.gain)


def linear_layers(network: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers."""
    return (layer for layer in network.modules() if isinstance(layer, nn.Linear))


def scale_parameters(network: nn.Module, gain: float) -> nn.Module:
    """The network, with weights and biases of its linear layers times ``gain``."""
    with torch.no_grad():
        for layer in linear_layers(network):
            for parameter in layer.parameters():
                parameter.mul_(gain)
    return network


def restriction(dataset: str) -> str:
    """Why nothing may be meta-trained on a data set; empty if it may."""
    note = data.DATA_SETS[dataset].note
    return f"data set {dataset!r}, {note}" if note else ""


@functools.cache
def image_rows(dataset: str, split: Split, image_size: int | None) -> tuple[Tensor, Tensor]:
    """Images as rows of floats in 0..1, ``(images, pixels)``, and their labels ``(images,)``."""
    images, labels = data.load(dataset, split)
    pixels = images.float() / 255 if image_size is None else data.pooled(images, image_size)
    return pixels.flatten(1), labels
