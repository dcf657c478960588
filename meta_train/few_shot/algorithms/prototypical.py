"""Prototypical networks (Snell et al. 2017): a logit is minus the squared distance to the mean feature of a class."""

import torch
from torch import Tensor

from learned_optim.meta_train.few_shot.algorithms.comparison import ComparisonAlgorithm


class Prototypical(ComparisonAlgorithm):
    """Nearest class mean in a learned space."""

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Minus the squared distances to the mean feature of each class, ``(B, n, ways)``."""
        means = labels.transpose(1, 2) @ support / labels.sum(1)[..., None]
        return -torch.cdist(queries, means).square()
