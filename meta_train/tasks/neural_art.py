"""Neural art: the optimizee is a picture with the content of a photograph and the style of a painting."""

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.style_transfer.style import (
    FEATURE_NETWORKS,
    SMALLEST_SIDE,
    ArtLoss,
    FeatureNetwork,
    Targets,
    find_neural_art_file,
    load_picture,
    to_coordinates,
    to_picture,
)
from learned_optim.meta_train.tasks.base import Batch, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.sampling import check_choices, check_not_negative, choose

CONTENT: dict[Split, tuple[str, ...]] = {
    "train": (
        *(f"kodim{number:02}" for number in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 16, 17, 18, 19)),
        "astronaut",
        "golden_gate",
        "raccoon",
    ),
    "validation": ("kodim08", "kodim20", "kodim21", "rocket"),
    "test": ("kodim15", "kodim22", "kodim23", "kodim24", "chelsea", "coffee", "tubingen"),
}
"""Photographs of each split, files of ``neural_art/content``."""

Style = Literal["starry_night", "great_wave", "shipwreck", "the_scream", "water_lilies"]
TEST_STYLES: tuple[Style, ...] = ("the_scream", "water_lilies")
"""Paintings that nothing is meta-trained on; the others may be."""


@dataclass(frozen=True)
class NeuralArtFamily(TaskFamily):
    """Paint a photograph in the style of a painting (Andrychowicz et al. 2016, section 3.4; Gatys et al. 2016).

    The loss is :class:`~learned_optim.meta_train.style_transfer.style.ArtLoss`, a coordinate ``(pixel - 0.5) / 0.25``.
    Every instance has a photograph of its own, scaled to ``size`` on its shorter side and cut at a random place. The
    splits are fixed (:data:`CONTENT`): nothing is meta-trained on a photograph of the test, nor on :data:`TEST_STYLES`.

    Args:
        size: pixels a side (the paper: 64 for meta-training, 128 for the test).
        styles: names of paintings, one is drawn for each task. With one of :data:`TEST_STYLES` among them, the family
            is for evaluation only.
        network: "vgg19", "vgg19-distilled" or "squeezenet". The distilled one needs a fourteenth of VGG-19's work.
        content_weight, style_weight, variation_weight: of the parts of the loss.
        initial: "noise": standard normal coordinates, so that every training starts elsewhere and has content and style
            to find; "content": the photograph, from which the content loss can only grow. The paper does not say.
    """

    size: int = 64
    styles: tuple[Style, ...] = ("starry_night",)
    network: Literal["vgg19", "vgg19-distilled", "squeezenet"] = "vgg19-distilled"
    content_weight: float = ArtLoss().content
    style_weight: float = ArtLoss().style
    variation_weight: float = ArtLoss().variation
    initial: Literal["noise", "content"] = "noise"

    def __post_init__(self) -> None:
        if self.size < SMALLEST_SIDE:
            raise ValueError(f"size must be at least {SMALLEST_SIDE} pixels, got {self.size}")
        check_choices("styles", self.styles, get_args(Style))
        check_choices("network", (self.network,), FEATURE_NETWORKS)
        check_choices("initial", (self.initial,), ("noise", "content"))
        weights = {f"{part}_weight": getattr(self, f"{part}_weight") for part in ArtLoss._fields}
        check_not_negative(**weights)
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} must not be all zero")

    @property
    def evaluation_only(self) -> str:
        """The styles that are held out for the test, if one is among the options."""
        held_out = [style for style in self.styles if style in TEST_STYLES]
        return f"style {held_out[0]!r} is held out for the test" if held_out else ""

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw a style; ``split`` chooses the photographs.

        Raises:
            ValueError: a style that is held out for the test is asked for on another split.
            DataNotFoundError: pictures or network are not there.
        """
        if self.evaluation_only and split != "test":
            raise ValueError(f"{self.evaluation_only}; its tasks are of the split 'test', not {split!r}")
        style = choose(rng, self.styles)
        weights = ArtLoss(self.content_weight, self.style_weight, self.variation_weight)
        return NeuralArtTask(
            feature_network(self.network),
            [picture("content", name, self.size) for name in CONTENT[split]],
            picture("style", style, self.size),
            self.size,
            weights,
            self.initial,
        )


class NeuralArtTask(Task):
    """Pictures of one style.

    Args:
        network: the features; its weights are shared by all instances.
        contents: photographs ``(3, height, width)``, the shorter side ``size``; each instance draws one.
        style: a painting; all of it counts.
        size: height and width of the optimizee.
        weights: weights of the loss's terms.
        initial: "noise" or "content".
    """

    def __init__(
        self, network: FeatureNetwork, contents: list[Tensor], style: Tensor, size: int, weights: ArtLoss, initial: str
    ) -> None:
        self.network, self.contents, self.style = network, contents, style
        self.size, self.weights, self.initial = size, weights, initial

    def module(self) -> nn.Module:
        """A photograph's features and the Gram matrices as buffers, the picture as the parameter."""
        content = random_crop(self.contents[int(torch.randint(len(self.contents), ()))], self.size)
        content, style = (pixels.to(torch.get_default_dtype()) for pixels in (content, self.style))
        start = to_coordinates(content) if self.initial == "content" else torch.randn_like(content)
        return Canvas(start, self.network.targets(content, style))

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """Nothing: the loss has no data of its own."""
        return torch.zeros(instances)

    def hold_out(self) -> tuple[Task, Task]:
        """The loss is deterministic: there is nothing to hold out."""
        return self, self

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Weighted sum of content, style and total variation."""
        assert isinstance(module, Canvas)
        coordinates = module.coordinates.view(module.shape)
        return self.network.to(coordinates).loss(to_picture(coordinates), module.targets, self.weights)


class Canvas(nn.Module):
    """A picture, and what it is to become. It is a vector to an optimizer: a matrix would count as a layer."""

    content: Tensor

    def __init__(self, start: Tensor, targets: Targets) -> None:
        super().__init__()
        self.coordinates, self.shape = nn.Parameter(start.flatten()), start.shape
        self.register_buffer("content", targets.content)
        self.layers = len(targets.grams)
        for layer, matrix in enumerate(targets.grams):
            self.register_buffer(f"gram{layer}", matrix)

    @property
    def targets(self) -> Targets:
        """The buffers."""
        return Targets(self.content, tuple(self.get_buffer(f"gram{layer}") for layer in range(self.layers)))


def random_crop(pixels: Tensor, size: int) -> Tensor:
    """A square of ``size`` pixels a side at a random place, drawn with torch's global random state."""
    _, height, width = pixels.shape
    top, left = (int(torch.randint(extent - size + 1, ())) for extent in (height, width))
    return pixels[:, top : top + size, left : left + size]


@functools.cache
def picture(kind: str, name: str, size: int) -> Tensor:
    """A picture of the data set, scaled, read once and then shared: do not write to it."""
    return load_picture(find_neural_art_file(f"{kind}/{name}.jpg"), size)


@functools.cache
def feature_network(name: str) -> FeatureNetwork:
    """A feature network, read once and then shared."""
    return FeatureNetwork(name)
