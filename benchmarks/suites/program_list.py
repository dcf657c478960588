"""Eighteen ordinary training programs, small enough for a processor; benchmarks/suites/programs.py runs them.

Each takes what makes an optimizer and a number of steps. The caller seeds torch. The test images of the data sets are
held out, 2,000 of them for the sake of time.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.suites.program_games import adversarial, judge, policy_gradient
from benchmarks.suites.program_loop import Loss, Make, TrainingOutcome, batches, evaluate, fit, perceptron, pictures
from benchmarks.suites.program_models import (
    CharacterLSTM,
    PatchTransformer,
    VariationalAutoencoder,
    character_loss,
    conv_net,
    negative_evidence,
    residual_net,
)
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.tasks import Split
from learned_optim.meta_train.tasks.implicit_picture import Sine, pixels
from learned_optim.meta_train.tasks.language_model import corpus
from learned_optim.meta_train.tasks.table import Table, rows

HELD_OUT_EXAMPLES = 2_000


class TrainingProgram(NamedTuple):
    """A training program.

    Args:
        run: function of the maker of the optimizer and the number of steps that trains and returns the outcome.
        steps: how many it takes.
        prepare: computes what all optimizers share, so that its time is nobody's.
    """

    run: Callable[[Make, int], TrainingOutcome]
    steps: int
    prepare: Callable[[], object] = lambda: None


def variational_autoencoder(make: Make, steps: int) -> TrainingOutcome:
    """Digits, pixels 0..1."""
    train, held_out = (data.pooled(data.load("mnist", split).images, 28).flatten(1) for split in ("train", "test"))
    held_out = held_out[:HELD_OUT_EXAMPLES]
    draws = batches((train, train), 64)
    return fit(VariationalAutoencoder(), make, steps, draws, (held_out, held_out), negative_evidence)


def character_lstm(make: Make, steps: int) -> TrainingOutcome:
    """Pieces of 32 characters of Python's standard library, 16 in a batch; other files are held out."""

    def draws(text: Tensor, count: int) -> Iterator[tuple[Tensor, ...]]:
        while True:
            pieces = text[torch.randint(len(text) - 32, (count, 1)) + torch.arange(33)].long()
            yield pieces[:, :-1], pieces[:, 1:]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        held_out, targets = next(draws(corpus("test"), 1_000))
    return fit(CharacterLSTM(), make, steps, draws(corpus("train"), 16), (held_out, targets), character_loss)


def classified(
    name: str, sizes: tuple[int, ...], batch_size: int, make: Make, steps: int, count: int | None = None
) -> TrainingOutcome:
    """A perceptron on the first ``count`` pictures of a data set."""
    train, held_out = pictures(name, "train", count), pictures(name, "test", HELD_OUT_EXAMPLES)
    return fit(perceptron(*sizes), make, steps, batches(train, batch_size), held_out)


def picture(make: Make, steps: int) -> TrainingOutcome:
    """One photograph by a sine network (Sitzmann et al. 2020), trained on half of its pixels.

    The score is the PSNR on these, in decibels; the held-out loss is that of the other half.
    """
    places, colours = pixels("coffee", 64)
    half = len(places) // 2
    train, held_out = (places[:half], colours[:half]), (places[half:], colours[half:])
    module = nn.Sequential(Sine(2, 64, first=True), Sine(64, 64, first=False), nn.Linear(64, 3))
    outcome = fit(module, make, steps, itertools.repeat(train), held_out, F.mse_loss)
    error, _ = evaluate(module, train, F.mse_loss)
    return outcome._replace(score=10 * math.log10(4 / error))  # colours lie in -1..1


def convolutional(make: Make, steps: int) -> TrainingOutcome:
    """A small convolutional network on 10,000 photographs."""
    parts = pictures("cifar10", "train", 8_000), pictures("cifar10", "validation", 2_000)
    train = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    return fit(conv_net(), make, steps, batches(train, 64), pictures("cifar10", "test", HELD_OUT_EXAMPLES))


def residual(make: Make, steps: int) -> TrainingOutcome:
    """A small residual network with batch norm on photographs of 16 pixels a side."""
    train, held_out = pictures("cifar10", "train", 8_000, 16), pictures("cifar10", "test", HELD_OUT_EXAMPLES, 16)
    return fit(residual_net(), make, steps, batches(train, 64), held_out)


def vision_transformer(make: Make, steps: int) -> TrainingOutcome:
    """Digits."""
    train, held_out = pictures("mnist", "train"), pictures("mnist", "test", HELD_OUT_EXAMPLES)
    return fit(PatchTransformer(), make, steps, batches(train, 64), held_out)


def table(name: Table, make: Make, steps: int) -> TrainingOutcome:
    """A perceptron with two hidden layers; six tenths of the rows are trained on, the others held out."""
    columns, targets = rows(name)
    first, outputs = round(0.6 * len(columns)), int(targets.max()) + 1
    loss: Loss = F.cross_entropy
    if targets.is_floating_point():
        loss, outputs, targets = F.mse_loss, 1, targets[:, None]
    module = perceptron(columns.shape[1], 64, 64, outputs)
    draws = batches((columns[:first], targets[:first]), 32)
    return fit(module, make, steps, draws, (columns[first:], targets[first:]), loss)


def fine_tuning(make: Make, steps: int) -> TrainingOutcome:
    """All layers of a network that was trained on five classes of photographs, on 250 photographs of the other five.

    The output layer is new, as it is where the number of classes changes.
    """
    module = conv_net(size=16, classes=5)
    fresh = {key: value for key, value in module.state_dict().items() if key.startswith("9.")}
    module.load_state_dict(pretrained() | fresh)
    train, held_out = photographs_of_classes("train", last=True), photographs_of_classes("test", last=True)
    few = tuple(tensor[:250] for tensor in train)
    return fit(module, make, steps, batches(few, 32), held_out)


PRETRAINING_STEPS = 1_000


@functools.cache
def pretrained() -> dict[str, Tensor]:
    """Weights after training with Adam on the first five classes; always the same on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = conv_net(size=16, classes=5)
        draws = batches(photographs_of_classes("train", last=False), 64)
        fit(module, torch.optim.Adam, PRETRAINING_STEPS, draws, photographs_of_classes("test", last=False))
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def photographs_of_classes(split: Split, *, last: bool) -> tuple[Tensor, Tensor]:
    """Photographs of 16 pixels a side of the first or the last five classes, which count from 0."""
    images, labels = pictures("cifar10", split, size=16)
    chosen = (labels >= 5) == last
    return images[chosen], labels[chosen] % 5


partial = functools.partial
PROGRAMS: Mapping[str, TrainingProgram] = {
    "variational-autoencoder": TrainingProgram(variational_autoencoder, 1_500),
    "character-lstm": TrainingProgram(character_lstm, 1_000),
    "batches-of-2048": TrainingProgram(partial(classified, "mnist", (784, 64, 10), 2_048), 400),
    "picture": TrainingProgram(picture, 1_000),
    "policy-gradient": TrainingProgram(policy_gradient, 150),
    "conv-net": TrainingProgram(convolutional, 1_000),
    "fashion": TrainingProgram(partial(classified, "fashion-mnist", (784, 128, 10), 64), 6_000),
    "digits": TrainingProgram(partial(classified, "mnist", (784, 128, 10), 64), 6_000),
    "friedman": TrainingProgram(partial(table, "friedman"), 2_000),
    "diabetes": TrainingProgram(partial(table, "diabetes"), 1_000),
    "cancer": TrainingProgram(partial(table, "cancer"), 1_000),
    "fashion-500": TrainingProgram(partial(classified, "fashion-mnist", (784, 128, 10), 50, count=500), 1_500),
    "fine-tuning": TrainingProgram(fine_tuning, 300, pretrained),
    "batches-of-2": TrainingProgram(partial(classified, "mnist", (784, 64, 10), 2), 5_000),
    "adversarial": TrainingProgram(adversarial, 3_000, judge),
    "vision-transformer": TrainingProgram(vision_transformer, 600),
    "residual": TrainingProgram(residual, 500),
    "narrow": TrainingProgram(partial(classified, "mnist", (784, 32, 32, 10), 64), 4_000),
}
