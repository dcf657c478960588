"""Neural style transfer: pretrained features, Gram matrices, losses, and pictures in and out (Gatys et al. 2016).

A picture is a tensor ``(3, height, width)``, RGB in 0..1, of any height and width from :data:`SMALLEST_SIDE` pixels up.
"""

import functools
import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from learned_optim.files import write_atomically
from learned_optim.meta_train.data.datasets import DataNotFoundError, search_places

NEURAL_ART_FOLDER = "neural_art"  # in each place where data sets are looked for
SMALLEST_SIDE = 32  # pixels a side; of fewer, the strided layers leave maps of a pixel or two

PIXEL_CENTRE, PIXEL_UNIT = 0.5, 0.25
"""A coordinate of the optimizee is ``(pixel - 0.5) / 0.25``: of order one, as parameters of networks are."""


@dataclass(frozen=True)
class Architecture:
    """A feature network in an archive of ``<layer>.weight`` ``(out, in, height, width)`` and ``<layer>.bias``.

    Args:
        file: the NumPy archive in ``neural_art/features``.
        layers: names of the layers in order: "pool" takes maxima, "fire..." is a SqueezeNet's, "conv..." a convolution
            and a ReLU.
        content: the layer whose activations are a picture's content.
        style: the layers whose Gram matrices are its style.
        mean: mean of each channel, which is subtracted from the input.
        deviation: deviation of each channel, which the centred input is divided by.
        bgr: whether the channels of the input are blue, green, red.
        padding: how 3x3 convolutions are padded, as ``torch.nn.functional.pad`` calls it.
    """

    file: str
    layers: tuple[str, ...]
    content: str
    style: tuple[str, ...]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    deviation: tuple[float, float, float] = (1.0, 1.0, 1.0)
    bgr: bool = False
    padding: str = "constant"


_VGG = ("conv1_1", "conv1_2", "pool", "conv2_1", "conv2_2", "pool", "conv3_1", "conv3_2", "conv3_3", "conv3_4")

FEATURE_NETWORKS: Mapping[str, Architecture] = {
    "vgg19": Architecture(
        file="vgg19_conv1_1-conv3_4.npz",
        layers=_VGG,
        content="conv3_2",
        style=("conv1_1", "conv2_1", "conv3_1", "conv3_4"),
        mean=(103.939 / 255, 116.779 / 255, 123.68 / 255),
        deviation=(1 / 255, 1 / 255, 1 / 255),
        bgr=True,
    ),
    "vgg19-distilled": Architecture(
        file="vgg19_distilled16x_conv1_1-conv4_1.npz",
        layers=("conv0", *_VGG, "pool", "conv4_1"),
        content="conv3_2",
        style=("conv1_1", "conv2_1", "conv3_1", "conv4_1"),
        padding="reflect",
    ),
    "squeezenet": Architecture(
        file="squeezenet1_1.npz",
        layers=("conv1", "pool", "fire2", "fire3", "pool", "fire4", "fire5"),
        content="fire3",
        style=("conv1", "fire2", "fire3", "fire5"),
        mean=(0.485, 0.456, 0.406),
        deviation=(0.229, 0.224, 0.225),
    ),
}
"""Feature networks by name; docs/neural-art.md describes their files and compares them."""


class ArtLoss(NamedTuple):
    """Weights of the loss ``content * L_content + style * L_style + variation * L_variation``.

    ``L_content``: squared distance of the activations over their own squared norm. ``L_style``: the same of the Gram
    matrices, mean over the layers. Both are 1 for a picture without activations, at any size and for every network.
    ``L_variation``: mean squared difference of neighbouring pixels, down plus across.
    """

    content: float = 1.0
    style: float = 30.0
    variation: float = 10.0


class Targets(NamedTuple):
    """The features that a picture is to have."""

    content: Tensor
    """Activations of the content picture, ``(channels, height, width)``."""
    grams: tuple[Tensor, ...]
    """Gram matrices of the style picture, each ``(channels, channels)``."""


class FeatureNetwork:
    """A pretrained network whose weights never change.

    Args:
        name: one of :data:`FEATURE_NETWORKS`.
        path: a folder that holds ``neural_art/``, searched before ``LEARNED_OPTIM_DATA`` and the user's cache.

    Raises:
        ValueError: the name is unknown, or the file is damaged.
        DataNotFoundError: the file is in none of these places.
    """

    def __init__(self, name: str, path: str | Path | None = None) -> None:
        if name not in FEATURE_NETWORKS:
            raise ValueError(f"unknown feature network {name!r}; known: {', '.join(FEATURE_NETWORKS)}")
        self.name, self.architecture = name, FEATURE_NETWORKS[name]
        self._weights = read_features(find_neural_art_file(f"features/{self.architecture.file}", path))
        wanted = {self.architecture.content, *self.architecture.style}
        last = max(index for index, layer in enumerate(self.architecture.layers) if layer in wanted)
        self._layers = self.architecture.layers[: last + 1]

    def to(self, tensor: Tensor) -> "FeatureNetwork":
        """Weights moved to where ``tensor`` is, and to its dtype; returns the network itself."""
        if next(iter(self._weights.values())).device != tensor.device or self.dtype != tensor.dtype:
            self._weights = {name: weight.to(tensor.device, tensor.dtype) for name, weight in self._weights.items()}
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Device of the weights."""
        return next(iter(self._weights.values())).dtype

    def activations(self, picture: Tensor) -> dict[str, Tensor]:
        """Activations ``(channels, height, width)`` of every layer up to the last that the losses use."""
        network = self.architecture
        mean, deviation = (picture.new_tensor(values).view(3, 1, 1) for values in (network.mean, network.deviation))
        features = ((picture.flip(0) if network.bgr else picture) - mean) / deviation
        found = {}
        for layer in self._layers:
            if layer == "pool":
                features = self._pool(features)
            elif layer.startswith("fire"):
                squeezed = self._convolution(f"{layer}.squeeze1x1", features).relu()
                expanded = [self._convolution(f"{layer}.expand{size}", squeezed).relu() for size in ("1x1", "3x3")]
                features = torch.cat(expanded)
            else:
                features = self._convolution(layer, features)
                features = features if layer == "conv0" else features.relu()
            found[layer] = features
        return found

    def targets(self, content: Tensor, style: Tensor) -> Targets:
        """The features of a picture with the content of one and the style of the other."""
        with torch.no_grad():
            content_activations = self.to(content).activations(content)[self.architecture.content]
            styled = self.activations(style)
            return Targets(content_activations, tuple(gram(styled[layer]) for layer in self.architecture.style))

    def loss(self, picture: Tensor, targets: Targets, weights: ArtLoss) -> Tensor:
        """Loss of one picture, 0-d; see :class:`ArtLoss`."""
        found = self.activations(picture)
        styles = [gram(found[layer]) for layer in self.architecture.style]
        style = sum(
            (relative_error(own, target) for own, target in zip(styles, targets.grams, strict=True)),
            start=picture.new_zeros(()),
        ) / len(styles)
        content = relative_error(found[self.architecture.content], targets.content)
        return weights.content * content + weights.style * style + weights.variation * total_variation(picture)

    def _pool(self, features: Tensor) -> Tensor:
        if "fire2" in self._layers:
            return F.max_pool2d(features, 3, stride=2, ceil_mode=True)
        return F.max_pool2d(features, 2)

    def _convolution(self, layer: str, features: Tensor) -> Tensor:
        weight, bias = self._weights[f"{layer}.weight"], self._weights[f"{layer}.bias"]
        if layer == "conv1":  # a SqueezeNet's first
            return F.conv2d(features, weight, bias, stride=2)
        if weight.shape[-1] == 3:
            features = F.pad(features, (1, 1, 1, 1), mode=self.architecture.padding)
        return F.conv2d(features, weight, bias)


def gram(features: Tensor) -> Tensor:
    """Mean over positions of the products of channels, ``(channels, channels)``, of ``(channels, height, width)``."""
    rows = features.flatten(1)
    return rows @ rows.T / rows.shape[1]


def relative_error(values: Tensor, target: Tensor) -> Tensor:
    """``|values - target|^2 / |target|^2``, 0-d."""
    return (values - target).square().sum() / target.square().sum()


def total_variation(picture: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, down plus across, 0-d."""
    down, across = picture.diff(dim=1), picture.diff(dim=2)
    return down.square().mean() + across.square().mean()


def to_picture(coordinates: Tensor) -> Tensor:
    """Pixels of an optimizee's coordinates; see :data:`PIXEL_UNIT`."""
    return PIXEL_CENTRE + PIXEL_UNIT * coordinates


def to_coordinates(picture: Tensor) -> Tensor:
    """The inverse of :func:`to_picture`."""
    return (picture - PIXEL_CENTRE) / PIXEL_UNIT


# Files


def find_neural_art_file(name: str, path: str | Path | None = None) -> Path:
    """A file of the folder ``neural_art`` in ``path``, ``LEARNED_OPTIM_DATA`` or the user's cache, the first there is.

    Raises:
        DataNotFoundError: it is in none of these places.
    """
    candidates = [place / NEURAL_ART_FOLDER / name for place in search_places(path)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataNotFoundError(
        f"{NEURAL_ART_FOLDER}/{name} not found; looked for {', '.join(map(str, candidates))}; "
        f"set LEARNED_OPTIM_DATA to a folder "
        f"that holds {NEURAL_ART_FOLDER}/; docs/neural-art.md says where its files come from"
    )


@functools.cache
def read_features(path: Path) -> dict[str, Tensor]:
    """The weights of an archive in float32, read once and then shared: do not write to them."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name].astype(np.float32)) for name in archive.files}
    except (AttributeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:  # the first: one array
        raise ValueError(f"{path} is damaged or no archive of features ({error})") from error


def load_picture(path: str | Path, size: int | None = None) -> Tensor:
    """Read a picture of any format that Pillow knows.

    Args:
        path: the file.
        size: length of the shorter side, to which the picture is scaled with a Lanczos filter; None: as it is.

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is not a picture.
    """
    image_module = _pillow()
    from PIL import ImageOps

    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with image_module.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:  # Syntax: a broken PNG
        raise ValueError(f"{path} is not a picture that Pillow can read ({error})") from error
    if size is not None:
        if size < SMALLEST_SIDE:
            raise ValueError(f"size must be at least {SMALLEST_SIDE} pixels, got {size}")
        scale = size / min(image.size)
        shape = (max(size, round(scale * image.width)), max(size, round(scale * image.height)))
        image = image.resize(shape, image_module.Resampling.LANCZOS)
    if min(image.size) < SMALLEST_SIDE:
        raise ValueError(f"{path} has {image.width}x{image.height} pixels; at least {SMALLEST_SIDE} a side are needed")
    pixels = torch.from_numpy(np.asarray(image, np.uint8).copy())
    return pixels.permute(2, 0, 1).float().contiguous() / 255


def save_picture(picture: Tensor, path: str | Path) -> None:
    """Write a picture, whole or not at all, in the format that the file's name says; values beyond 0..1 are cut.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: the name says no format that Pillow can write.
    """
    image_module = _pillow()
    file_format = picture_format(path)
    pixels = (picture.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    content = io.BytesIO()
    options = {"quality": 92} if file_format == "JPEG" else {}
    image_module.fromarray(pixels.numpy()).save(content, file_format, **options)
    write_atomically(Path(path), content.getvalue())


def picture_format(path: str | Path) -> str:
    """Pillow's name for the format of a file to be written; raises ``ValueError`` if it cannot write such a file."""
    image_module = _pillow()
    file_format = image_module.registered_extensions().get(Path(path).suffix.lower())
    if file_format not in image_module.SAVE:
        raise ValueError(f"cannot write a picture called {path}; use a name that ends in .png or .jpg")
    return str(file_format)


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'learned-optim[art]'") from error
    return Image
