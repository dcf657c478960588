r"""Meta-SGD: a starting point and a rate for each coordinate (Li et al. 2017, algorithm 1).

The inner step is :math:`w - \alpha \odot \nabla L(w)`; both :math:`w` and the vector :math:`\alpha` are learned as in
:mod:`MAML <learned_optim.meta_train.few_shot.algorithms.maml>`, by differentiating the query loss after it.
"""

from torch import Tensor

from learned_optim.meta_train.few_shot.algorithms.maml import MAML
from learned_optim.meta_train.few_shot.inner import LearnedRates


class MetaSGD(MAML):
    """MAML with learned rates.

    Args:
        initial: the first starting point, ``(N,)``.
        lr: initial value of all rates.
        steps: inner steps in meta-training (paper: 1).
        batch_size: support examples of an inner step; None: all.
    """

    def __init__(self, initial: Tensor, lr: float, steps: int = 1, batch_size: int | None = None) -> None:
        super().__init__(initial, LearnedRates(len(initial), lr), steps, batch_size)
