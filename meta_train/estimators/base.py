"""The interface of every gradient estimator: windows of inner training in, meta-gradients out, explicit state between.

A window is taken in three steps, whatever the number of processes. All processes draw the same random directions
(:meth:`Estimator.directions`), each of them trains its share of the instances (:meth:`Estimator.train_share`), and from
the sums over the shares all make the same meta-gradient (:meth:`Estimator.combine`). A process by itself has the share
that is the whole, and there is nothing to add up.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from learned_optim.meta_train.common.strict import Positive, Strict
from learned_optim.meta_train.inner.meta_loss import MetaLoss, MetaLossName
from learned_optim.meta_train.inner.particles import as_meta_grads
from learned_optim.meta_train.inner.shares import Share
from learned_optim.meta_train.inner.unroll import InnerState
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule


class Trajectory(NamedTuple):
    """An inner training between two windows, as an estimator needs it: tensors only, so that it can be saved."""

    inner: InnerState
    """State of the B instances or, with an estimator of persistent particles, of these."""
    memory: dict[str, Tensor]
    """All else that the estimator remembers of this inner training, by name; ends with it."""

    @property
    def step(self) -> Tensor:
        """Inner steps taken, 0-d."""
        return self.inner.step


class Estimate(NamedTuple):
    """The outcome of a window."""

    grads: tuple[Tensor, ...]
    """One tensor for each of the rule's parameters, in their order."""
    meta_loss: Tensor
    """0-d; the mean over the particles where the meta-parameters are perturbed."""
    losses: Tensor
    """Inner losses of the window, ``(steps, ...)``, of all trainings that continue: ``...`` is the shape of the state's
    ``initial_loss``."""
    state: Trajectory
    """Start of the next window."""
    report: dict[str, Tensor]
    """Figures to be logged, by the names in :attr:`Estimator.reports`; one that cannot be computed is missing."""


class Directions(NamedTuple):
    """The random directions of a window, the same on all processes; empty tensors where nothing is perturbed."""

    noise: Tensor
    """The perturbations of the meta-parameters in this window, ``(K, M)``."""
    credited: Tensor
    """The perturbations that the differences of this window's meta-losses are multiplied by, ``(K, M)``."""
    memory: dict[str, Tensor]
    """The memory of the :class:`Trajectory` after the window."""


class WindowShare(NamedTuple):
    """The part of a window that one process trains."""

    task: VectorizedTask
    """The share's instances."""
    inner: InnerState
    """Their state at the start of the window."""
    steps: int
    """Inner steps of the window."""
    generator: torch.Generator
    """Source of all random numbers that the directions do not hold, such as batches; alike on all processes."""
    share: Share
    """Place of these instances in the whole window, and the processes that have the rest of it."""


class Part(NamedTuple):
    """The outcome of a process's share of a window. ``sums`` and ``meta_loss`` are to be added up over the shares."""

    sums: Tensor
    """The numbers that :meth:`Estimator.combine` makes the window's meta-gradient from, flat and in float64."""
    meta_loss: Tensor
    """The share's contribution to the meta-loss, 0-d."""
    losses: Tensor
    """Inner losses, as in :class:`Estimate`, of the share's own trainings."""
    inner: InnerState
    """State of the share's own trainings after the window."""


class Combination(NamedTuple):
    """The meta-gradient that all processes make from the sums over the shares of a window."""

    grads: tuple[Tensor, ...]
    """One tensor for each of the rule's parameters, in their order."""
    report: dict[str, Tensor]
    """Figures to be logged, as in :class:`Estimate`."""


@dataclass(frozen=True, kw_only=True)
class Estimator(Strict, ABC):
    """A way to estimate the gradient of the meta-loss with respect to the rule's weights, window by window.

    An estimator is its options, and does not change. What belongs to one inner training lies in its
    :class:`Trajectory`; what an estimator learns over many of them (most learn nothing) lies in a dictionary of
    tensors, ``learned``, that the run owns and the estimator updates in place. Together with the generators they
    determine all that follows, bit by bit.

    Args:
        meta_loss: how the losses of a window become one number: see :class:`MetaLoss`.
        bounded: whether no loss counts as more than the task's bound.
        clamp: no loss counts as more than this; None: as it is.
        outer_batches: fresh batches after each inner step that the meta-loss is taken on; 0: the batch of the next
            inner gradient.
        outer_split: the part of the data that these come from: ``"train"``, the data of inner training, or
            ``"validation"``, a part of them that is held out.

    Raises:
        ValueError: an option is out of range, or does not go with another.
    """

    meta_loss: MetaLossName = "mean"
    bounded: bool = False
    clamp: Positive | None = None
    outer_batches: Annotated[int, Field(ge=0)] = 0
    outer_split: Literal["train", "validation"] = "train"

    name: ClassVar[str]
    """Name in configurations."""
    reports: ClassVar[tuple[str, ...]] = ()
    """Names that may stand in an :attr:`Estimate.report`; a run logs the mean of each."""
    compares_particles: ClassVar[bool] = False
    """Whether the meta-loss may compare all particles of a window, as ``"speedup"`` does."""
    divisible: ClassVar[bool] = True
    """Whether several processes may share a run."""

    def __post_init__(self) -> None:
        if self.outer_split == "validation" and self.outer_batches == 0:
            raise ValueError('outer_split = "validation" needs outer_batches = 1 or more')
        if self.objective.compares and not self.compares_particles:
            raise ValueError(
                "meta_loss 'speedup' compares whole inner trainings: "
                f"take the estimator 'es' or 'output-es', got {self.name!r}"
            )

    @property
    def objective(self) -> MetaLoss:
        """The meta-loss with its bounds."""
        return MetaLoss(self.meta_loss, self.bounded, self.clamp, self.outer_batches)

    def to_table(self) -> dict[str, Any]:
        """Name and options, as they stand in a configuration."""
        return {"name": self.name, **asdict(self)}

    def check(self, rule: UpdateRule) -> None:
        """Raise ``ValueError`` for a rule that the estimator's options do not fit."""

    def check_learned(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` if tensors of these names are not what this estimator learns over inner trainings."""
        if names:
            raise ValueError(f"{self.name} keeps no state of its own, got {', '.join(names)}")

    # The beginning of an inner training

    def start(
        self, rule: UpdateRule, task: VectorizedTask, inner: InnerState, generator: torch.Generator
    ) -> Trajectory:
        """The beginning of the estimates along an inner training.

        Args:
            rule: the rule that is meta-trained.
            task: B instances.
            inner: the state of the inner training: at their starting points
                (:func:`learned_optim.meta_train.inner.unroll.start`) or later.
            generator: source of the random numbers that are drawn once for an inner training.
        """
        pieces = self.pieces(task.instances)
        return Trajectory(self.spread(inner, pieces), self.memory(rule, pieces, generator))

    def pieces(self, instances: int) -> int:
        """Into how many equal parts a window of so many instances can be divided."""
        return instances

    def spread(self, inner: InnerState, pieces: int) -> InnerState:
        """The state in a :class:`Trajectory` at its beginning, from that of the instances in so many pieces."""
        return inner

    def memory(self, rule: UpdateRule, pieces: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The memory at the start of an inner training in so many pieces; all processes keep it alike."""
        return {}

    # A window

    def window(
        self,
        rule: UpdateRule,
        task: VectorizedTask,
        state: Trajectory,
        steps: int,
        generator: torch.Generator,
        learned: dict[str, Tensor] | None = None,
    ) -> Estimate:
        """Train for ``steps`` inner steps and estimate the gradient of the meta-loss over them, in this process alone.

        Args:
            rule: its parameters are the meta-parameters; their ``.grad`` is left alone.
            task: B instances, the same as at the start.
            state: the state from :meth:`start` or the window before; it is not changed.
            steps: length of the window.
            generator: source of all random numbers, perturbations included.
            learned: the memory of earlier windows of the run, which is updated; None: this window is the first.
        """
        learned = {} if learned is None else learned
        share = Share.whole(self.pieces(task.instances))
        directions = self.directions(rule, share.pieces, state.memory, generator)
        window = WindowShare(task, state.inner, steps, generator, share)
        part = self.train_share(rule, window, directions, learned)
        grads, report = self.combine(rule, directions, part.sums, learned)
        return Estimate(grads, part.meta_loss, part.losses, Trajectory(part.inner, directions.memory), report)

    def directions(
        self, rule: UpdateRule, pieces: int, memory: dict[str, Tensor], generator: torch.Generator
    ) -> Directions:
        """The directions of a window of so many pieces that begins with this memory; the first to use the generator."""
        return Directions(torch.empty(0), torch.empty(0), memory)

    def sums_length(self, meta_parameters: int, pieces: int) -> int:
        """Length of :attr:`Part.sums`, for M meta-parameters: how many numbers travel for a window."""
        return meta_parameters

    @abstractmethod
    def train_share(
        self, rule: UpdateRule, window: WindowShare, directions: Directions, learned: dict[str, Tensor]
    ) -> Part:
        """Train a process's share of a window."""

    def combine(
        self, rule: UpdateRule, directions: Directions, sums: Tensor, learned: dict[str, Tensor]
    ) -> Combination:
        """The meta-gradient from the :attr:`Part.sums` of all shares, added up; these are gradients by default."""
        return Combination(as_meta_grads(rule, sums), {})


def flat_sums(grads: tuple[Tensor, ...], share: Share) -> Tensor:
    """The :attr:`Part.sums` of a gradient that is a mean over the share's instances, ``(M,)``."""
    return share.fraction * torch.cat([grad.flatten() for grad in grads]).double()
