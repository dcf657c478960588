"""Readers of the files of image data sets: whatever is wrong with a file is said with its path."""

import functools
import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CLASSES = 10  # of every data set here

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR10_TRAIN = tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6))
CIFAR10_TEST = ("cifar-10-batches-bin/test_batch.bin",)
CIFAR10_SUBSET = "cifar10_subset.npz"


class Images(NamedTuple):
    """Images and their classes. The tensors are shared by everyone who loads them: do not write to them."""

    images: Tensor
    """uint8, ``(images, channels, height, width)``."""
    labels: Tensor
    """int64, ``(images,)``."""


def missing_files(layout: tuple[str, ...], folder: Path) -> list[str]:
    """Files of a layout that are not in ``folder``."""
    return [file for file in layout if not (folder / file).is_file()]


def _divided(images: np.ndarray, labels: np.ndarray, **sizes: int) -> dict[str, Images]:
    """Consecutive splits of the given sizes, as views of one copy."""
    counts = list(sizes.values())
    parts = zip(
        torch.split(torch.from_numpy(images), counts), torch.split(torch.from_numpy(labels).long(), counts), strict=True
    )
    return {split: Images(*part) for split, part in zip(sizes, parts, strict=True)}


@functools.cache
def _mnist(name: str, folder: Path, test: bool) -> dict[str, Images]:
    part, count = ("t10k", 10_000) if test else ("train", 60_000)
    images = _read_idx(name, folder, f"{part}-images-idx3-ubyte", (count, 28, 28))
    labels = _read_idx(name, folder, f"{part}-labels-idx1-ubyte", (count,))
    images = images[:, np.newaxis]  # one channel
    return _divided(images, labels, test=count) if test else _divided(images, labels, train=50_000, validation=10_000)


def _read_idx(name: str, folder: Path, file: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of an IDX file of unsigned bytes, plain or gzip: big-endian magic number and sizes, then the values."""
    path = folder / f"{file}.gz"
    if not path.is_file():
        path = folder / file
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):  # gzip, whatever the file is called
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise _damaged(name, path, f"is damaged ({error})") from error
    header = struct.Struct(f">{1 + len(shape)}I")
    if len(content) < header.size:
        raise _damaged(name, path, f"has {len(content)} bytes, fewer than its header")
    magic, *found = header.unpack_from(content)
    expected_magic = 0x0800 + len(shape)  # unsigned bytes, number of dimensions
    if magic != expected_magic:
        raise _damaged(name, path, f"has the magic number {magic} instead of {expected_magic}")
    if tuple(found) != shape:
        raise _damaged(name, path, f"announces values of shape {tuple(found)} instead of {shape}")
    if len(content) - header.size != math.prod(shape):
        raise _damaged(name, path, f"holds {len(content) - header.size} values instead of {math.prod(shape)}")
    values = np.frombuffer(content, np.uint8, offset=header.size).reshape(shape).copy()  # writable, as torch wants it
    return _checked_labels(name, path, values) if len(shape) == 1 else values


_CIFAR10_IMAGES = 10_000  # of a file of the binary version
_CIFAR10_SHAPE = (3, 32, 32)


@functools.cache
def _cifar10(name: str, folder: Path, test: bool) -> dict[str, Images]:
    if missing_files(CIFAR10_TRAIN + CIFAR10_TEST, folder):
        return _cifar10_subset(name, folder, test)
    # A record is a label and 3,072 pixels: red, green and blue, each by rows.
    records = np.concatenate([_read_records(name, folder / file) for file in (CIFAR10_TEST if test else CIFAR10_TRAIN)])
    images = records[:, 1:].reshape(-1, *_CIFAR10_SHAPE)
    if test:
        return _divided(images, records[:, 0], test=len(records))
    held_out = _CIFAR10_IMAGES // 2
    return _divided(images, records[:, 0], train=len(records) - held_out, validation=held_out)


def _read_records(name: str, path: Path) -> np.ndarray:
    """Records of a file of the binary version of CIFAR-10, ``(images, 1 + 3072)``."""
    expected = _CIFAR10_IMAGES * (1 + math.prod(_CIFAR10_SHAPE))
    if path.stat().st_size != expected:
        raise _damaged(name, path, f"has {path.stat().st_size} bytes instead of {expected}")
    records = np.fromfile(path, np.uint8).reshape(_CIFAR10_IMAGES, -1)
    _checked_labels(name, path, records[:, 0])
    return records


def _cifar10_subset(name: str, folder: Path, test: bool) -> dict[str, Images]:
    part, count = ("test", 2_000) if test else ("train", 10_000)
    path = folder / CIFAR10_SUBSET
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            images, labels = archive[f"x_{part}"], archive[f"y_{part}"]
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:  # TypeError: one array
        raise _damaged(name, path, f"is damaged or no archive of images ({error})") from error
    if (images.shape, labels.shape) != ((count, 32, 32, 3), (count,)) or not images.dtype == labels.dtype == np.uint8:
        found = f"{images.dtype} images {images.shape} and {labels.dtype} labels {labels.shape}"
        raise _damaged(name, path, f"holds {found} instead of {count} of each in uint8")
    images, labels = np.ascontiguousarray(images.transpose(0, 3, 1, 2)), _checked_labels(name, path, labels)
    return _divided(images, labels, test=count) if test else _divided(images, labels, train=8_000, validation=2_000)


READERS = {"mnist": _mnist, "fashion-mnist": _mnist, "cifar10": _cifar10}


@functools.cache
def digits() -> dict[str, Images]:
    """The splits of scikit-learn's digits, which are always shuffled in the same way."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "data set 'digits' comes with scikit-learn, which is not installed; run 'pip install learned-optim[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)  # pixels 0..16
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    order = np.random.RandomState(0).permutation(len(labels))  # unlike Generator, the same in every NumPy release
    return _divided(images[order], labels[order], train=1_000, validation=397, test=400)


def _checked_labels(name: str, path: Path, labels: np.ndarray) -> np.ndarray:
    if labels.max() >= CLASSES:
        raise _damaged(name, path, f"has a label {labels.max()}, beyond 0..{CLASSES - 1}")
    return labels


def _damaged(name: str, path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} {problem}; delete it and run 'learned-optim data fetch {name}'")
