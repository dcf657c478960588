"""Data sets: found where they are promised to be, read in fixed splits, refused where they are damaged."""

import gzip
import io
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.data import readers
from learned_optim.meta_train.data.fetch import fetch

MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR10_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")


def real(name: str) -> Path:
    """The folder of a data set in LEARNED_OPTIM_DATA; without it the test is skipped."""
    folder = os.environ.get("LEARNED_OPTIM_DATA")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"needs real data: set LEARNED_OPTIM_DATA to a folder that holds {name}/")
    return Path(folder) / name


def rows(images: Tensor) -> set[bytes]:
    """The images as a set of byte strings."""
    return {image.tobytes() for image in images.numpy()}


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data in the environment variable's folder (``set``) nor in the user's cache (``cache``)."""
    monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path / "set"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def mnist(nowhere: Path) -> Path:
    """A data folder with an ``mnist/`` whose test part is readable and whose training files are empty."""
    folder = nowhere / "synthetic" / "mnist"
    folder.mkdir(parents=True)
    images = np.zeros((10_000, 28, 28), np.uint8)
    images[1, 2, 3] = 4
    contents = (b"", b"", idx(images), idx(np.arange(10_000) % 10))
    for name, content in zip(MNIST_FILES, contents, strict=True):
        (folder / name).write_bytes(content)
    return folder.parent


def test_missing_data_names_every_place_in_order_and_the_command(nowhere: Path) -> None:
    with pytest.raises(data.DataNotFoundError) as caught:
        data.find("mnist", nowhere / "explicit")
    assert str(caught.value) == (
        f"data set 'mnist' not found; looked in: {nowhere}/explicit/mnist (no such folder), "
        f"{nowhere}/set/mnist (no such folder), {nowhere}/cache/learned_optim/data/mnist (no such folder); "
        "run 'learned-optim data fetch mnist' or set LEARNED_OPTIM_DATA to a folder that holds mnist/"
    )


def test_places_are_searched_in_order(nowhere: Path) -> None:
    places = [nowhere / "explicit", nowhere / "set", nowhere / "cache" / "learned_optim" / "data"]
    for place in reversed(places):  # each new one is searched before those that are there
        (place / "cifar10").mkdir(parents=True)
        (place / "cifar10" / "cifar10_subset.npz").touch()
        assert data.find("cifar10", nowhere / "explicit") == place / "cifar10"


def test_without_the_variables_only_the_home_cache_is_searched(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEARNED_OPTIM_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(nowhere))
    with pytest.raises(data.DataNotFoundError, match=f"looked in: {nowhere}/.cache/learned_optim/data/mnist \\(no"):
        data.find("mnist")


@pytest.mark.parametrize(
    ("name", "missing"),
    [("mnist", "t10k-images-idx3-ubyte.gz"), ("cifar10", "cifar-10-batches-bin/data_batch_3.bin")],
)
def test_incomplete_folder_is_skipped_and_its_missing_file_named(nowhere: Path, name: str, missing: str) -> None:
    folder = nowhere / "set" / name
    for file in data.DATA_SETS[name].layouts[0]:
        if file == missing:
            break
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    with pytest.raises(data.DataNotFoundError, match=f"{folder} \\(without {missing}\\)"):
        data.load(name, "train")


@pytest.mark.parametrize("call", [data.find, fetch, lambda name: data.load(name, "train")])
def test_unknown_data_set_error_lists_the_known(call: Callable[[str], object]) -> None:
    known = "cifar10, digits, fashion-mnist, mnist, neural_art, omniglot"
    with pytest.raises(ValueError, match=rf"unknown data set 'minst' \(did you mean 'mnist'\?\); known: {known}"):
        call("minst")


def test_unknown_split_error_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown split 'valid'; known: train, validation, test"):
        data.load("digits", "valid")


@pytest.mark.parametrize("call", [data.find, fetch])
def test_digits_are_refused_by_find_and_fetch(call: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"'digits' .* comes with scikit-learn"):
        call("digits")


def test_fashion_mnist_is_marked_evaluation_only() -> None:
    assert [name for name, data_set in data.DATA_SETS.items() if "evaluation only" in data_set.note] == [
        "fashion-mnist"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fashion-mnist", 0.2860)])
def test_mnist_like_sets_are_the_original_files_in_their_order(name: str, mean: float) -> None:
    folder = real(name)
    splits = {split: data.load(name, split) for split in data.SPLITS}
    for split, (images, labels) in splits.items():
        count = 50_000 if split == "train" else 10_000
        assert (images.shape, images.dtype) == ((count, 1, 28, 28), torch.uint8)
        assert (labels.shape, labels.dtype) == ((count,), torch.int64)
        assert labels.unique().tolist() == list(range(10))

    training = torch.cat([splits["train"].images, splits["validation"].images])
    assert training.sum().item() / training.numel() / 255 == pytest.approx(mean, abs=5e-5)  # published to four digits
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as stream:
        assert stream.read()[16:] == training.numpy().tobytes()
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as stream:
        assert list(stream.read()[8:]) == splits["test"].labels.tolist()


def test_mnist_label_counts_are_as_published() -> None:
    real("mnist")
    labels = torch.cat([data.load("mnist", split).labels for split in ("train", "validation")])
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # as published
    assert data.load("mnist", "test").labels.bincount().tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]


def test_mnist_splits_are_disjoint() -> None:
    real("mnist")
    train, validation, test = (rows(data.load("mnist", split).images) for split in data.SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_cifar10_subset_has_the_documented_splits() -> None:
    if not (real("cifar10") / "cifar10_subset.npz").is_file():
        pytest.skip("needs cifar10_subset.npz in LEARNED_OPTIM_DATA")
    splits = {split: data.load("cifar10", split) for split in data.SPLITS}
    assert {split: len(part.images) for split, part in splits.items()} == {
        "train": 8_000,
        "validation": 2_000,
        "test": 2_000,
    }
    images, labels = (torch.cat(tensors) for tensors in zip(splits["train"], splits["validation"], strict=True))
    assert (images.shape, images.dtype, labels.dtype) == ((10_000, 3, 32, 32), torch.uint8, torch.int64)
    assert labels.bincount().tolist() == [1_000] * 10
    assert splits["test"].labels.bincount().tolist() == [200] * 10
    # Channel means of all 50,000 images, here of a stratified fifth; they tell red, green and blue apart.
    means = images.sum((0, 2, 3)) / (10_000 * 32 * 32 * 255)
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=4e-3, rtol=0)
    # Neighbouring pixels are alike; a wrong order of axes would make them strangers.
    left, right = images[:100, ..., :-1].float(), images[:100, ..., 1:].float()
    assert torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1] > 0.9


def test_cifar10_splits_are_disjoint() -> None:
    real("cifar10")
    train, validation, test = (rows(data.load("cifar10", split).images) for split in data.SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_digits_are_scikit_learns_in_a_fixed_order() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    splits = [data.load("digits", split) for split in data.SPLITS]
    assert [len(labels) for _, labels in splits] == [1_000, 397, 400]
    images, labels = (torch.cat(tensors) for tensors in zip(*splits, strict=True))
    assert (images.shape, images.dtype, labels.dtype) == ((1_797, 1, 8, 8), torch.uint8, torch.int64)

    values, classes = datasets.load_digits(return_X_y=True)  # values 0..16
    ours = np.column_stack([np.rint(images.flatten(1).numpy() * (16 / 255)), labels])
    assert sorted(ours.tolist()) == sorted(np.column_stack([values, classes]).tolist())
    assert labels[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]  # a new shuffle would move images between splits


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    readers.digits.cache_clear()
    with pytest.raises(ImportError, match=r"pip install learned-optim\[demo\]"):
        data.load("digits", "train")


def test_plain_and_gzip_files_are_read_alike_and_once(mnist: Path) -> None:
    plain = data.load("mnist", "test", mnist)
    assert plain.images.sum() == plain.images[1, 0, 2, 3] == 4
    assert plain.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert data.load("mnist", "test", mnist / "mnist" / "..").images is plain.images

    for name in MNIST_FILES:
        path = mnist / "mnist" / name
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    packed = mnist.rename(mnist.with_name("packed"))  # another folder, so that it is read
    for ours, theirs in zip(data.load("mnist", "test", packed), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


IMAGES = idx(np.zeros((10_000, 28, 28)))
LABELS = idx(np.arange(10_000) % 10)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        pytest.param("images-idx3", gzip.compress(IMAGES, 1)[:-9], "is damaged", id="truncated gzip"),
        pytest.param("images-idx3", gzip.compress(IMAGES, 1)[:-8] + bytes(8), "is damaged", id="gzip checksum"),
        pytest.param("images-idx3", b"\x1f\x8b\x08\x00" + b"?" * 99, "is damaged", id="gzip nonsense"),
        pytest.param("images-idx3", b"", "has 0 bytes, fewer than its header", id="empty"),
        pytest.param("images-idx3", IMAGES[:-1], "holds 7839999 values instead of 7840000", id="truncated"),
        pytest.param("images-idx3", IMAGES + b"0", "holds 7840001 values instead of 7840000", id="too long"),
        pytest.param("images-idx3", LABELS, "has the magic number 2049 instead of 2051", id="wrong magic"),
        pytest.param("labels-idx1", b"<html>No such file</html>", "has the magic number", id="web page"),
        pytest.param("labels-idx1", idx(np.zeros(60_000)), r"shape \(60000,\) instead of \(10000,\)", id="count"),
        pytest.param("images-idx3", idx(np.zeros((10_000, 28, 27))), r"shape \(10000, 28, 27\)", id="image size"),
        pytest.param("labels-idx1", LABELS[:-1] + b"\x0a", r"has a label 10, beyond 0\.\.9", id="label"),
    ],
)  # fmt: skip
def test_damaged_or_foreign_idx_file_is_refused(mnist: Path, file: str, content: bytes, problem: str) -> None:
    path = mnist / "mnist" / f"t10k-{file}-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        data.load("mnist", "test", mnist)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith("; delete it and run 'learned-optim data fetch mnist'")


@pytest.fixture
def cifar10(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with the binary version of CIFAR-10, ten images a file instead of 10,000."""
    monkeypatch.setattr(readers, "_CIFAR10_IMAGES", 10)
    folder = nowhere / "synthetic" / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for number, name in enumerate(CIFAR10_FILES):
        records = np.zeros((10, 3073), np.uint8)
        records[:, 0] = np.arange(10)
        records[:, 1:1025], records[:, 1025:2049], records[:, 2049:] = number, 100, 200  # red, green, blue
        records[:, 1 + 32] = 50  # the first pixel of the second row, red
        (folder / name).write_bytes(records.tobytes())
    return folder.parent.parent


def test_cifar10_binary_version_is_read(cifar10: Path) -> None:
    train, validation, test = (data.load("cifar10", split, cifar10) for split in data.SPLITS)
    assert [tuple(part.images.shape) for part in (train, validation, test)] == [(n, 3, 32, 32) for n in (45, 5, 10)]
    assert train.images[:, 0, 0, 0].tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10 + [4] * 5
    assert validation.images[:, 0, 0, 0].tolist() == [4] * 5
    assert test.images[:, 0, 0, 0].tolist() == [5] * 10
    assert train.images[:, :, 0, 0][:, 1:].unique(dim=0).tolist() == [[100, 200]]
    assert train.images[:, 0, 1, 0].unique().tolist() == [50]
    assert validation.labels.tolist() == [5, 6, 7, 8, 9]


def test_validation_shares_the_memory_of_train(cifar10: Path) -> None:
    train, validation = (data.load("cifar10", split, cifar10).images for split in ("train", "validation"))
    assert train.untyped_storage().data_ptr() == validation.untyped_storage().data_ptr()
    assert data.load("cifar10", "train", cifar10).images is train


@pytest.mark.parametrize(
    ("content", "problem"),
    [(bytes(3072), "has 3072 bytes instead of 30730"), (b"\x0b" + bytes(30_729), "has a label 11")],
    ids=["truncated", "label"],
)
def test_damaged_cifar10_binary_file_is_refused(cifar10: Path, content: bytes, problem: str) -> None:
    path = cifar10 / "cifar10" / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_2.bin {problem}.*fetch cifar10"):
        data.load("cifar10", "train", cifar10)


def saved(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=True, **arrays)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no archive", id="foreign"),
        pytest.param(saved(x_test=np.zeros(9, np.uint8))[:-30], id="truncated"),
        pytest.param(saved(x_test=np.zeros((2_000, 1), np.uint8)), id="array missing"),
        pytest.param(saved(x_test=np.array([{}]), y_test=np.array([{}])), id="pickle"),
        pytest.param(saved(x_test=np.zeros((3, 32, 32, 3), np.uint8), y_test=np.zeros(3, np.uint8)), id="count"),
    ],
)
def test_damaged_or_foreign_cifar10_subset_is_refused(nowhere: Path, content: bytes) -> None:
    path = nowhere / "set" / "cifar10" / "cifar10_subset.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} .*delete it and run 'learned-optim data fetch cifar10'"):
        data.load("cifar10", "test")


def test_pooling_averages_equal_areas() -> None:
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    expected = torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]])  # means of the four quarters
    torch.testing.assert_close(data.pooled(image, 2), expected / 255)
    torch.testing.assert_close(data.pooled(image.double(), 2), expected.double())  # floats keep scale and precision


def test_pooling_maps_white_to_one_at_any_size() -> None:
    white = torch.full((2, 3, 28, 28), 255, dtype=torch.uint8)
    for size in (1, 8, 14, 28):
        torch.testing.assert_close(data.pooled(white, size), torch.ones(2, 3, size, size))


@pytest.mark.parametrize(
    ("images", "size", "error", "problem"),
    [
        (torch.zeros(1, 28, 28), 8, ValueError, r"\(1, 28, 28\)"),
        (torch.zeros(1, 1, 8, 8), 9, ValueError, "size must be 1 to 8, got 9"),
        (torch.zeros(1, 1, 8, 8), 0, ValueError, "size must be 1 to 8, got 0"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), 4, TypeError, "torch.int64"),
    ],
    ids=["three dimensions", "too large", "zero", "integers"],
)
def test_pooling_refuses_wrong_shapes_sizes_and_dtypes(
    images: Tensor, size: int, error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        data.pooled(images, size)
