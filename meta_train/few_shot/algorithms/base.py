"""The interface of all few-shot algorithms: learn something across tasks, and adapt a learner to one of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from learned_optim.meta_train.few_shot.episodes import Episodes, Examples
from learned_optim.meta_train.few_shot.learner import Learner


class MetaGradient(NamedTuple):
    """The meta-gradient of a meta-batch of episodes."""

    grads: tuple[Tensor, ...]
    """One tensor for each of :meth:`Algorithm.learned`."""
    meta_loss: Tensor
    """Mean loss on the query examples of the adapted learners (where it is taken anyway), 0-d."""
    initial_loss: Tensor
    """Mean loss on the support examples before the adaptation, 0-d."""


class Adapted(ABC):
    """B learners, each adapted to its task."""

    @abstractmethod
    def predict(self, inputs: Tensor, *, transductive: bool = True) -> Tensor:
        """Predictions ``(B, n, outputs)`` for ``inputs`` ``(B, n, ...)``: values, or logits of the classes.

        ``transductive``: whether batch norm may take its statistics from all inputs together, see
        :meth:`Learner.predict`.
        """


class Algorithm(nn.Module, ABC):
    """A module of what is learned across tasks (the parameters that require a gradient), and its use on a new one."""

    @abstractmethod
    def meta_gradient(self, learner: Learner, episodes: Episodes, generator: torch.Generator) -> MetaGradient:
        """The direction against which the meta-optimizer steps, from B episodes of meta-training."""

    @abstractmethod
    def adapt(self, learner: Learner, support: Examples, steps: int, generator: torch.Generator) -> Iterator[Adapted]:
        """The learners after 0, 1, ..., ``steps`` steps on ``support``; only one where there is nothing to step."""

    def learned(self) -> list[nn.Parameter]:
        """The parameters that are meta-trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
