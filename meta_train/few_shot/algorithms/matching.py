r"""Matching networks (Vinyals et al. 2016, section 2.1.1), without full-context embeddings.

The probability of a class is the attention that its support examples get: a softmax over cosine similarities.
"""

import torch.nn.functional as F
from torch import Tensor

from learned_optim.meta_train.few_shot.algorithms.comparison import ComparisonAlgorithm

SMALLEST_PROBABILITY = 1e-12  # probability of a class: keeps logarithms finite


class Matching(ComparisonAlgorithm):
    """Attention over the support examples in a learned space."""

    def logits(self, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Logarithms of the attention that the examples of each class get, ``(B, n, ways)``."""
        similarities = F.normalize(queries, dim=-1) @ F.normalize(support, dim=-1).transpose(1, 2)
        return (similarities.softmax(-1) @ labels).clamp(min=SMALLEST_PROBABILITY).log()
