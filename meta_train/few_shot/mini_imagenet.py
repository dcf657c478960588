"""mini-ImageNet (Vinyals et al. 2016), or any other pictures, from a folder of the user's own."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from learned_optim.meta_train.data.datasets import SPLITS, DataNotFoundError, search_places
from learned_optim.meta_train.few_shot.images import ImageClasses, ImageTask, convolutional, small_picture
from learned_optim.meta_train.tasks import Split

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png"}
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


@dataclass(frozen=True)
class MiniImageNet(ImageTask):
    """Pictures to be classified, colours in 0..1, ``(3, size, size)``.

    The folder has a folder for each split, ``train``, ``val`` and ``test``, and in these one for each class with its
    pictures: 64, 16 and 20 classes of 600 in the split of Ravi & Larochelle (2017). Pictures are resized.

    Args:
        folder: folder of the pictures; None: ``mini_imagenet`` in ``LEARNED_OPTIM_DATA`` or in the user's cache.
        ways: classes of an episode.
        shots: pictures of each to learn from.
        queries: pictures of each that the meta-loss is taken on.
        size: pixels a side.
        filters: filters of each of the four convolutions with pooling (Finn et al. 2017 and Ravi & Larochelle: 32).
        training_shots: ``shots`` in meta-training (Nichol et al. 2018: more than in the test); None: as many.
        evaluation_queries: pictures of each class that an evaluation judges by.
    """

    folder: str | None = None
    ways: int = 5
    shots: int = 1
    queries: int = 15
    size: int = 84
    filters: int = 32
    training_shots: int | None = None
    evaluation_queries: int = 15

    def __post_init__(self) -> None:
        self.check_sizes(smallest_class=600)
        if self.size < 16 or self.filters < 1:
            raise ValueError(f"size must be at least 16 and filters at least 1, got {self.size} and {self.filters}")

    @property
    def training_classes(self) -> int:
        """Folders of the training split."""
        return len(self.classes("train").first)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Three channels of ``size`` x ``size`` pixels."""
        return 3, self.size, self.size

    @property
    def features(self) -> int:
        """Filters times places after four poolings."""
        return self.filters * (self.size // 16) ** 2

    def embedding(self) -> nn.Sequential:
        """Four convolutions."""
        return convolutional(3, self.filters, strided=False)

    def classes(self, split: Split) -> ImageClasses:
        """Images and classes of a part of the data set."""
        found = read_pictures(self._place(split), self.size)
        needed = self.images_of_a_class
        if int(found.counts.min()) < needed or len(found.first) < self.ways:
            raise ValueError(
                f"{self.ways} ways of {needed} pictures need more than the {len(found.first)} {split} classes "
                f"with {int(found.counts.min())} pictures or more"
            )
        return found

    def _place(self, split: Split) -> Path:
        places = [place / "mini_imagenet" for place in search_places()] if self.folder is None else [Path(self.folder)]
        folders = [place.expanduser() / name for place in places for name in SPLIT_FOLDERS[split]]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            needed = ", ".join(SPLIT_FOLDERS[each][-1] for each in SPLITS)
            raise DataNotFoundError(
                f"no {split} pictures; looked in {', '.join(map(str, folders))}; task.folder names a folder that holds "
                f"{needed}, each with a folder of pictures for every class"
            )
        return found


@functools.cache
def read_pictures(folder: Path, size: int) -> ImageClasses:
    """The pictures below ``folder``, one folder a class, ``(3, size, size)``, read once and then shared.

    Raises:
        ValueError: a class has no pictures, or a picture cannot be read.
        ImportError: pillow is not installed.
    """
    images, counts = [], []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(place / name for name in os.listdir(place) if Path(name).suffix.lower() in PICTURE_SUFFIXES)
        if not files:
            raise ValueError(f"{place} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
        for file in files:
            try:
                images.append(small_picture(file, size, "RGB").transpose(2, 0, 1))
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
        counts.append(len(files))
    if not counts:
        raise ValueError(f"{folder} holds no folders of pictures, one for each class")
    sizes = torch.tensor(counts)
    return ImageClasses(torch.from_numpy(np.stack(images)), sizes.cumsum(0) - sizes, sizes)
