"""Few-shot tasks whose algorithms can be followed by hand, or take a fraction of a second."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim.meta_train.few_shot.episodes import Episodes, Examples, FewShotTask
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.few_shot.sinusoid import Sinusoid
from learned_optim.meta_train.tasks import Batch, Split

MATRIX = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]])


class Offset(nn.Module):
    """Parameters minus the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.randn(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.point - inputs


class Quadratic(FewShotTask):
    """``(w - c)' A (w - c) / 2`` with a centre ``c`` for each task; each batch has one example."""

    evaluation_queries = 1

    @property
    def features(self) -> int:
        return 3

    def embedding(self) -> nn.Sequential:
        return nn.Sequential()

    def module(self) -> nn.Module:
        return Offset()

    def episodes(
        self, count: int, generator: torch.Generator, split: Split = "train", queries: int | None = None
    ) -> Episodes:
        def centres() -> Examples:
            return torch.randn(count, 1, 3, generator=generator), torch.zeros(count, 1, 3)

        return Episodes(centres(), centres())

    def losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * ((predictions @ MATRIX.to(predictions)) * predictions).sum(-1).mean(1)


@dataclass(frozen=True)
class Clouds(FewShotTask):
    """Three Gaussian classes in four dimensions, and a small perceptron with or without batch norm."""

    shots: int = 2
    queries: int = 3
    batch_norm: bool = True
    evaluation_queries: int = 3

    @property
    def ways(self) -> int:
        return 3

    @property
    def features(self) -> int:
        return 5

    @property
    def training_classes(self) -> int:
        return 6

    def embedding(self) -> nn.Sequential:
        norm = [nn.BatchNorm1d(5, track_running_stats=False)] if self.batch_norm else []
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), *norm, nn.Tanh())

    def episodes(
        self, count: int, generator: torch.Generator, split: Split = "train", queries: int | None = None
    ) -> Episodes:
        centres = 2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
        chosen = torch.rand(count, 6, generator=generator).topk(3, 1).indices

        def examples(number: int) -> Examples:
            labels = torch.arange(3).repeat_interleave(number).expand(count, -1)
            noise = torch.randn(count, 3 * number, 4, generator=generator)
            return centres[chosen.gather(1, labels)] + noise, labels

        return Episodes(examples(self.shots), examples(self.queries if queries is None else queries), chosen)


def learner_and_episodes(task: FewShotTask, count: int = 4) -> tuple[Learner, Episodes]:
    """A learner of the task and some training episodes, the same in every call."""
    return Learner(task, seed=1), task.episodes(count, torch.Generator().manual_seed(2))


def one(episodes: Episodes, index: int) -> Episodes:
    """A single episode of several."""

    def part(batch: Batch) -> Batch:
        return tuple(tensor[index : index + 1] for tensor in batch)

    classes = None if episodes.classes is None else episodes.classes[index : index + 1]
    return Episodes(part(episodes.support), part(episodes.query), classes)


def write_omniglot(folder: Path, characters: int = 40) -> None:
    """Both archives in ``folder/omniglot``, with random drawings; each character is a pattern with noise."""
    import io
    import zipfile

    from PIL import Image

    random = np.random.default_rng(0)
    (folder / "omniglot").mkdir(parents=True)
    for part, count in (("background", characters // 2), ("evaluation", characters - characters // 2)):
        with zipfile.ZipFile(folder / "omniglot" / f"images_{part}.zip", "w") as archive:
            for character in range(count):
                pattern = random.random((7, 7)) < 0.3
                for drawing in range(20):
                    ink = np.kron(pattern ^ (random.random((7, 7)) < 0.03), np.ones((15, 15), bool))
                    image = io.BytesIO()
                    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1").save(image, "PNG")
                    name = f"images_{part}/Alphabet/character{character + 1:02}/{character:04}_{drawing + 1:02}.png"
                    archive.writestr(name, image.getvalue())


SMALL_SINUSOID = Sinusoid(shots=3, queries=4, hidden=(5, 4))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)
