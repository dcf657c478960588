"""What the estimators that need losses alone share: ES, PES and ES-Single.

Their meta-gradient is ``slopes @ credited / K``: what a pair has lost or won by its perturbation, times what it is
credited with. Perturbations follow from a seed, so processes that share the work exchange the slopes alone.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.estimators.base import Combination, Estimate, Part, Trajectory
from learned_optim.meta_train.estimators.perturbation import (
    PerturbationEstimator,
    as_particles,
    first_copy,
    variance_of_mean,
)
from learned_optim.meta_train.inner.meta_loss import MetaLoss, MetaLossName
from learned_optim.meta_train.inner.particles import as_meta_grads
from learned_optim.meta_train.inner.shares import Share
from learned_optim.meta_train.inner.unroll import InnerState
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule


class Directions(NamedTuple):
    """The perturbations of one window."""

    noise: Tensor
    """What moves the meta-parameters in this window, ``(K, M)``."""
    credited: Tensor
    """What its slopes are multiplied by, ``(K, M)``."""
    memory: dict[str, Tensor]
    """After the window."""


class EvolutionStrategy(PerturbationEstimator):
    """Base of these estimators.

    Args:
        sigma, pairs, groups, meta_loss: see :class:`PerturbationEstimator`.
        perturbed: names of the rule's parameters that are perturbed, and thereby meta-trained; None: all. The fewer
            they are, the lower is the variance.

    Raises:
        ValueError: a number is out of range, or no name given.
    """

    reports = ("variance",)
    persistent: ClassVar[bool]
    """Whether every particle goes on from where it stands; if not, all start from where the first ones have come to."""

    def __init__(
        self,
        sigma: float = 0.01,
        pairs: int = 1,
        groups: int | None = None,
        meta_loss: MetaLoss | MetaLossName = "mean",
        *,
        perturbed: Sequence[str] | None = None,
    ) -> None:
        super().__init__(sigma, pairs, groups, meta_loss)
        if perturbed is not None and not perturbed:
            raise ValueError("perturbed names at least one parameter of the rule")
        self.perturbed = None if perturbed is None else tuple(perturbed)

    def check(self, rule: UpdateRule) -> None:
        """See :meth:`Estimator.check`: all names in ``perturbed`` are those of parameters."""
        names = [name for name, _ in rule.named_parameters()]
        if absent := [name for name in self.perturbed or () if name not in names]:
            raise ValueError(f"perturbed: the rule has no parameter {absent[0]!r}; it has {', '.join(names)}")

    def perturbations(self, rule: UpdateRule, groups: int, generator: torch.Generator) -> Tensor:
        """See :meth:`PerturbationEstimator.perturbations`: zero for what is not perturbed."""
        noise = super().perturbations(rule, groups, generator)
        if self.perturbed is None:
            return noise
        kept = [
            torch.full((weights.numel(),), name in self.perturbed, device=noise.device)
            for name, weights in rule.named_parameters()
        ]
        return noise * torch.cat(kept)

    @abstractmethod
    def directions(
        self, rule: UpdateRule, groups: int, memory: dict[str, Tensor], generator: torch.Generator
    ) -> Directions:
        """Those of the window that begins with this memory; draws from the generator whatever is drawn."""

    def spread(self, inner: InnerState, pieces: int) -> InnerState:
        """See :meth:`Estimator.spread`: persistent particles, all at the same point."""
        return as_particles(inner, pieces, 2 * self.pairs) if self.persistent else inner

    @torch.no_grad()
    def window(
        self, rule: UpdateRule, task: VectorizedTask, state: Trajectory, steps: int, generator: torch.Generator
    ) -> Estimate:
        """See :meth:`Estimator.window`."""
        groups = self.pieces(task.instances)
        directions = self.directions(rule, groups, state.memory, generator)
        meta_losses, losses, inner = self._train(rule, directions.noise, task, state.inner, steps, generator, groups)
        grads, memory, report = self._estimate(rule, self.slopes(meta_losses), directions)
        return Estimate(grads, meta_losses.mean(), losses, Trajectory(inner, memory), report)

    def lengths(self, meta_parameters: int, pieces: int) -> tuple[int, int]:
        """See :meth:`Estimator.lengths`: K slopes."""
        return 0, self.pairs * pieces

    @torch.no_grad()
    def part(
        self,
        rule: UpdateRule,
        task: VectorizedTask,
        state: Trajectory,
        steps: int,
        generator: torch.Generator,
        share: Share,
    ) -> Part:
        """See :meth:`Estimator.part`: the slopes of its own pairs among zeros."""
        noise = share.of_pairs(self.directions(rule, share.pieces, state.memory, generator).noise)
        meta_losses, losses, inner = self._train(rule, noise, task, state.inner, steps, generator, share.count)
        slopes = share.among_pairs(self.slopes(meta_losses))
        return Part(slopes.new_empty(0), slopes, share.fraction * meta_losses.double().mean(), losses, inner)

    @torch.no_grad()
    def combine(
        self, rule: UpdateRule, pieces: int, memory: dict[str, Tensor], generator: torch.Generator, sums: Tensor
    ) -> Combination:
        """See :meth:`Estimator.combine`."""
        directions = self.directions(rule, pieces, memory, generator)
        return self._estimate(rule, sums.to(directions.credited), directions)

    def _train(
        self,
        rule: UpdateRule,
        noise: Tensor,
        task: VectorizedTask,
        inner: InnerState,
        steps: int,
        generator: torch.Generator,
        groups: int,
    ) -> tuple[Tensor, Tensor, InnerState]:
        """Meta-losses of the particles ``(2 k,)``, losses of all trainings that go on, and their state."""
        particles = inner if self.persistent else as_particles(inner, groups, 2 * self.pairs)
        meta_losses, window = self.particle_window(rule, noise, task, particles, steps, generator)
        if self.persistent:
            return meta_losses, window.losses, window.state
        first, losses = first_copy(window, groups)
        return meta_losses, losses, first

    def _estimate(self, rule: UpdateRule, slopes: Tensor, directions: Directions) -> Combination:
        credited = directions.credited
        grads = as_meta_grads(rule, slopes @ credited / len(credited))
        return Combination(grads, directions.memory, variance_of_mean(slopes, credited))
