r"""Truncated backpropagation through time: the gradient of the meta-loss over a window of inner steps.

With inner gradients treated as constants (Andrychowicz et al. 2016, section 2: "the gradients of the optimizee do not
depend on the optimizer parameters") the chain rule needs no second pass through the optimizee. Write :math:`u_s` for
the update of inner step :math:`s` and :math:`g_t` for the gradient of the loss :math:`L_t` after update :math:`t`.
Since the parameters after step :math:`t` are :math:`p_0 + \sum_{s \le t} u_s`,

.. math:: \nabla \sum_t w_t L_t = \sum_s \Big( \sum_{t \ge s} w_t g_t \Big) \cdot \nabla u_s .

The unroll has seen every :math:`g_t` already. So the window is run once without autograd, and then the rule alone is
replayed on the recorded gradients, each update dotted with its *gradient-to-go*. A coordinatewise rule may be replayed
on a random sample of the coordinates: with importance weights the estimate stays unbiased, at a fraction of the cost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.common.strict import Count
from learned_optim.meta_train.estimators.base import Directions, Estimator, Part, WindowShare, flat_sums
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.inner.meta_loss import MetaLoss, MetaLossName, Reduction
from learned_optim.meta_train.inner.training_kernels import fused_equivalent
from learned_optim.meta_train.inner.unroll import ApplyRule, InnerState, Unroll, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.rules import Conditions, UpdateRule
from learned_optim.rules.base import condition_arguments

ALONE = World()


class WindowGradient(NamedTuple):
    """The meta-gradient of a window, as :func:`truncated_bptt` returns it."""

    grads: tuple[Tensor, ...]
    """One tensor for each of the rule's parameters, in their order; NaN if an inner gradient was not finite."""
    meta_loss: Tensor
    """0-d."""
    losses: Tensor
    """Inner losses of the window, ``(steps, B)``."""
    state: InnerState
    """Detached inner state after the window: the start of the next."""


def truncated_bptt(
    rule: UpdateRule,
    task: VectorizedTask,
    state: InnerState,
    steps: int,
    generator: torch.Generator,
    *,
    meta_loss: MetaLoss | MetaLossName = "mean",
    second_derivatives: bool = False,
    replay_coordinates: int | None = None,
    team: World = ALONE,
) -> WindowGradient:
    """Gradient of the meta-loss over ``steps`` inner steps from ``state``, with respect to the rule's weights.

    Args:
        rule: its parameters are the meta-parameters; their ``.grad`` is left alone.
        task: B instances.
        state: start of the window; no gradient flows into it.
        steps: truncation length.
        generator: source of the batches, and of the choice of coordinates.
        meta_loss: the meta-loss or its name, from :mod:`learned_optim.meta_train.inner.meta_loss`.
        second_derivatives: differentiate through the inner gradients too (no shortcut then: slower).
        replay_coordinates: take the meta-gradient through this many coordinates at most, drawn from all ``B * N`` by
            :func:`sample_coordinates`; None takes all. Unbiased, but not available with second derivatives.
        team: processes that take neighbouring instances of the same window.

    Raises:
        ValueError: ``replay_coordinates`` is combined with ``second_derivatives``.
    """
    check_replay(second_derivatives, replay_coordinates)
    meta_loss = MetaLoss.of(meta_loss)
    meta_grads, value, window = backpropagate(
        lambda: rule,
        tuple(rule.parameters()),
        task,
        state,
        steps,
        generator,
        meta_loss.reduction(task),
        meta_loss.outer_batches,
        second_derivatives,
        replay_coordinates,
        team,
    )
    return WindowGradient(meta_grads, value, window.losses, window.state)


def check_replay(second_derivatives: bool, replay_coordinates: int | None) -> None:
    """Raise ``ValueError`` if coordinates are to be sampled together with second derivatives, or none are."""
    if replay_coordinates is not None and replay_coordinates < 1:
        raise ValueError(f"replay_coordinates must be at least 1, got {replay_coordinates}")
    if second_derivatives and replay_coordinates is not None:
        raise ValueError("replay_coordinates needs constant inner gradients; set second_derivatives = false")


def backpropagate(
    build: Callable[[], ApplyRule],
    meta_parameters: tuple[Tensor, ...],
    task: VectorizedTask,
    state: InnerState,
    steps: int,
    generator: torch.Generator,
    meta_loss: Reduction,
    outer_batches: int,
    second_derivatives: bool,
    replay_coordinates: int | None,
    team: World = ALONE,
) -> tuple[tuple[Tensor, ...], Tensor, Unroll]:
    """Gradients of the meta-loss of a window, the meta-loss and the window, all detached.

    Of a :class:`ParticleRule` with its state, it differentiates the sum of the particles' meta-losses: the gradient
    with respect to the meta-parameters ``(P, M)`` has one row a particle. ``build`` makes the rule from the
    meta-parameters; it is called in grad mode. The processes of ``team`` take neighbouring instances, or particles.
    """
    differentiate = _through_the_unroll if second_derivatives else _by_replay
    with torch.enable_grad():
        rule = build()
    grads, value, window = differentiate(
        rule, meta_parameters, task, state, steps, generator, meta_loss, outer_batches, replay_coordinates, team
    )
    filled = tuple(
        torch.zeros_like(parameter) if grad is None else grad
        for parameter, grad in zip(meta_parameters, grads, strict=True)
    )
    window = Unroll(detached(window.state), window.losses.detach(), window.counted.detach())
    return filled, value.detach(), window


def _by_replay(
    rule: ApplyRule,
    meta_parameters: tuple[Tensor, ...],
    task: VectorizedTask,
    state: InnerState,
    steps: int,
    generator: torch.Generator,
    meta_loss: Reduction,
    outer_batches: int,
    replay_coordinates: int | None,
    team: World,
) -> tuple[tuple[Tensor | None, ...], Tensor, Unroll]:
    with torch.no_grad():
        window = unroll(rule, task, state, steps, generator, outer_batches=outer_batches, record_grads=True)
    assert window.grads is not None and window.counted_grads is not None  # noqa: PT018  # for the type checker
    losses = window.counted.requires_grad_()
    with torch.enable_grad():
        value = meta_loss(losses, state.initial_loss)
        (weights,) = torch.autograd.grad(value.sum(), losses)

    grads = [grad.flatten(-2) for grad in window.grads]  # steps + 1 of ([P,] coordinates)
    grads_to_go = [grad.flatten(-2) for grad in _grads_to_go(window.counted_grads, weights)]
    own_grads = [_weighted(*pair).flatten(-2) for pair in zip(window.counted_grads, weights, strict=True)]
    rule_state = {entry: tensor.flatten(-2) for entry, tensor in state.rule_state.items()}
    values, decays = (tensor.flatten(-2) for tensor in (state.parameters, task.decays.expand_as(state.parameters)))
    coordinates = grads[0].shape[-1]
    particles = grads[0].dim() > 1  # then every process of the team has all coordinates, of some particles
    in_all = coordinates if particles else task.siblings * task.coordinates
    if replay_coordinates is not None and replay_coordinates < in_all:
        rows = torch.cat([to_go.view(-1, coordinates) for to_go in grads_to_go]) if particles else grads_to_go
        teams = {"same": team} if particles else {"others": team}
        if task.instances < task.siblings and not particles:  # weighed as in the mean over all instances
            rows = [row * (task.instances / task.siblings) for row in rows]
        chosen, factors = sample_coordinates(rows, replay_coordinates, generator, **teams)
        grads = [grad[..., chosen] for grad in grads]
        grads_to_go = [to_go[..., chosen] * factors for to_go in grads_to_go]
        own_grads = [grad[..., chosen] * factors for grad in own_grads]
        values, decays = values[..., chosen], decays[..., chosen]
        rule_state = {entry: tensor[..., chosen] for entry, tensor in rule_state.items()}

    surrogate = torch.zeros((), device=grads[0].device, dtype=grads[0].dtype)
    with torch.enable_grad():
        rule = fused_equivalent(rule, surrogate) or rule
        for index in range(steps):
            step = state.step + index + 1
            given = condition_arguments(rule, Conditions(values * decays, progress=task.progress(step)))
            update, rule_state = rule(grads[index], rule_state, step, *given)
            if given:  # later updates depend on the values that this one leads to
                values = values + update
                surrogate = surrogate + (values * own_grads[index]).sum()
            else:
                surrogate = surrogate + (update * grads_to_go[index]).sum()
        meta_grads = torch.autograd.grad(surrogate, meta_parameters, allow_unused=True)
    seen = (*window.grads, *(window.counted_grads if outer_batches > 0 else ()))
    if not all(math.isfinite(grad.sum()) for grad in seen):  # a sample of the coordinates need not show it
        meta_grads = tuple(torch.full_like(parameter, torch.nan) for parameter in meta_parameters)
    return meta_grads, value, window


def _grads_to_go(grads: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Gradients after each step ``([P,] B, N)``, weighted with ``(steps, [P,] B)``, summed over later steps too."""
    to_go = [_weighted(grads[-1], weights[-1])]
    for grad, weight in zip(reversed(grads[:-1]), weights[:-1].flip(0), strict=True):
        to_go.append(_weighted(grad, weight).add_(to_go[-1]))
    return to_go[::-1]


def _weighted(grad: Tensor, weight: Tensor) -> Tensor:
    return weight[..., None] * grad


def sample_coordinates(
    grads_to_go: Tensor | Sequence[Tensor],
    count: int,
    generator: torch.Generator,
    *,
    same: World = ALONE,
    others: World = ALONE,
) -> tuple[Tensor, Tensor]:
    """Draw coordinates with replacement, in proportion to the norm of their gradient-to-go ``(steps, coordinates)``.

    That norm bounds what a coordinate can contribute to the meta-gradient. A few coordinates, such as a network's
    output layer, contribute most of it; drawn uniformly, they would be missed most of the time.

    Args:
        grads_to_go: the coordinates' gradients-to-go, ``(steps, coordinates)`` or one row a step.
        count: draws.
        generator: source of the draws.
        same: processes that have further rows of the same coordinates.
        others: processes that have further coordinates, in the order of their ranks; all are drawn from together.

    Returns:
        Indices ``(count,)`` and the factors ``(count,)`` on their contributions that make the sum unbiased; with
        ``others``, those that fell on this process.
    """
    squares = torch.zeros_like(grads_to_go[0])
    for row in grads_to_go:  # row by row: torch.linalg.vector_norm over the first dimension is far slower
        squares.addcmul_(row, row)
    norms = same.sum(squares).sqrt_().double().cpu()
    # Inverts the distribution function: torch.multinomial adds up in float32, and misses the tail of many coordinates.
    distribution = norms.cumsum(0)
    sums = others.gather(distribution[-1])
    if not 0 < float(sums.sum()) < torch.inf:  # nothing to go by: all contributions vanish, or are not finite
        norms = torch.ones_like(norms)
        distribution = norms.cumsum(0)
        sums = others.gather(distribution[-1])
    ends = sums.cumsum(0)
    total = ends[-1]
    draws = total * torch.rand(count, dtype=torch.float64, generator=generator)
    process = torch.searchsorted(ends, draws, right=True).clamp(max=len(ends) - 1)
    draws = draws[process == others.rank] - (ends - sums)[others.rank]
    chosen = torch.searchsorted(distribution, draws, right=True).clamp(max=len(norms) - 1)
    factors = (total / (count * norms[chosen])).to(squares)
    return chosen.to(squares.device), factors


def _through_the_unroll(
    rule: ApplyRule,
    meta_parameters: tuple[Tensor, ...],
    task: VectorizedTask,
    state: InnerState,
    steps: int,
    generator: torch.Generator,
    meta_loss: Reduction,
    outer_batches: int,
    replay_coordinates: int | None,
    team: World,
) -> tuple[tuple[Tensor | None, ...], Tensor, Unroll]:
    with torch.enable_grad():
        window = unroll(rule, task, state, steps, generator, outer_batches=outer_batches, second_derivatives=True)
        value = meta_loss(window.counted, state.initial_loss)
        return torch.autograd.grad(value.sum(), meta_parameters, allow_unused=True), value, window


def detached(state: InnerState) -> InnerState:
    """A state without its graph."""
    rule_state = {entry: tensor.detach() for entry, tensor in state.rule_state.items()}
    return state._replace(parameters=state.parameters.detach(), grad=state.grad.detach(), rule_state=rule_state)


@dataclass(frozen=True)
class TruncatedBPTT(Estimator):
    """The estimator of :func:`truncated_bptt`.

    Args:
        second_derivatives: differentiate through the inner gradients too.
        replay_coordinates: take the meta-gradient through this many coordinates at most, drawn by importance; None:
            all. Not with second derivatives.
    """

    second_derivatives: bool = False
    replay_coordinates: Count | None = None

    name = "truncated-bptt"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_replay(self.second_derivatives, self.replay_coordinates)

    def train_share(
        self, rule: UpdateRule, window: WindowShare, directions: Directions, learned: dict[str, Tensor]
    ) -> Part:
        """The gradient of the share's instances."""
        grads, meta_loss, losses, inner = truncated_bptt(
            rule,
            window.task,
            window.inner,
            window.steps,
            window.generator,
            meta_loss=self.objective,
            second_derivatives=self.second_derivatives,
            replay_coordinates=self.replay_coordinates,
            team=window.share.team,
        )
        return Part(flat_sums(grads, window.share), window.share.fraction * meta_loss, losses, inner)
