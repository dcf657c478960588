"""A residual network for larger.toml, the suite of models at the upper end of what two cores train in minutes.

    learned-optim benchmark benchmarks/suites/larger.toml --out runs/larger
    python -m benchmarks.suites.merge runs/larger larger

From the root of a checkout; the suite names this file, and asks for seconds.
"""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.tasks import Split, Task, TaskFamily
from learned_optim.meta_train.tasks.classification import ClassificationTask
from learned_optim.meta_train.tasks.conv_net import images


@dataclass(frozen=True)
class ResNetFamily(TaskFamily):
    """Classify CIFAR-10 by a residual network of 6 n + 2 layers (He et al. 2016, section 4.2) with batch norm.

    Args:
        image_size: pixels a side, to which images are averaged down.
        blocks: n, blocks in each of the three stages.
        width: channels of the first stage; the others have two and four times as many.
        batch_size: images of a batch.
    """

    image_size: int = 16
    blocks: int = 1
    width: int = 16
    batch_size: int = 64

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """The task; nothing is drawn."""
        return ResNetTask(images("cifar10", split, self.image_size, None), self.blocks, self.width, self.batch_size)


class ResNetTask(ClassificationTask):
    """The task of :class:`ResNetFamily`."""

    def __init__(self, data: tuple[Tensor, Tensor], blocks: int, width: int, batch_size: int) -> None:
        super().__init__(data, batch_size)
        self.blocks, self.width = blocks, width

    def module(self) -> nn.Module:
        """A network with PyTorch's initial weights."""
        layers: list[nn.Module] = [nn.Conv2d(3, self.width, 3, padding=1, bias=False), norm(self.width), nn.ReLU()]
        channels = self.width
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                layers.append(BasicBlock(channels, self.width * 2**stage, stride))
                channels = self.width * 2**stage
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, self.classes))


class BasicBlock(nn.Module):
    """Two convolutions beside a short cut, which is a convolution 1 x 1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([norm(outputs), norm(outputs)])
        same = stride == 1 and inputs == outputs
        self.short_cut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, signal: Tensor) -> Tensor:
        """Map ``(images, inputs, size, size)`` to ``(images, outputs, size / stride, size / stride)``."""
        hidden = F.relu(self.norms[0](self.first(signal)))
        return F.relu(self.short_cut(signal) + self.norms[1](self.second(hidden)))


def norm(channels: int) -> nn.Module:
    """Normalise by the statistics of the batch."""
    return nn.BatchNorm2d(channels, track_running_stats=False)
