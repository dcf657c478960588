"""The common parts of the programs of benchmarks/suites/programs.py: the loop of a training, and its outcome."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.tasks import Split

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
Loss = Callable[..., Tensor]
"""A function of the module's outputs and the targets that returns a 0-d tensor."""
Data = tuple[Tensor, Tensor]
"""Inputs and targets; rows belong together."""

LAST = 0.1  # share of the steps over which the training loss at the end is a mean: single batches vary too much
EVALUATIONS = 20  # of the held-out loss in a run
ROWS_AT_ONCE = 1_000  # of an evaluation: as many activations in memory
MEAN, DEVIATION = 0.5, 0.25  # of a pixel, roughly, in all the data sets of pictures here


class TrainingOutcome(NamedTuple):
    """The outcome of a training; None for a figure that the program does not have."""

    training_loss: float
    """Mean over the last tenth of the steps."""
    held_out_loss: float | None = None
    """Held-out loss after the last step."""
    best_held_out_loss: float | None = None
    """The least of about twenty in the run."""
    accuracy: float | None = None
    """Share of held-out examples classified correctly after the last step."""
    score: float | None = None
    """The program's own measure: PSNR in decibels, return of an episode, Frechet distance."""
    entropy: float | None = None
    """Entropy of the classes of what was generated, in nats."""


def pictures(name: str, split: Split, count: int | None = None, size: int | None = None) -> Data:
    """The first pictures of a split, scaled to mean zero and variance one roughly, and their classes.

    Args:
        name: name of the data set.
        split: "train", or "test" for what is held out.
        count: how many; all by default.
        size: pixels a side, to which they are averaged down; as they are by default.
    """
    images, labels = (tensor[:count] for tensor in data.load(name, split))
    return (data.pooled(images, size or images.shape[-1]) - MEAN) / DEVIATION, labels


def batches(rows: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches without end, shuffled anew in each epoch; what does not fill a batch is left out.

    As ``DataLoader(shuffle=True, drop_last=True)`` gives them.
    """
    count = len(rows[0])
    while True:
        order = torch.randperm(count)
        for first in range(0, count - size + 1, size):
            chosen = order[first : first + size]
            yield tuple(tensor[chosen] for tensor in rows)


def fit(
    module: nn.Module,
    make: Make,
    steps: int,
    draws: Iterator[tuple[Tensor, ...]],
    held_out: Data,
    loss: Loss = F.cross_entropy,
) -> TrainingOutcome:
    """The usual loop.

    Args:
        module: the module that is trained.
        make: parameters -> the optimizer.
        steps: how many.
        draws: inputs and targets of each step.
        held_out: inputs and targets of the evaluations. If ``loss`` is the cross-entropy, accuracy is measured too.
        loss: function of outputs and targets, a :data:`Loss`.
    """
    optimizer = make(module.parameters())
    losses, evaluated, accuracy = list[float](), list[float](), None
    for step, (inputs, targets) in enumerate(itertools.islice(draws, steps), 1):
        optimizer.zero_grad()
        value = loss(module(inputs), targets)
        value.backward()
        optimizer.step()
        losses.append(value.item())
        if step % math.ceil(steps / EVALUATIONS) == 0 or step == steps:
            held, accuracy = evaluate(module, held_out, loss)
            evaluated.append(held)
    return TrainingOutcome(end_of(losses), evaluated[-1], min(evaluated), accuracy if loss is F.cross_entropy else None)


@torch.no_grad()
def evaluate(module: nn.Module, held_out: Data, loss: Loss) -> tuple[float, float]:
    """Mean loss, and share of the rows whose largest output is that of their class.

    Random numbers are the same each time, and those of the training are left alone.
    """
    module.eval()
    total, correct, rows = 0.0, 0, len(held_out[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for inputs, targets in zip(*(tensor.split(ROWS_AT_ONCE) for tensor in held_out), strict=True):
            outputs = module(inputs)
            total += len(inputs) * float(loss(outputs, targets))
            if loss is F.cross_entropy:
                correct += int((outputs.argmax(1) == targets).sum())
    module.train()
    return finite(total / rows), correct / rows


def end_of(values: Sequence[float]) -> float:
    """Mean of the last ones."""
    last = values[-max(1, round(LAST * len(values))) :]
    return finite(sum(last) / len(last))


def finite(loss: float) -> float:
    """Infinity in place of NaN, so that a training that diverged is compared as the worst."""
    return math.inf if math.isnan(loss) else loss


def perceptron(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Layers of these sizes, the inputs' first; inputs may be pictures."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])
