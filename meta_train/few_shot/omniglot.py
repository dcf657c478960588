"""Omniglot: 1,623 hand-written characters, 20 drawings of each (Lake et al. 2015)."""

import contextlib
import functools
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from learned_optim.meta_train.data.datasets import DataNotFoundError, search_places
from learned_optim.meta_train.few_shot.images import ImageClasses, ImageTask, convolutional, perceptron, small_picture
from learned_optim.meta_train.tasks import Split

ARCHIVES = ("images_background.zip", "images_evaluation.zip")
DRAWINGS = 20  # of each character
CHARACTERS, VALIDATION, TEST = 1623, 100, 423
TRAINING_CHARACTERS = CHARACTERS - VALIDATION - TEST
IMAGE_SIZE = 28  # pixels a side that the drawings of 105 are averaged down to, as in the papers
WIDTHS = (256, 128, 64, 64)
FILTERS = 64


@dataclass(frozen=True)
class Omniglot(ImageTask):
    """Characters to be classified, ink 1 on paper 0, ``(1, 28, 28)``.

    Of all characters, shuffled once and for all, 1,200 are for meta-training, the last 100 of these for validation, and
    423 for testing (Santoro et al. 2016, as taken over by Finn et al. 2017). In meta-training a character turned by 90,
    180 or 270 degrees is a class of its own.

    Args:
        ways: classes of an episode.
        shots: drawings of each to learn from.
        queries: drawings of each that the meta-loss is taken on.
        network: "conv" (four strided convolutions of 64 filters) or "mlp" (the non-convolutional 256-128-64-64 of Finn
            et al. 2017); both with batch norm.
        training_shots: ``shots`` in meta-training (Nichol et al. 2018: more than in the test); None: as many.
        evaluation_queries: drawings of each class that an evaluation judges by, one as in the papers. It matters where
            batch norm is transductive: with one of each class at a time, to know the others says most.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 1
    network: Literal["conv", "mlp"] = "conv"
    training_shots: int | None = None
    evaluation_queries: int = 1

    def __post_init__(self) -> None:
        self.check_sizes(DRAWINGS)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """A channel of 28 x 28 pixels."""
        return 1, IMAGE_SIZE, IMAGE_SIZE

    @property
    def features(self) -> int:
        """Width of the last hidden layer."""
        return FILTERS if self.network == "conv" else WIDTHS[-1]

    @property
    def training_classes(self) -> int:
        """Characters of meta-training, turned by four angles."""
        return 4 * TRAINING_CHARACTERS

    def embedding(self) -> nn.Sequential:
        """The network without its last layer."""
        return convolutional(1, FILTERS, strided=True) if self.network == "conv" else perceptron(IMAGE_SIZE**2, WIDTHS)

    def classes(self, split: Split) -> ImageClasses:
        """Drawings and characters of a part of the data set."""
        return omniglot(split, find_omniglot())

    def rotations(self, split: Split) -> int:
        """Four in meta-training."""
        return 4 if split == "train" else 1


def find_omniglot() -> Path:
    """The folder ``omniglot`` with both archives: in ``LEARNED_OPTIM_DATA``, else in the user's cache.

    Raises:
        DataNotFoundError: there is none.
    """
    folders = [place / "omniglot" for place in search_places()]
    for folder in folders:
        if all((folder / archive).is_file() for archive in ARCHIVES):
            return folder
    raise DataNotFoundError(
        f"Omniglot not found; looked for {' and '.join(ARCHIVES)} in {', '.join(map(str, folders))}; "
        "both are in the folder python/ of github.com/brendenlake/omniglot"
    )


@functools.cache
def omniglot(split: Split, folder: Path) -> ImageClasses:
    """The characters of a split, read from the archives in ``folder`` and then shared: do not write to them.

    Raises:
        ValueError: an archive is damaged, or a character has not 20 drawings.
        ImportError: pillow is not installed.
    """
    characters = [character for archive in ARCHIVES for character in _members(folder / archive)]
    order = np.random.RandomState(0).permutation(len(characters))  # unlike Generator, the same in every NumPy release
    test, validation = (round(len(characters) * part / CHARACTERS) for part in (TEST, VALIDATION))
    bounds = {"train": (0, -test - validation), "validation": (-test - validation, -test), "test": (-test, None)}
    begin, end = bounds[split]
    chosen = [characters[index] for index in order[begin:end]]
    with contextlib.ExitStack() as stack:
        files = {archive: stack.enter_context(zipfile.ZipFile(folder / archive)) for archive in ARCHIVES}
        drawings = [
            255 - small_picture(io.BytesIO(files[archive].read(name)), IMAGE_SIZE, "L")  # ink is dark
            for archive, names in chosen
            for name in names
        ]
    counts = torch.full((len(chosen),), DRAWINGS)
    return ImageClasses(torch.from_numpy(np.stack(drawings)[:, None]), counts.cumsum(0) - counts, counts)


def _members(path: Path) -> list[tuple[str, list[str]]]:
    """The archive's name and the names of the drawings, for each of its characters."""
    try:
        with zipfile.ZipFile(path) as file:
            names = sorted(name for name in file.namelist() if name.endswith(".png"))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip archive, or damaged ({error}); fetch it again") from error
    characters: dict[str, list[str]] = {}
    for name in names:
        characters.setdefault(name.rpartition("/")[0], []).append(name)
    odd = next((character for character, drawings in characters.items() if len(drawings) != DRAWINGS), None)
    if odd is not None or not characters:
        raise ValueError(f"{path}: every character must have {DRAWINGS} drawings; {odd or 'there are no characters'}")
    return [(path.name, drawings) for drawings in characters.values()]
