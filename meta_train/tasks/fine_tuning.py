"""Fine-tuning: networks trained by Adam on some classes or on another data set go on with few images of new classes."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.common.seeds import fixed_global_state, torch_generator
from learned_optim.meta_train.data.readers import CLASSES
from learned_optim.meta_train.tasks.base import Split, Task, TaskFamily
from learned_optim.meta_train.tasks.classification import ClassificationTask
from learned_optim.meta_train.tasks.conv_net import LARGEST_IMAGE, SMALLEST_IMAGE, images
from learned_optim.meta_train.tasks.mlp import restriction
from learned_optim.meta_train.tasks.sampling import check_choices, check_range, log_uniform_integer

DataSetName = Literal["cifar10", "mnist", "digits", "fashion-mnist"]
PRETRAINED_NETWORKS = ("perceptron", "conv-net")
FIRST_CLASSES, LAST_CLASSES = tuple(range(CLASSES // 2)), tuple(range(CLASSES // 2, CLASSES))
RATE, BATCH_SIZE = 1e-3, 64  # Adam's default rate, and a customary batch, of the pretraining
CHANNELS, KERNEL = (16, 32), 3  # of the convolutions, each followed by ReLU and 2 x 2 max-pooling


@dataclass(frozen=True)
class FineTuningFamily(TaskFamily):
    """Train all layers of a pretrained network, with a fresh output layer, on few images.

    Pretraining takes place when a task is first drawn, a few seconds at most, always with the same random numbers and
    the training images; the result is kept in memory. A fresh output layer on a trained body is how networks are
    usually transferred (Yosinski et al. 2014, How transferable are features in deep neural networks?). PyTorch's
    initialisation. Ranges ``(low, high)`` are drawn log-uniformly for every task.

    Args:
        dataset: data set of the fine-tuning; "fashion-mnist" is for evaluation only: configurations refuse it.
        pretrained_on: another data set, all of whose classes the network learns first, with as many channels; it then
            goes on with all of ``dataset``. None: it learns the first five classes of ``dataset``, and goes on with the
            last five.
        image_size: pixels a side, 8 to 32, to which images are averaged down.
        networks: one is drawn. "perceptron": two hidden layers, ReLU; "conv-net": two convolutions 3 x 3 of 16 and 32
            channels with ReLU and max-pooling, then a hidden layer.
        width: range of the units of hidden layers.
        examples: range of the number of images to fine-tune on, the first of the split.
        batch_size: range of the mini-batch size.
        pretraining: steps of Adam at 1e-3 with batches of 64.
    """

    dataset: DataSetName = "cifar10"
    pretrained_on: DataSetName | None = None
    image_size: int = 14
    networks: tuple[Literal["perceptron", "conv-net"], ...] = ("perceptron",)
    width: tuple[int, int] = (64, 128)
    examples: tuple[int, int] = (200, 1000)
    batch_size: tuple[int, int] = (16, 64)
    pretraining: int = 500

    def __post_init__(self) -> None:
        check_choices("networks", self.networks, PRETRAINED_NETWORKS)
        check_range("width", self.width, 1)
        check_range("examples", self.examples, 1)
        check_range("batch_size", self.batch_size, 1)
        if not SMALLEST_IMAGE <= self.image_size <= LARGEST_IMAGE:
            raise ValueError(f"image_size must be {SMALLEST_IMAGE} to {LARGEST_IMAGE} pixels, got {self.image_size}")
        if self.pretraining < 0:
            raise ValueError(f"pretraining must not be negative, got {self.pretraining}")
        if self.pretrained_on is not None and (self.pretrained_on == "cifar10") != (self.dataset == "cifar10"):
            raise ValueError(f"pretrained_on: {self.pretrained_on} has another number of channels than {self.dataset}")

    @property
    def evaluation_only(self) -> str:
        """The restriction on the use of either data set, if there is one."""
        return restriction(self.dataset) or (restriction(self.pretrained_on) if self.pretrained_on else "")

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw a network and the number of images; ``split`` chooses those to fine-tune on."""
        classes = LAST_CLASSES if self.pretrained_on is None else None
        pixels, labels = images(self.dataset, split, self.image_size, classes)
        network = self.networks[int(rng.integers(len(self.networks)))]
        width = log_uniform_integer(rng, self.width)
        first = (self.dataset, FIRST_CLASSES) if self.pretrained_on is None else (self.pretrained_on, None)
        examples = log_uniform_integer(rng, self.examples)
        return FineTuningTask(
            (pixels[:examples], labels[:examples]),
            log_uniform_integer(rng, self.batch_size),
            network=network,
            width=width,
            body=pretrained(*first, self.image_size, network, width, self.pretraining),
        )


class FineTuningTask(ClassificationTask):
    """Networks of one architecture that start from one pretrained body.

    Args:
        images_and_labels: ``(images, channels, size, size)`` and ``(images,)``.
        batch_size: images of a batch.
        network: one of :data:`PRETRAINED_NETWORKS`.
        width: units of the hidden layers.
        body: tensors of all layers but the last, by name.
    """

    def __init__(
        self,
        images_and_labels: tuple[Tensor, Tensor],
        batch_size: int,
        *,
        network: str,
        width: int,
        body: Mapping[str, Tensor],
    ) -> None:
        super().__init__(images_and_labels, batch_size)
        self.network, self.width, self.body = network, width, body

    def module(self) -> nn.Module:
        """The pretrained body and a fresh output layer."""
        _, channels, _, size = self.data[0].shape
        module = build_network(self.network, channels, size, self.width, self.classes)
        module.body.load_state_dict(self.body)
        return module


class Transferred(nn.Module):
    """A body that may have been trained before, and an output layer."""

    def __init__(self, body: nn.Sequential, features: int, classes: int) -> None:
        super().__init__()
        self.body, self.output = body, nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, channels, size, size)`` to logits ``(batch, classes)``."""
        logits: Tensor = self.output(self.body(images))
        return logits


def build_network(network: str, channels: int, size: int, width: int, classes: int) -> Transferred:
    """A network with fresh weights."""
    layers: list[nn.Module] = []
    if network == "conv-net":
        for outputs in CHANNELS:
            layers += [nn.Conv2d(channels, outputs, KERNEL, padding=KERNEL // 2), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = outputs, size // 2
        layers += [nn.Flatten(), nn.Linear(channels * size**2, width), nn.ReLU()]
    else:
        layers += [nn.Flatten(), nn.Linear(channels * size**2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return Transferred(nn.Sequential(*layers), width, classes)


@functools.cache
def pretrained(
    dataset: str, classes: tuple[int, ...] | None, image_size: int, network: str, width: int, steps: int
) -> dict[str, Tensor]:
    """Tensors of the body after training on the training images, trained once and then shared: do not write to them."""
    pixels, labels = images(dataset, "train", image_size, classes)
    with fixed_global_state(0):
        module = build_network(network, pixels.shape[1], image_size, width, int(labels.max()) + 1).to(torch.float32)
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    generator = torch_generator(0, "pretraining batches")
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(labels), (BATCH_SIZE,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(module(pixels[rows]), labels[rows]).backward()
            optimizer.step()
    return {name: tensor.detach() for name, tensor in module.body.state_dict().items()}
