"""Task families as a user writes them outside the package: configurations name them ``helpers.user_tasks:Class``."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.tasks import Batch, Split, Task, TaskFamily

ROWS, INPUTS = 5, 3


class Regression(Task):
    """Least squares for any module from 3 inputs to 1 output; the batch is a dictionary."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self.build = build

    def module(self) -> nn.Module:
        return self.build()

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        return {
            "inputs": torch.randn(instances, ROWS, INPUTS, generator=generator, dtype=torch.get_default_dtype()),
            "targets": torch.randn(instances, ROWS, generator=generator, dtype=torch.get_default_dtype()),
        }

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(module(batch["inputs"]).squeeze(-1), batch["targets"])


class Autoencoder(nn.Module):
    """Two sub-modules, a parameter of its own and a random problem in a buffer; it has no ``forward``."""

    rotation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(INPUTS, 2), nn.Tanh())
        self.decoder = nn.Linear(2, INPUTS)
        self.log_scale = nn.Parameter(torch.randn(()))
        self.register_buffer("rotation", torch.linalg.qr(torch.randn(INPUTS, INPUTS))[0])


class Reconstruction(Task):
    """The loss uses sub-modules, a parameter and a buffer directly."""

    def module(self) -> nn.Module:
        return Autoencoder()

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        return torch.randn(instances, ROWS, INPUTS, generator=generator, dtype=torch.get_default_dtype())

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(module, Autoencoder)
        code = module.encoder(batch @ module.rotation)
        error: Tensor = module.decoder(code) * module.log_scale.exp() - batch
        loss: Tensor = error.square().mean() + code.abs().mean()
        return loss


class Slope(nn.Module):
    """A parameter and a random direction."""

    direction: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.register_buffer("direction", torch.randn(dimension))
        self.point = nn.Parameter(torch.randn(dimension))


class Plane(Task):
    """Linear in the parameters, so that inner gradients do not depend on them; the offset keeps the loss positive."""

    offset = 100.0

    def module(self) -> nn.Module:
        return Slope(4)

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        return torch.randn(instances, 4, generator=generator, dtype=torch.get_default_dtype())

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(module, Slope)
        height: Tensor = self.offset + (module.point * (module.direction + batch)).sum()
        return height


@dataclass(frozen=True)
class PlaneFamily(TaskFamily):
    """Planes at some height; below zero, a loss relative to the initial one makes no sense."""

    offset: float

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        plane = Plane()
        plane.offset = self.offset
        return plane


@dataclass(frozen=True)
class DropoutFamily(TaskFamily):
    """Regression by a linear layer behind dropout, which draws from torch's global random state."""

    probability: float = 0.5

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        return Regression(lambda: nn.Sequential(nn.Dropout(self.probability), nn.Linear(INPUTS, 1)))


class Attention(nn.Module):
    """A transformer layer over the rows of a batch; its default dropout draws inside the fused attention as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read_out = nn.Linear(INPUTS, 4), nn.Linear(4, 1)
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.read_out(self.layer(self.embed(inputs)[None])[0])
        return outputs


@dataclass(frozen=True)
class AttentionFamily(TaskFamily):
    """Regression by a transformer."""

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        return Regression(Attention)


class Overflowing(Regression):
    """Linear regression whose targets are infinite in one batch of four."""

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        batch = super().batch(instances, generator)
        overflow = torch.rand((), generator=generator) < 0.25
        return {**batch, "targets": batch["targets"] * (torch.inf if overflow else 1.0)}


@dataclass(frozen=True)
class OverflowingFamily(TaskFamily):
    """Every now and then nothing is finite."""

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        return Overflowing(lambda: nn.Linear(INPUTS, 1))


@dataclass(frozen=True)
class NeverFiniteFamily(TaskFamily):
    """Its loss is never a number."""

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        plane = Plane()
        plane.offset = float("nan")
        return plane


class OverflowingOffset(Regression):
    """Linear regression; in one batch of four the loss is infinite, but its gradient is not."""

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        overflow = torch.rand((), generator=generator) < 0.25
        offset = torch.full((instances,), torch.inf if overflow else 0.0)
        return {**super().batch(instances, generator), "offset": offset}

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = super().loss(module, batch) + batch["offset"]
        return loss


@dataclass(frozen=True)
class OverflowingOffsetFamily(TaskFamily):
    """Meta-gradients are finite even where losses are not."""

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        return OverflowingOffset(lambda: nn.Linear(INPUTS, 1))


class Held(Regression):
    """Linear regression that stops at one of its batches and waits for a file."""

    batches = 0

    def __init__(self, folder: Path, at: int) -> None:
        super().__init__(lambda: nn.Linear(INPUTS, 1))
        self.folder, self.at = folder, at

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        Held.batches += 1
        if Held.batches == self.at:
            (self.folder / "reached").touch()
            while not (self.folder / "go on").exists():
                time.sleep(0.01)
        return super().batch(instances, generator)


@dataclass(frozen=True)
class HeldFamily(TaskFamily):
    """Training stops at the batch with the number in HOLD_AT, until somebody creates ``folder/go on``."""

    folder: str

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        return Held(Path(self.folder), int(os.environ.get("HOLD_AT", "0")))


class Failing(Regression):
    """Linear regression whose data cannot be read at one of its batches."""

    batches, fail_at = 0, 0

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        Failing.batches += 1
        if Failing.batches == Failing.fail_at:
            raise OSError("disk gone")
        return super().batch(instances, generator)


@dataclass(frozen=True)
class FailingFamily(TaskFamily):
    """Raises in the middle of a window, at the batch ``Failing.fail_at``."""

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        return Failing(lambda: nn.Linear(INPUTS, 1))


class Deadly(Regression):
    """Linear regression that kills its process at one of its batches."""

    batches = 0

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        Deadly.batches += 1
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first_life and os.environ["RANK"] == "1" and Deadly.batches == int(os.environ["DIE_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(instances, generator)


@dataclass(frozen=True)
class DeadlyFamily(TaskFamily):
    """The second process of a run by torchrun dies at the batch with the number in DIE_AT, once."""

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        return Deadly(lambda: nn.Linear(INPUTS, 1))


class NotAFamily:
    """A class that is no task family, which a configuration may not name."""
