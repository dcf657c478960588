"""The label of the nearest support example: the baseline that learns nothing."""

import torch
from torch import Tensor

from learned_optim.meta_train.few_shot.algorithms.comparison import ComparisonAlgorithm
from learned_optim.meta_train.few_shot.learner import Learner


class NearestNeighbour(ComparisonAlgorithm):
    """Nearest neighbour by Euclidean distance: of inputs, or of features of a learner that is trained already.

    Args:
        initial: the learner's parameters, ``(N,)``.
        pixels: whether inputs are compared; else features.
    """

    def __init__(self, initial: Tensor, *, pixels: bool = True) -> None:
        super().__init__(initial)
        self.initial.requires_grad_(False)
        self.pixels = pixels

    def features(self, learner: Learner, inputs: Tensor, beside: Tensor | None = None) -> Tensor:
        """The pixels, or the features of a learner, ``(B, n, features)``."""
        return inputs.flatten(2) if self.pixels else super().features(learner, inputs, beside)

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Minus the distance to the nearest example of each class."""
        distances = torch.cdist(queries, support)[..., None]  # (B, n, m, 1)
        return -distances.masked_fill(labels[:, None] == 0, torch.inf).amin(2)
