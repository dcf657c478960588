"""Paint a photograph in the style of a painting, from files to a file: what ``learned-optim neural-art`` does."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Adam, Optimizer
from tqdm import tqdm

from learned_optim import LearnedOptimizer
from learned_optim.meta_train.common.seeds import torch_generator
from learned_optim.meta_train.style_transfer.style import (
    ArtLoss,
    FeatureNetwork,
    load_picture,
    picture_format,
    save_picture,
    to_coordinates,
    to_picture,
)

DEFAULT_RATES = {
    "adam": 0.1,
    "lbfgs": 1.0,
}  # of a coordinate of 0.25 pixels' range; for a learned rule 1, as meta-trained

LINE_SEARCH = 25  # evaluations of the loss in one step of L-BFGS, at most


@dataclass(frozen=True)
class Painting:
    """The options of a painting.

    Args:
        content: file of the photograph.
        style: file of the painting.
        out: file of the result; its name says the format.
        size: pixels of the shorter side, of content and result alike; the style is scaled to the same.
        steps: steps of the optimizer; one of L-BFGS may take several evaluations of the loss.
        optimizer: "adam", "lbfgs", or a learned rule: its name or path.
        lr: learning rate; None: 0.1 for Adam, 1 for the others.
        network: name of the feature network.
        style_weight: weight of the style, relative to the content.
        initial: "content" (fewer steps to a good picture) or "noise".
        seed: seed of the noise.
        device: device of the computation.
    """

    content: Path
    style: Path
    out: Path
    size: int = 256
    steps: int = 150
    optimizer: str = "specialised-neural-art"
    lr: float | None = None
    network: str = "vgg19"
    style_weight: float = 100.0
    initial: str = "content"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be positive, got {self.lr}")
        if not 0 <= self.style_weight < math.inf:
            raise ValueError(f"--style-weight must not be negative, got {self.style_weight}")


class Painted(NamedTuple):
    """How a painting went."""

    losses: list[float]
    """Before each step, and of what was written."""
    seconds: float
    """What the steps took."""


def paint(painting: Painting) -> Painted:
    """Paint, show a progress bar on a terminal, write the file whole.

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError: a picture is not there (``DataNotFoundError``: nor the feature network).
        ValueError: a file is no picture, a name unknown, or the loss not finite at the end.
    """
    picture_format(painting.out)  # fail before the work, not after
    content, style = (load_picture(path, painting.size) for path in (painting.content, painting.style))
    content, style = content.to(painting.device), style.to(painting.device)
    network = FeatureNetwork(painting.network)
    targets = network.targets(content, style)
    weights = ArtLoss(style=painting.style_weight)
    start = to_coordinates(content)
    if painting.initial == "noise":
        noise = torch.randn(content.shape, generator=torch_generator(painting.seed, "neural art"))
        start = noise.to(painting.device)
    coordinates = start.flatten().requires_grad_()  # a vector: the shape of a picture says nothing to an optimizer

    def picture() -> Tensor:
        return to_picture(coordinates.view(content.shape))

    optimizer = make_optimizer(painting.optimizer, coordinates, painting.lr)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = network.loss(picture(), targets, weights)
        loss.backward()
        return loss.detach()

    began = time.perf_counter()
    losses = [float(loss) for loss in descend(optimizer, closure, painting.steps)]
    seconds = time.perf_counter() - began
    losses.append(float(closure()))
    if not math.isfinite(losses[-1]):
        raise ValueError(f"the loss is {losses[-1]} after {painting.steps} steps; lower --lr")
    save_picture(picture(), painting.out)
    return Painted(losses, seconds)


def make_optimizer(name: str, coordinates: Tensor, lr: float | None) -> Optimizer:
    """The optimizer of a name, see :class:`Painting`."""
    if name == "adam":
        return Adam([coordinates], lr=DEFAULT_RATES[name] if lr is None else lr)
    if name == "lbfgs":
        rate = DEFAULT_RATES[name] if lr is None else lr
        # By default max_eval is 1 here, which would end every line search before it begins.
        return LBFGS([coordinates], lr=rate, max_iter=1, max_eval=LINE_SEARCH, line_search_fn="strong_wolfe")
    return LearnedOptimizer([coordinates], name, lr=1.0 if lr is None else lr)


def descend(optimizer: Optimizer, closure: Callable[[], Tensor], steps: int) -> list[Tensor]:
    """Take the steps under a progress bar, which a terminal sees; returns the losses before each."""
    losses: list[Tensor] = []
    with tqdm(total=steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        for _ in range(steps):
            loss = optimizer.step(closure)  # type: ignore[arg-type]  # torch's stub wants a float
            losses.append(loss)  # type: ignore[arg-type]  # as above
            bar.update()
            if not bar.disable:
                bar.set_postfix_str(f"loss {float(loss):.4g}")  # reading it waits for a GPU
    return losses
