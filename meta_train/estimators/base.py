"""What every gradient estimator offers: windows of inner training in, meta-gradients out, explicit state between."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.inner.meta_loss import MetaLoss, MetaLossName
from learned_optim.meta_train.inner.shares import Share
from learned_optim.meta_train.inner.unroll import InnerState
from learned_optim.meta_train.inner.vectorize import VectorizedTask
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


class Estimate(NamedTuple):
    """What a window yields."""

    grads: tuple[Tensor, ...]
    """One tensor for each of the rule's parameters, in their order."""
    meta_loss: Tensor
    """0-d; of the smoothed estimators the mean over their particles."""
    losses: Tensor
    """Inner losses of the window, ``(steps, ...)``, of all trainings that go on: ``...`` is the shape of the state's
    ``initial_loss``."""
    state: Trajectory
    """Start of the next window."""
    report: dict[str, Tensor]
    """What an estimator has to say beyond that: of :attr:`Estimator.reports`, those that could be told."""


class Part(NamedTuple):
    """What a process's share of a window yields. Its entries are float64, and additive over the shares."""

    gradient: Tensor
    """What it adds to the window's meta-gradient, flat ``(M,)``; empty if that follows from ``sums``."""
    sums: Tensor
    """What :meth:`Estimator.combine` makes the window's meta-gradient from; empty if there is no need to."""
    meta_loss: Tensor
    """What it adds to the meta-loss, 0-d."""
    losses: Tensor
    """As in :class:`Estimate`, of its own trainings."""
    inner: InnerState
    """Of its own trainings, after the window."""


class Combination(NamedTuple):
    """What all processes make from the sums over the shares of a window."""

    grads: tuple[Tensor, ...]
    """As in :class:`Estimate`."""
    memory: dict[str, Tensor]
    """Of the :class:`Trajectory` after the window."""
    report: dict[str, Tensor]
    """As in :class:`Estimate`."""


class Estimator(ABC):
    """A way to estimate the gradient of the meta-loss with respect to the rule's weights, window by window.

    What belongs to one inner training lies in its :class:`Trajectory`; what an estimator learns over many of them (most
    learn nothing), in its :meth:`state_dict`. Together with the generators they determine all that follows, bit by bit.
    """

    name: ClassVar[str]
    """Name in configurations."""
    reports: ClassVar[tuple[str, ...]] = ()
    """Names that may stand in an :attr:`Estimate.report`; a run logs the mean of each."""
    compares_particles: ClassVar[bool] = False
    """Whether the meta-loss may be told from all particles of a window together, as ``"speedup"`` is."""

    divisible: ClassVar[bool] = True
    """Whether several processes may share a run."""

    @classmethod
    def accepted(cls, meta_loss: MetaLoss | MetaLossName) -> MetaLoss:
        """The meta-loss, or that of this name; ``ValueError`` if it compares particles and the estimator does not."""
        given = MetaLoss.of(meta_loss)
        if given.compares and not cls.compares_particles:
            raise ValueError(
                "meta_loss 'speedup' compares whole inner trainings: "
                f"take the estimator 'es' or 'output-es', got {cls.name!r}"
            )
        return given

    def start(
        self, rule: UpdateRule, task: VectorizedTask, inner: InnerState, generator: torch.Generator
    ) -> Trajectory:
        """The beginning of the estimates along an inner training.

        Args:
            rule: the rule that is meta-trained.
            task: B instances.
            inner: where they stand: at their starting points
                (:func:`learned_optim.meta_train.inner.unroll.start`) or later.
            generator: source of what is drawn once for an inner training.
        """
        pieces = self.pieces(task.instances)
        return Trajectory(self.spread(inner, pieces), self.memory(rule, pieces, generator))

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

    # Windows whose pieces are divided among processes

    def check(self, rule: UpdateRule) -> None:  # noqa: B027  (most estimators take every rule)
        """Raise ``ValueError`` for a rule that the estimator's options do not fit."""

    def pieces(self, instances: int) -> int:
        """Into how many equal parts a window of so many instances can be divided."""
        return instances

    def spread(self, inner: InnerState, pieces: int) -> InnerState:
        """What of a :class:`Trajectory` follows from the state of the instances in so many pieces alone."""
        return inner

    def memory(self, rule: UpdateRule, pieces: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The memory at the start of an inner training in so many pieces; all processes keep it alike."""
        return {}

    def lengths(self, meta_parameters: int, pieces: int) -> tuple[int, int]:
        """Lengths of :attr:`Part.gradient`, of which one travels a meta-step, and :attr:`Part.sums`, one a window."""
        return meta_parameters, 0

    def part(
        self,
        rule: UpdateRule,
        task: VectorizedTask,
        state: Trajectory,
        steps: int,
        generator: torch.Generator,
        share: Share,
    ) -> Part:
        """What :meth:`window` does, for the share's part of task and state (the memory is the whole window's).

        This one is for gradients that are means over the instances.
        """
        estimate = self.window(rule, task, state, steps, generator)
        return mean_part(estimate.grads, estimate.meta_loss, estimate.losses, estimate.state.inner, share)

    def combine(
        self, rule: UpdateRule, pieces: int, memory: dict[str, Tensor], generator: torch.Generator, sums: Tensor
    ) -> Combination:
        """The meta-gradient from the :attr:`Part.sums` of all shares; only if there are any.

        Args:
            rule: as in :meth:`part`.
            pieces: of the window.
            memory: before the window.
            generator: in the state in which :meth:`part` was given it.
            sums: added up over the shares.
        """
        raise NotImplementedError(f"{self.name} sums gradients up")

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


def mean_part(grads: tuple[Tensor, ...], meta_loss: Tensor, losses: Tensor, inner: InnerState, share: Share) -> Part:
    """A :class:`Part` from means over the share's instances."""
    gradient = share.fraction * torch.cat([grad.flatten() for grad in grads]).double()
    return Part(gradient, gradient.new_empty(0), share.fraction * meta_loss.double(), losses, inner)
