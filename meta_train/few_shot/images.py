"""N-way K-shot episodes of images, and the networks of the papers."""

import itertools
from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.few_shot.episodes import Episodes, Examples, FewShotTask
from learned_optim.meta_train.tasks import Split


def small_picture(source: Any, size: int, mode: str) -> np.ndarray:
    """A picture from a file or a stream, resized to ``size`` pixels a side, uint8.

    Args:
        source: a path or a binary file, as ``PIL.Image.open`` takes it.
        size: pixels of each side of the result.
        mode: "L" for grey, ``(size, size)``, or "RGB", ``(size, size, 3)``.

    Raises:
        ImportError: pillow is not installed.
        OSError: it cannot be read.
    """
    try:
        from PIL import Image  # heavy, and other tasks do without
    except ImportError as error:
        raise ImportError("pictures need pillow: pip install 'learned-optim[few-shot]'") from error
    with Image.open(source) as image:
        return np.asarray(image.convert(mode).resize((size, size), Image.Resampling.LANCZOS))


class ImageClasses(NamedTuple):
    """Images by class. The tensors are shared by everyone who loads them: do not write to them."""

    images: Tensor
    """uint8, ``(images, channels, size, size)``, class by class."""
    first: Tensor
    """Index of the first image of each class, ``(classes,)``."""
    counts: Tensor
    """Images of each class, ``(classes,)``."""

    def draw(self, ways: int, examples: int, rotations: int, count: int, generator: torch.Generator) -> Examples:
        """``examples`` images, all different, of each of ``ways`` classes, all different, for ``count`` tasks.

        A class turned by 0, 90, ... degrees, ``rotations`` angles in all, is as many classes.

        Returns:
            Images ``(count, ways, examples, channels, size, size)``, float32 in 0..1; and numbers of the classes
            ``(count, ways)``, the turned ones counted.
        """
        classes = len(self.first)
        chosen = torch.rand(count, classes * rotations, generator=generator).topk(ways, 1).indices
        turns, characters = chosen // classes, chosen % classes
        counts = self.counts[characters][..., None]
        keys = torch.rand(count, ways, int(self.counts.max()), generator=generator)
        keys = keys.masked_fill(torch.arange(keys.shape[-1]) >= counts, -1.0)
        rows = self.first[characters][..., None] + keys.topk(examples, -1).indices
        images = self.images[rows]
        if rotations > 1:
            by_angle = [images, *(images.rot90(turn, (-2, -1)) for turn in range(1, rotations))]
            for turn in range(1, rotations):
                images = torch.where((turns == turn)[..., None, None, None, None], by_angle[turn], images)
        return images.float() / 255, chosen


class ImageTask(FewShotTask):
    """Episodes of an image data set. Sub-classes are frozen dataclasses with the fields below."""

    shots: int
    """Images of a class to learn from."""
    queries: int
    """Images of a class that the meta-loss is taken on."""
    training_shots: int | None
    """Support examples of each class in meta-training; None: as many as ``shots``."""

    @abstractmethod
    def classes(self, split: Split) -> ImageClasses:
        """The images of a split."""

    def rotations(self, split: Split) -> int:
        """Angles that make new classes."""
        return 1

    def episodes(
        self, count: int, generator: torch.Generator, split: Split = "train", queries: int | None = None
    ) -> Episodes:
        """Episodes of some classes each, drawn with their images from a part of the data."""
        queries = self.queries if queries is None else queries
        shots = self.training_shots if split == "train" and self.training_shots is not None else self.shots
        ways = self.outputs
        images, chosen = self.classes(split).draw(ways, shots + queries, self.rotations(split), count, generator)

        def labelled(part: Tensor) -> Examples:
            labels = torch.arange(ways).repeat_interleave(part.shape[2]).expand(count, -1)
            return part.flatten(1, 2), labels

        return Episodes(labelled(images[:, :, :shots]), labelled(images[:, :, shots:]), chosen)

    @property
    def images_of_a_class(self) -> int:
        """Number of images that an episode needs of each class."""
        training = (self.training_shots or self.shots) + self.queries
        return max(training, self.shots + max(self.queries, self.evaluation_queries))

    def check_sizes(self, smallest_class: int) -> None:
        """Raise ``ValueError`` unless the options ask for at least two classes, and for images that there are."""
        shots = self.shots if self.training_shots is None else min(self.shots, self.training_shots)
        if self.outputs < 2 or shots < 1 or self.queries < 1 or self.evaluation_queries < 1:
            raise ValueError("ways must be at least 2, and shots and queries at least 1")
        if self.images_of_a_class > smallest_class:
            needed = self.images_of_a_class
            raise ValueError(f"a class has {smallest_class} images; shots and queries ask for {needed}")


def perceptron(inputs: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with batch norm and ReLU (Finn et al. 2017, section 5.2: widths 256, 128, 64 and 64)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for size, width in itertools.pairwise((inputs, *widths)):
        layers += [nn.Linear(size, width), nn.BatchNorm1d(width, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*layers)


def convolutional(channels: int, filters: int, layers: int = 4, *, strided: bool) -> nn.Sequential:
    """Convolutions 3x3 with batch norm and ReLU, each halving the sides by a stride or by pooling.

    With strides the last layer is averaged over its places (Finn et al. 2017 for Omniglot); with pooling it is not.
    """
    modules: list[nn.Module] = []
    for layer in range(layers):
        inputs = channels if layer == 0 else filters
        modules.append(nn.Conv2d(inputs, filters, 3, stride=2 if strided else 1, padding=1))
        modules += [nn.BatchNorm2d(filters, track_running_stats=False), nn.ReLU()]
        modules += [] if strided else [nn.MaxPool2d(2)]
    modules += [nn.AdaptiveAvgPool2d(1)] if strided else []
    return nn.Sequential(*modules, nn.Flatten())
