"""A small example of every task family, and of its variants, that needs no data but what comes with the packages."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from learned_optim.meta_train.style_transfer.style import FEATURE_NETWORKS, save_picture
from learned_optim.meta_train.tasks import (
    Augmentation,
    AutoencoderFamily,
    ConvNetFamily,
    DataTask,
    FactorizationFamily,
    FineTuningFamily,
    ImplicitPictureFamily,
    LanguageModelFamily,
    MLPFamily,
    NeuralArtFamily,
    PhysicsFamily,
    QuadraticFamily,
    ResidualFamily,
    SoftmaxRegressionFamily,
    Split,
    TableFamily,
    Task,
    TaskFamily,
    ValleyFamily,
    VisionTransformerFamily,
)
from learned_optim.meta_train.tasks.neural_art import CONTENT, Style

# Every task on images is on the digits, which come with scikit-learn.
SMALL_FAMILIES: dict[str, TaskFamily] = {
    "quadratic": QuadraticFamily(dimensions=(2, 9), condition=(1.0, 100.0), noise=0.1),
    "valleys": ValleyFamily(surfaces=("rosenbrock", "rastrigin"), dimensions=(2, 6), coordinate_scale=(0.5, 2.0)),
    "factorization": FactorizationFamily(
        size=(3, 8), rank=(1, 2), depth=(2, 3), observed=(0.5, 1.0), minibatch=(0.5, 1.0), noise=0.1
    ),
    "softmax-regression": SoftmaxRegressionFamily(
        dimensions=(2, 8), classes=(2, 4), rows=(20, 60), separation=(2.0, 3.0), batch_size=(8, 16), weight_decay=0.01
    ),
    "mlp": MLPFamily(
        dataset="digits",
        layers=(1, 2),
        width=(6, 10),
        activations=("tanh", "relu"),
        batch_size=(8, 16),
        initial="torch",
    ),
    "conv-net": ConvNetFamily(
        dataset="digits",
        layers=(1, 2),
        channels=(2, 4),
        kernel_sizes=(3,),
        hidden=(3, 8),
        activations=("tanh", "relu"),
        norms=("none", "batch", "layer"),
        batch_size=(4, 8),
    ),
    "residual": ResidualFamily(
        dataset="digits", blocks=(1, 2), width=(4, 8), hidden=(4, 8), activations=("tanh", "gelu"), batch_size=(4, 8)
    ),
    "vision-transformer": VisionTransformerFamily(
        dataset="digits", image_size=8, width=(3, 8), blocks=(1, 2), batch_size=(4, 8)
    ),
    "fine-tuning": FineTuningFamily(
        dataset="digits",
        image_size=8,
        networks=("perceptron", "conv-net"),
        width=(12, 20),
        examples=(40, 80),
        batch_size=(4, 8),
        pretraining=10,
    ),
    "autoencoder": AutoencoderFamily(
        dataset="digits", image_size=4, width=(4, 8), code=(2, 3), activations=("tanh", "elu"), batch_size=(4, 8)
    ),
    "language-model": LanguageModelFamily(
        models=("rnn", "gru"), width=(3, 6), layers=(1, 2), length=(3, 5), batch_size=(2, 4)
    ),
    "table": TableFamily(table="wine", width=(4, 8), activations=("tanh", "gelu"), batch_size=(4, 8)),
    "implicit-picture": ImplicitPictureFamily(size=32, networks=("sine", "fourier"), width=(4, 8), batch_size=(4, 8)),
    "neural-art": NeuralArtFamily(size=32, styles=("starry_night", "great_wave", "shipwreck")),
    "physics": PhysicsFamily(modes=(1, 3), width=(3, 6), points=(4, 8)),
}

VARIANTS: dict[str, TaskFamily] = {
    "quadratic-badly-scaled": QuadraticFamily(
        dimensions=(5, 5), condition=(30.0, 30.0), spectrum="random", rotated=False, coordinate_scale=(0.1, 10.0)
    ),
    "rastrigin": ValleyFamily(surfaces=("rastrigin",), dimensions=(3, 3), steepness=(1.0, 1.0), rotated=False),
    "softmax-regression-images": SoftmaxRegressionFamily(dataset="digits", image_size=4, batch_size=(4, 4)),
    "residual-batch-norm": ResidualFamily(
        dataset="digits", image_size=4, width=(4, 4), hidden=(4, 4), activations=("tanh",), norms=("batch",)
    ),
    "residual-post-norm": ResidualFamily(
        dataset="digits", image_size=4, width=(4, 4), hidden=(4, 4), activations=("gelu",), places=("post",)
    ),
    "autoencoder-cross-entropy": AutoencoderFamily(
        dataset="digits", image_size=4, width=(4, 4), code=(2, 2), activations=("elu",), losses=("cross-entropy",)
    ),
    "fine-tuning-after-another-data-set": FineTuningFamily(
        dataset="digits",
        pretrained_on="digits",
        image_size=8,
        width=(5, 5),
        examples=(60, 60),
        batch_size=(4, 4),
        pretraining=10,
    ),
    "language-model-prose": LanguageModelFamily(
        text="prose", width=(4, 4), layers=(1, 1), length=(4, 4), batch_size=(2, 2)
    ),
    "lstm": LanguageModelFamily(models=("lstm",), width=(4, 4), layers=(1, 1), length=(4, 4), batch_size=(2, 2)),
    "transformer": LanguageModelFamily(
        models=("transformer",), width=(5, 5), layers=(1, 1), length=(4, 4), batch_size=(2, 2)
    ),
    "neural-art-squeezenet": NeuralArtFamily(size=32, network="squeezenet", initial="content"),
    "neural-art-vgg19": NeuralArtFamily(size=32, network="vgg19"),
    "table-of-numbers": TableFamily(table="friedman", layers=(1, 1), width=(4, 4), batch_size=(4, 4)),
    "implicit-picture-fourier": ImplicitPictureFamily(
        size=32, networks=("fourier",), layers=(1, 1), width=(4, 4), batch_size=(4, 4)
    ),
    "physics-sine": PhysicsFamily(modes=(2, 2), width=(4, 4), points=(5, 5), activations=("sine",)),
    "augmented": Augmentation(loss_factor=(10.0, 10.0), label_noise=(0.2, 0.2), batch_size=(16, 16)).of(
        MLPFamily(dataset="digits", width=(8, 8), initial="torch", activations=("tanh",))
    ),
}


def sampled(family: TaskFamily, split: Split) -> Task:
    """A task whose data have PyTorch's default type, as comparisons in float64 need it."""
    task = family.sample(np.random.default_rng(0), split)
    inner = getattr(task, "task", task)
    if isinstance(inner, DataTask):
        dtype = torch.get_default_dtype()
        inner.data = tuple(each.to(dtype) if each.is_floating_point() else each for each in inner.data)
    return task


def build(family: TaskFamily) -> Task:
    """A task to train on; of a family for evaluation only, one of the test."""
    return sampled(family, "test" if family.evaluation_only else "train")


BUILDERS: dict[str, Callable[[], Task]] = {
    name: partial(build, family) for name, family in (SMALL_FAMILIES | VARIANTS).items()
}


def write_neural_art(folder: Path) -> None:
    """The files that neural art needs, with random networks of few channels and small random pictures."""
    rng = np.random.default_rng(0)
    features = folder / "neural_art" / "features"
    features.mkdir(parents=True)

    def convolution(name: str, inputs: int, outputs: int, size: int) -> dict[str, np.ndarray]:
        weight = rng.normal(0, (inputs * size**2 / 2) ** -0.5, (outputs, inputs, size, size))
        return {f"{name}.weight": weight.astype(np.float16), f"{name}.bias": np.full(outputs, 0.1, np.float32)}

    for architecture in FEATURE_NETWORKS.values():
        arrays: dict[str, np.ndarray] = {}
        channels = 3
        for layer in architecture.layers:
            if layer.startswith("fire"):
                arrays |= convolution(f"{layer}.squeeze1x1", channels, 2, 1)
                arrays |= convolution(f"{layer}.expand1x1", 2, 2, 1) | convolution(f"{layer}.expand3x3", 2, 2, 3)
                channels = 4
            elif layer == "conv0":
                arrays |= convolution(layer, 3, 3, 1)
            elif layer != "pool":
                arrays |= convolution(layer, channels, 4, 3)
                channels = 4
        if architecture.bgr:  # pixels up to 255: keep the activations of order one
            arrays["conv1_1.weight"] = arrays["conv1_1.weight"] / 100
        np.savez(features / architecture.file, allow_pickle=False, **arrays)
    names = [("content", name) for names in CONTENT.values() for name in names]
    names += [("style", name) for name in get_args(Style)]
    for number, (kind, name) in enumerate(names):
        (folder / "neural_art" / kind).mkdir(exist_ok=True)
        pixels = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(number))
        pixels = torch.nn.functional.interpolate(pixels[None], (34, 40), mode="bilinear")[0]
        save_picture(pixels, folder / "neural_art" / kind / f"{name}.jpg")
