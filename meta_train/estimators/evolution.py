"""The base of the estimators that need losses alone: ES, PES and ES-Single.

Their meta-gradient is ``slopes @ credited / K``: how much the meta-loss of a pair differs by its perturbation, times
the perturbations that it is credited with. These follow from a seed, so processes that share the work exchange the
slopes alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from learned_optim.meta_train.estimators.base import Combination, Directions, Part, WindowShare
from learned_optim.meta_train.estimators.perturbation import (
    PerturbationEstimator,
    as_particles,
    first_copy,
    variance_of_mean,
)
from learned_optim.meta_train.inner.particles import as_meta_grads
from learned_optim.meta_train.inner.unroll import InnerState
from learned_optim.rules import UpdateRule


@dataclass(frozen=True)
class EvolutionStrategy(PerturbationEstimator):
    """Base of the estimators that differentiate nothing.

    Args:
        perturbed: names of the rule's parameters that are perturbed, and thereby meta-trained; None: all. The fewer
            they are, the lower is the variance.
    """

    perturbed: tuple[str, ...] | None = None

    reports = ("variance",)
    persistent: ClassVar[bool]
    """Whether every particle continues from its own state; if not, all start from the state of the first ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perturbed is not None and not self.perturbed:
            raise ValueError("perturbed names at least one parameter of the rule")

    def check(self, rule: UpdateRule) -> None:
        """Raise ``ValueError`` if a name in ``perturbed`` is not that of a parameter."""
        names = [name for name, _ in rule.named_parameters()]
        if absent := [name for name in self.perturbed or () if name not in names]:
            raise ValueError(f"perturbed: the rule has no parameter {absent[0]!r}; it has {', '.join(names)}")

    def perturbations(self, rule: UpdateRule, groups: int, generator: torch.Generator) -> Tensor:
        """Fresh perturbations ``(K, M)``; zero for parameters that are not perturbed."""
        noise = super().perturbations(rule, groups, generator)
        if self.perturbed is None:
            return noise
        kept = [
            torch.full((weights.numel(),), name in self.perturbed, device=noise.device)
            for name, weights in rule.named_parameters()
        ]
        return noise * torch.cat(kept)

    def spread(self, inner: InnerState, pieces: int) -> InnerState:
        """Persistent particles, all at the same point; or the instances as they are."""
        return as_particles(inner, pieces, 2 * self.pairs) if self.persistent else inner

    def sums_length(self, meta_parameters: int, pieces: int) -> int:
        """A slope for each of the K pairs."""
        return self.pairs * pieces

    @torch.no_grad()
    def train_share(
        self, rule: UpdateRule, window: WindowShare, directions: Directions, learned: dict[str, Tensor]
    ) -> Part:
        """Train the share's particles; the slopes of its own pairs among zeros."""
        task, inner, steps, generator, share = window
        particles = inner if self.persistent else as_particles(inner, share.count, 2 * self.pairs)
        noise = share.select(directions.noise)
        meta_losses, unrolled = self.particle_window(rule, noise, task, particles, steps, generator)
        end, losses = (unrolled.state, unrolled.losses) if self.persistent else first_copy(unrolled, share.count)
        slopes = share.scatter(self.slopes(meta_losses))
        return Part(slopes, share.fraction * meta_losses.mean(), losses, end)

    @torch.no_grad()
    def combine(
        self, rule: UpdateRule, directions: Directions, sums: Tensor, learned: dict[str, Tensor]
    ) -> Combination:
        """The gradient from the slopes of all pairs."""
        credited = directions.credited
        slopes = sums.to(credited)
        grads = as_meta_grads(rule, slopes @ credited / len(credited))
        return Combination(grads, variance_of_mean(slopes, credited))
