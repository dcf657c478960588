"""Small vision transformers that classify images."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.tasks.base import Split, Task, TaskFamily
from learned_optim.meta_train.tasks.classification import ClassificationTask
from learned_optim.meta_train.tasks.conv_net import LARGEST_IMAGE, SMALLEST_IMAGE, images
from learned_optim.meta_train.tasks.language_model import HEADS, TransformerBlock
from learned_optim.meta_train.tasks.mlp import restriction
from learned_optim.meta_train.tasks.sampling import check_range, log_uniform_integer


@dataclass(frozen=True)
class VisionTransformerFamily(TaskFamily):
    """Classify images by a transformer over patches (Dosovitskiy et al. 2021, An Image is Worth 16x16 Words).

    Patches are embedded linearly, learned positions are added, blocks with layer norm before each sub-layer follow, and
    the logits are a linear function of the mean over patches, as in Beyer et al. 2022 (Better plain ViT baselines).
    PyTorch's initialisation. Ranges ``(low, high)`` are drawn for every task: sizes log-uniformly, blocks uniformly.

    Args:
        dataset: "cifar10", "mnist" or "digits" ("fashion-mnist" is for evaluation only: configurations refuse it).
        image_size: pixels a side, 8 to 32, to which images are averaged down; None keeps them.
        patch: pixels a side of a patch; divides the image.
        width: range of the features of a patch, rounded up to an even number for the two heads.
        blocks: range of the number of transformer blocks.
        batch_size: range of the mini-batch size.
    """

    dataset: Literal["cifar10", "mnist", "digits", "fashion-mnist"] = "cifar10"
    image_size: int | None = 16
    patch: int = 4
    width: tuple[int, int] = (32, 64)
    blocks: tuple[int, int] = (1, 2)
    batch_size: tuple[int, int] = (32, 128)

    def __post_init__(self) -> None:
        check_range("width", self.width, 1)
        check_range("blocks", self.blocks, 1)
        check_range("batch_size", self.batch_size, 1)
        if self.patch < 1:
            raise ValueError(f"patch must be at least 1, got {self.patch}")
        if self.image_size is not None:
            if not SMALLEST_IMAGE <= self.image_size <= LARGEST_IMAGE:
                raise ValueError(
                    f"image_size must be {SMALLEST_IMAGE} to {LARGEST_IMAGE} pixels, or None, got {self.image_size}"
                )
            check_patch(self.patch, self.image_size)

    @property
    def evaluation_only(self) -> str:
        """The restriction on the data set's use, if there is one."""
        return restriction(self.dataset)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw an architecture; ``split`` chooses the images."""
        return VisionTransformerTask(
            images(self.dataset, split, self.image_size, None),
            log_uniform_integer(rng, self.batch_size),
            patch=self.patch,
            width=log_uniform_integer(rng, self.width),
            blocks=int(rng.integers(self.blocks[0], self.blocks[1] + 1)),
        )


class VisionTransformerTask(ClassificationTask):
    """Transformers of one architecture on one data set: ``(images, channels, size, size)`` and labels.

    Raises:
        ValueError: patches do not divide the images.
    """

    def __init__(
        self, images_and_labels: tuple[Tensor, Tensor], batch_size: int, *, patch: int, width: int, blocks: int
    ) -> None:
        super().__init__(images_and_labels, batch_size)
        check_patch(patch, images_and_labels[0].shape[-1])
        self.patch, self.width, self.blocks = patch, width, blocks

    def module(self) -> nn.Module:
        """A transformer with fresh weights."""
        _, channels, _, size = self.data[0].shape
        return VisionTransformer(channels, size, self.patch, self.width, self.blocks, self.classes)


class VisionTransformer(nn.Module):
    """Images ``(batch, channels, size, size)`` to logits ``(batch, classes)``."""

    def __init__(self, channels: int, size: int, patch: int, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        width = HEADS * math.ceil(width / HEADS)
        self.patch, self.side = patch, size // patch
        self.embedding = nn.Linear(channels * patch**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn(self.side**2, width))  # the deviation of the paper's code
        self.blocks = nn.Sequential(*(TransformerBlock(width, causal=False) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes."""
        cut = images.unflatten(-1, (self.side, self.patch)).unflatten(-3, (self.side, self.patch))
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (batch, patches, pixels of one)
        stream = self.norm(self.blocks(self.embedding(patches) + self.positions))
        logits: Tensor = self.output(stream.mean(1))
        return logits


def check_patch(patch: int, image_size: int) -> None:
    """Raise ``ValueError`` unless patches divide the image."""
    if image_size % patch:
        raise ValueError(f"patch must divide the {image_size} pixels of an image, got {patch}")
