"""What every gradient estimator offers: windows of inner training in, meta-gradients out, explicit state between."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.unroll import InnerState, start
from learned_optim.meta_train.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule


class Trajectory(NamedTuple):
    """An inner training between two windows, as an estimator needs it: tensors only, so that it can be saved."""

    inner: InnerState
    """Of the B instances, or of particles: that is the estimator's business."""
    memory: dict[str, Tensor]
    """What else the estimator remembers of this inner training, by name; ends with it."""

    @property
    def step(self) -> Tensor:
        """Inner steps taken, 0-d."""
        return self.inner.step

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        inner = {name: value for name, value in self.inner._asdict().items() if name != "rule_state"}
        rule_state = {f"rule_state.{entry}": tensor for entry, tensor in self.inner.rule_state.items()}
        return inner | rule_state | {f"memory.{name}": tensor for name, tensor in self.memory.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Trajectory":
        """The counterpart of :meth:`tensors`."""
        inner: dict[str, Tensor] = {}
        nested: dict[str, dict[str, Tensor]] = {"rule_state": {}, "memory": {}}
        for name, tensor in tensors.items():
            place, dot, entry = name.partition(".")
            (nested[place] if dot else inner)[entry or name] = tensor
        return cls(InnerState(**inner, rule_state=nested["rule_state"]), nested["memory"])


class Estimate(NamedTuple):
    """What a window yields."""

    grads: tuple[Tensor, ...]
    """One tensor for each of the rule's parameters, in their order."""
    meta_loss: Tensor
    """0-d; of the smoothed estimators the mean over their particles."""
    losses: Tensor
    """Inner losses of the window, ``(steps, B)``; likewise."""
    state: Trajectory
    """Start of the next window."""
    report: dict[str, Tensor]
    """What an estimator has to say beyond that, by name, such as the weights of a combination."""


class Estimator(ABC):
    """A way to estimate the gradient of the meta-loss with respect to the rule's weights, window by window.

    What belongs to one inner training lies in its :class:`Trajectory`; what an estimator learns over many of them (most
    learn nothing), in its :meth:`state_dict`. Together with the generators they determine all that follows, bit by bit.
    """

    name: ClassVar[str]
    """Name in configurations."""

    def start(self, rule: UpdateRule, task: VectorizedTask, generator: torch.Generator) -> Trajectory:
        """The beginning of an inner training; draws one batch for the first gradient."""
        with torch.no_grad():
            return Trajectory(start(rule, task, generator), {})

    @abstractmethod
    def window(
        self, rule: UpdateRule, task: VectorizedTask, state: Trajectory, steps: int, generator: torch.Generator
    ) -> Estimate:
        """Go on by ``steps`` inner steps and estimate the gradient of the meta-loss over them.

        Args:
            rule: its parameters are the meta-parameters; their ``.grad`` is left alone.
            task: B instances, the same as at the start.
            state: from :meth:`start` or the window before; is not changed.
            steps: length of the window.
            generator: source of all random numbers, perturbations included.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What the estimator has learned so far, by name; copies are not made."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` has given.

        Raises:
            ValueError: the names are not those of this estimator.
        """
        if tensors:
            raise ValueError(f"{self.name} keeps no state of its own, got {', '.join(tensors)}")
