"""Small image data sets: find them, and load them in fixed splits."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from learned_optim.meta_train.data.readers import (
    CIFAR10_SUBSET,
    CIFAR10_TEST,
    CIFAR10_TRAIN,
    MNIST_FILES,
    READERS,
    Images,
    digits,
    missing_files,
)

SPLITS = ("train", "validation", "test")


class DataNotFoundError(FileNotFoundError):
    """A data set is in none of the places searched; the message names them and the command that fetches it."""


@dataclass(frozen=True)
class DataSet:
    """A data set: its files, where they come from, and what it may be used for.

    Args:
        name: its name, and that of its folder.
        description: one line.
        licence: licence and citation.
        note: why nothing may be meta-trained on it, or nothing; configurations then refuse it.
        layouts: alternative sets of files, relative to the folder, of which one must be there.
        downloads: name and SHA-256 of each file that has to be fetched; a ``.tar.gz`` becomes the first layout.
        mirrors: addresses that hold them, in the order in which they are tried.
        by_hand: how to come by the files, for a data set without an address to download from.
    """

    name: str
    description: str
    licence: str
    note: str = ""
    layouts: tuple[tuple[str, ...], ...] = ()
    downloads: Mapping[str, str] = field(default_factory=dict)
    mirrors: tuple[str, ...] = ()
    by_hand: str = ""


MNIST_LAYOUTS = (tuple(f"{name}.gz" for name in MNIST_FILES), MNIST_FILES)

DATA_SETS: Mapping[str, DataSet] = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            name="cifar10",
            description="60,000 colour photographs, 32x32, of 10 kinds of animals and vehicles (162 MiB)",
            licence="no formal licence; cite Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
            layouts=(CIFAR10_TRAIN + CIFAR10_TEST, (CIFAR10_SUBSET,)),
            downloads={
                "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            },
            mirrors=("https://www.cs.toronto.edu/~kriz/",),
        ),
        DataSet(
            name="digits",
            description="1,797 handwritten digits, 8x8; comes with scikit-learn, nothing to download",
            licence="CC BY 4.0; Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
        ),
        DataSet(
            name="fashion-mnist",
            description="70,000 grey pictures, 28x28, of 10 kinds of clothes (30 MiB)",
            licence="MIT, Copyright 2017 Zalando SE; cite Xiao, Rasul and Vollgraf, arXiv:1708.07747",
            note="evaluation only: no rule that is shipped may be meta-trained or selected on it",
            layouts=MNIST_LAYOUTS,
            downloads={
                "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            },
            mirrors=(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            ),
        ),
        DataSet(
            name="mnist",
            description="70,000 handwritten digits, 28x28 (11 MiB)",
            licence="usually cited as CC BY-SA 3.0; LeCun, Cortes and Burges",
            layouts=MNIST_LAYOUTS,
            downloads={
                "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            },
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
        ),
        DataSet(
            name="neural_art",
            description="convolutional networks for neural art, trained on ImageNet; any one of three will do",
            licence="see docs/neural-art.md; ImageNet's terms allow research and education",
            layouts=(
                ("features/vgg19_conv1_1-conv3_4.npz",),
                ("features/vgg19_distilled16x_conv1_1-conv4_1.npz",),
                ("features/squeezenet1_1.npz",),
            ),
            by_hand="nobody publishes its files in this form; the project's docs/neural-art.md makes one of them, "
            "features/squeezenet1_1.npz, from https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
        ),
        DataSet(
            name="omniglot",
            description="32,460 drawings, 105x105, of 1,623 characters of 50 alphabets (15 MiB)",
            licence="MIT, Copyright 2015 Brenden Lake; cite Lake, Salakhutdinov and Tenenbaum, Science 350, 2015",
            layouts=(("images_background.zip", "images_evaluation.zip"),),
            downloads={
                "images_background.zip": "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
                "images_evaluation.zip": "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
            },
            mirrors=(
                "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/",
                "https://github.com/brendenlake/omniglot/raw/master/python/",
            ),
        ),
    )
}


def find(name: str, path: str | Path | None = None) -> Path:
    """The folder of a data set: the first complete one of ``path``, ``LEARNED_OPTIM_DATA`` and the user's cache.

    Args:
        name: one of :data:`DATA_SETS`.
        path: a folder that holds ``name/``.

    Raises:
        ValueError: the name is unknown, or the data set has no folder.
        DataNotFoundError: it is in none of these places, or incomplete.
    """
    data_set = data_set_named(name)
    if not data_set.layouts:
        raise ValueError(f"data set {name!r} has no folder: {data_set.description}")
    folders = [place / name for place in search_places(path)]
    for folder in folders:
        if any(not missing_files(layout, folder) for layout in data_set.layouts):
            return folder
    remedy = f"{data_set.by_hand};" if data_set.by_hand else f"run 'learned-optim data fetch {name}'"
    raise DataNotFoundError(
        f"data set {name!r} not found; looked in: {', '.join(_describe(data_set, folder) for folder in folders)}; "
        f"{remedy} or set LEARNED_OPTIM_DATA to a folder that holds {name}/"
    )


def search_places(path: str | Path | None = None) -> list[Path]:
    """Folders that may hold data sets, in the order in which they are searched."""
    places = (path, os.environ.get("LEARNED_OPTIM_DATA"), cache_folder())
    return [Path(place).expanduser() for place in places if place]


def cache_folder() -> Path:
    """The folder that downloads go into: ``learned_optim/data`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "learned_optim" / "data"


def data_set_named(name: str) -> DataSet:
    """The entry of :data:`DATA_SETS`; raises ``ValueError`` if there is none."""
    if name not in DATA_SETS:
        close = difflib.get_close_matches(name, DATA_SETS, n=1)
        suggestion = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown data set {name!r}{suggestion}; known: {', '.join(sorted(DATA_SETS))}")
    return DATA_SETS[name]


def _describe(data_set: DataSet, folder: Path) -> str:
    """A folder that was searched in vain, and what it lacks."""
    if not folder.is_dir():
        return f"{folder} (no such folder)"
    nearest = min(data_set.layouts, key=lambda layout: len(missing_files(layout, folder)) / len(layout))
    return f"{folder} (without {missing_files(nearest, folder)[0]})"


def load(name: str, split: str, path: str | Path | None = None) -> Images:
    """Images and labels of a split, read once and then shared: do not write to them.

    ===================  ======  ==========  ======
    data set             train   validation  test
    ===================  ======  ==========  ======
    mnist                50,000  10,000      10,000
    fashion-mnist        50,000  10,000      10,000
    cifar10              45,000  5,000       10,000
    cifar10, the subset  8,000   2,000       2,000
    digits               1,000   397         400
    ===================  ======  ==========  ======

    The test images are those of the authors, the validation images are the last of their training images. CIFAR-10 is
    read from its binary version or, where that is missing, from a subset, ``cifar10_subset.npz``. The digits have no
    such parts: they are shuffled, always in the same way; their values 0..16 are scaled to 0..255.

    Args:
        name: one of :data:`DATA_SETS`.
        split: one of :data:`SPLITS`.
        path: a folder that holds ``name/``, searched first, see :func:`find`.

    Raises:
        ValueError: the name or the split is unknown, the data set has no such splits, or a file is damaged or not what
            its name says.
        DataNotFoundError: see :func:`find`.
        ImportError: ``digits`` without scikit-learn.
    """
    data_set = data_set_named(name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not data_set.layouts:
        return digits()[split]
    if name not in READERS:
        raise ValueError(f"data set {name!r} has no classes to tell apart; those that do: {', '.join(READERS)}, digits")
    folder = find(name, path).resolve()
    return READERS[name](name, folder, split == "test")[split]


def pooled(images: Tensor, size: int) -> Tensor:
    """Images averaged down to ``size`` pixels a side, for small optimizees: ``(images, channels, size, size)`` in 0..1.

    Pixels are averaged over windows of equal area where ``size`` divides height and width; elsewhere over adjacent
    windows that overlap by at most a pixel (``adaptive_avg_pool2d``).

    Args:
        images: uint8 in 0..255 or floating point in 0..1, ``(images, channels, height, width)``.
        size: height and width of the result, at most those of the images.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (images, channels, height, width), got the shape {tuple(images.shape)}")
    if not 1 <= size <= min(images.shape[2:]):
        raise ValueError(f"size must be 1 to {min(images.shape[2:])}, got {size}")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    elif not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    return F.adaptive_avg_pool2d(images, size)
