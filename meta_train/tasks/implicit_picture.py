"""Implicit pictures: a network from places to colours that is fitted to one photograph."""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.style_transfer.style import SMALLEST_SIDE, find_neural_art_file, load_picture
from learned_optim.meta_train.tasks.base import Batch, DataTask, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.neural_art import CONTENT
from learned_optim.meta_train.tasks.sampling import check_choices, check_range, choose, log_uniform_integer

PICTURE_NETWORKS = ("sine", "fourier")


@dataclass(frozen=True)
class ImplicitPictureFamily(TaskFamily):
    """Fit a photograph by a network from places in [-1, 1]^2 to colours in [-1, 1]^3; the loss is the mean square.

    "sine": layers ``sin(30 (W x + b))`` with the initialisation of Sitzmann et al. 2020 (Implicit Neural
    Representations with Periodic Activation Functions, section 3.2); "fourier": ReLU layers on the sines and cosines of
    random projections (Tancik et al. 2020, Fourier Features). The photographs are those of the family "neural-art",
    and so are their splits. Ranges ``(low, high)`` are drawn for every task: sizes log-uniformly, layers uniformly.

    Args:
        size: pixels a side.
        networks: one is drawn.
        layers: range of the number of hidden layers.
        width: range of their units.
        batch_size: range of the number of pixels of a batch.
    """

    size: int = 64
    networks: tuple[Literal["sine", "fourier"], ...] = ("sine",)
    layers: tuple[int, int] = (2, 3)
    width: tuple[int, int] = (32, 64)
    batch_size: tuple[int, int] = (256, 1024)

    def __post_init__(self) -> None:
        if self.size < SMALLEST_SIDE:
            raise ValueError(f"size must be at least {SMALLEST_SIDE} pixels, got {self.size}")
        check_choices("networks", self.networks, PICTURE_NETWORKS)
        check_range("layers", self.layers, 1)
        check_range("width", self.width, 1)
        check_range("batch_size", self.batch_size, 1)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw a photograph of the split and an architecture."""
        name = choose(rng, CONTENT[split])
        return ImplicitPictureTask(
            pixels(name, self.size),
            log_uniform_integer(rng, self.batch_size),
            network=choose(rng, self.networks),
            layers=int(rng.integers(self.layers[0], self.layers[1] + 1)),
            width=log_uniform_integer(rng, self.width),
        )


class ImplicitPictureTask(DataTask):
    """Networks of one architecture on one picture.

    Args:
        data: places ``(pixels, 2)`` and colours ``(pixels, 3)``.
        batch_size: pixels of a batch.
        network: one of :data:`PICTURE_NETWORKS`.
        layers: hidden ones.
        width: their units.
    """

    def __init__(self, data: tuple[Tensor, Tensor], batch_size: int, *, network: str, layers: int, width: int) -> None:
        super().__init__(data, batch_size)
        self.network, self.layers, self.width = network, layers, width

    def module(self) -> nn.Module:
        """A network with fresh weights."""
        hidden = [self.width] * self.layers
        if self.network == "sine":
            sizes = [2, *hidden]
            layers: list[nn.Module] = [
                Sine(inputs, outputs, first=place == 0)
                for place, (inputs, outputs) in enumerate(itertools.pairwise(sizes))
            ]
        else:
            sizes = [2 * self.width, *hidden]
            layers = [FourierFeatures(self.width)]
            for inputs, outputs in itertools.pairwise(sizes):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.width, 3))

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean over pixels and colours."""
        places, colours = batch
        return F.mse_loss(module(places), colours)


class Sine(nn.Module):
    """A layer ``sin(30 (W x + b))``.

    Args:
        inputs: features that come in.
        outputs: units.
        first: whether the inputs are places, not the sines of a layer before.
    """

    FREQUENCY = 30.0

    def __init__(self, inputs: int, outputs: int, *, first: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / self.FREQUENCY
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, inputs: Tensor) -> Tensor:
        """The sines of the units."""
        return torch.sin(self.FREQUENCY * self.linear(inputs))


class FourierFeatures(nn.Module):
    """Sines and cosines of ``count`` random projections of a place, which are not trained."""

    projections: Tensor
    DEVIATION = 2.0
    """Frequency of a projection, in waves from one side of the picture to its middle."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("projections", self.DEVIATION * torch.randn(2, count))

    def forward(self, places: Tensor) -> Tensor:
        """``(places, 2 * count)``."""
        phases = 2 * math.pi * places @ self.projections
        return torch.cat([phases.sin(), phases.cos()], -1)


@functools.cache
def pixels(name: str, size: int) -> tuple[Tensor, Tensor]:
    """Places ``(pixels, 2)`` and colours ``(pixels, 3)`` of the middle of a photograph.

    They were shuffled once, so that what is held out lies everywhere in the picture.
    """
    picture = load_picture(find_neural_art_file(f"content/{name}.jpg"), size)
    top, left = ((extent - size) // 2 for extent in picture.shape[-2:])
    square = picture[..., top : top + size, left : left + size]
    axis = torch.linspace(-1, 1, size, dtype=torch.float32)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    colours = 2 * square.float().reshape(3, -1).T - 1
    order = torch.randperm(size * size, generator=torch.Generator().manual_seed(0))
    return places[order], colours[order].contiguous()
