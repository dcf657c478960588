r"""Common parts of the estimators of the *smoothed* meta-loss: antithetic pairs of particles on the same batches.

They estimate the gradient of :math:`\mathrm E_\varepsilon\, L(w + \varepsilon)` with :math:`\varepsilon \sim
N(0, \sigma^2 I)`, from pairs of particles that train the same instances on the same batches with the meta-parameters
:math:`w + \varepsilon` and :math:`w - \varepsilon` (common random numbers: what the batches do to both cancels).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from learned_optim.meta_train.common.strict import Count, Positive
from learned_optim.meta_train.estimators.base import Directions, Estimator
from learned_optim.meta_train.inner.meta_loss import Reduction
from learned_optim.meta_train.inner.particles import ParticleRule, flat_meta_parameters
from learned_optim.meta_train.inner.speedups import log_slowdowns
from learned_optim.meta_train.inner.unroll import InnerState, Unroll, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule


@dataclass(frozen=True)
class PerturbationEstimator(Estimator):
    """Base of the estimators that perturb the meta-parameters.

    The B instances are divided into G groups of b; every group has S antithetic pairs of its own. That makes
    ``K = S G`` pairs and ``2 K`` particles, in the order (sign, pair, group), at the cost of ``2 S B`` inner trainings,
    however they are grouped. More groups are more directions; with fewer, more instances share a direction. The
    meta-loss is taken over each particle's b instances, then averaged.

    Args:
        sigma: standard deviation of the perturbations (0.01 in most of the literature).
        pairs: antithetic pairs that each instance is trained with, S.
        groups: G, a divisor of B; None: every instance is a group.
    """

    sigma: Positive = 0.01
    pairs: Count = 1
    groups: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}")
        if self.pairs < 1 or (self.groups is not None and self.groups < 1):
            raise ValueError(f"pairs and groups must be at least 1, got {self.pairs} and {self.groups}")

    def pieces(self, instances: int) -> int:
        """G for this many instances.

        Raises:
            ValueError: they cannot be divided so.
        """
        groups = instances if self.groups is None else self.groups
        if instances % groups:
            raise ValueError(f"groups must divide the {instances} instances, got {groups}")
        return groups

    @torch.no_grad()
    def directions(
        self, rule: UpdateRule, pieces: int, memory: dict[str, Tensor], generator: torch.Generator
    ) -> Directions:
        """Perturbations ``(K, M)`` drawn afresh for the window, which is also credited with them."""
        noise = self.perturbations(rule, pieces, generator)
        return Directions(noise, noise, {})

    def perturbations(self, rule: UpdateRule, groups: int, generator: torch.Generator) -> Tensor:
        """Fresh ``(K, M)``, normal with deviation sigma; drawn where the generator lives."""
        weights = flat_meta_parameters(rule)
        shape = (self.pairs * groups, len(weights))
        noise = torch.randn(shape, generator=generator, dtype=weights.dtype, device=generator.device)
        return self.sigma * noise.to(weights.device)

    def reduction(self, task: VectorizedTask) -> Reduction:
        """Meta-loss of every particle, ``(2 K,)``, as a function of ``(steps, 2 K, b)`` and ``(2 K, b)``."""
        result: Reduction = vmap(self.objective.reduction(task), in_dims=(1, 0))
        return result

    def particle_window(
        self,
        rule: UpdateRule,
        noise: Tensor,
        task: VectorizedTask,
        particles: InnerState,
        steps: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Unroll]:
        """Meta-losses ``(2 K,)`` and window of the antithetic particles with the perturbations ``(K, M)``."""
        perturbed = antithetic_rule(rule, noise)
        window = unroll(perturbed, task, particles, steps, generator, outer_batches=self.outer_batches)
        if self.objective.compares:
            return log_slowdowns(window.counted, particles.initial_loss, 2 * self.pairs), window
        return self.reduction(task)(window.counted, particles.initial_loss), window

    def slopes(self, meta_losses: Tensor) -> Tensor:
        r"""Differences of the meta-losses ``(2 K,)`` of every pair, :math:`(L^+ - L^-) / 2 \sigma^2`, ``(K,)``."""
        above, below = meta_losses.chunk(2)
        return (above - below) / (2 * self.sigma**2)


def variance_of_mean(slopes: Tensor, credited: Tensor) -> dict[str, Tensor]:
    """The report of estimates ``slopes @ credited / K`` from ``(K,)`` and ``(K, M)``: their variance, summed over M.

    Estimated from the scatter of the pairs; nothing can be said of a single one.
    """
    pairs = len(slopes)
    if pairs < 2:
        return {}
    squares = slopes.square() @ credited.square().sum(1)
    mean = slopes @ credited / pairs
    return {"variance": (squares - pairs * mean.square().sum()) / (pairs * (pairs - 1))}


def antithetic(rule: UpdateRule, perturbations: Tensor) -> Tensor:
    """Meta-parameters of the particles, ``(2 K, M)``: all with plus, then all with minus."""
    return flat_meta_parameters(rule) + torch.cat([perturbations, -perturbations])


def antithetic_rule(rule: UpdateRule, perturbations: Tensor) -> ParticleRule:
    """The rule as these particles."""
    return ParticleRule(rule, antithetic(rule, perturbations))


def as_particles(state: InnerState, groups: int, copies: int) -> InnerState:
    """State of ``copies * groups`` particles, copy by copy, that all start from the one of B instances."""

    def divide(tensor: Tensor, dim: int = 0) -> Tensor:  # instances at ``dim``: (B, ...) -> (P, b, ...)
        by_group: Tensor = tensor.unflatten(dim, (groups, -1)).movedim(dim, 0)
        return by_group.repeat(copies, *[1] * tensor.dim())

    return state._replace(
        parameters=divide(state.parameters),
        grad=divide(state.grad),
        rule_state={entry: divide(tensor, 1) for entry, tensor in state.rule_state.items()},
        initial_loss=divide(state.initial_loss),
    )


def first_copy(window: Unroll, groups: int) -> tuple[InnerState, Tensor]:
    """State after the window, and losses ``(steps, B)``, of the B instances under the first particle of each group.

    The counterpart of :func:`as_particles`.
    """
    state = window.state

    def join(tensor: Tensor, dim: int = 0) -> Tensor:
        joined = tensor[:groups].movedim(0, dim).flatten(dim, dim + 1)
        return joined.clone(memory_format=torch.contiguous_format)  # no view, or the other copies would live on

    joined_state = state._replace(
        parameters=join(state.parameters),
        grad=join(state.grad),
        rule_state={entry: join(tensor, 1) for entry, tensor in state.rule_state.items()},
        initial_loss=join(state.initial_loss),
    )
    return joined_state, window.losses[:, :groups].flatten(1)
