"""Inner training under a rule: the one loop that evaluation and all gradient estimators share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.execution import Settings, Slot, apply_in_blocks
from learned_optim.meta_train.fused import fused_equivalent
from learned_optim.meta_train.particles import ParticleRule
from learned_optim.meta_train.vectorize import VectorizedTask
from learned_optim.rules import RuleState, UpdateRule

AS_META_TRAINED = Settings(lr=1.0, weight_decay=0.0, maximize=False)

ApplyRule = Callable[[Tensor, RuleState, Tensor], tuple[Tensor, RuleState]]
"""``(grad, state, step) -> (update, state)``: a rule, or a function that applies it with other meta-parameters."""


class InnerState(NamedTuple):
    """Where the inner training of B instances stands; all that has to be kept between two windows.

    Of P *particles*, which train b instances each: every entry but ``step`` has one more axis, P, at the front
    (``rule_state``: ``(P, features, b, N)``), and B is b.
    """

    parameters: Tensor
    """``(B, N)``"""
    grad: Tensor
    """Gradient at ``parameters`` on the latest batch, ``(B, N)``."""
    rule_state: RuleState
    """Entries of shape ``(features, B, N)``."""
    step: Tensor
    """Inner steps taken, 0-d."""
    initial_loss: Tensor
    """Loss at the starting point, ``(B,)``."""


class Unroll(NamedTuple):
    """A window of inner training."""

    state: InnerState
    """State after the window."""
    losses: Tensor
    """Loss after each update, on the batch of that step, ``(steps, B)``, of particles ``(steps, P, b)``."""
    grads: tuple[Tensor, ...] | None
    """If recorded: the gradients that the rule saw, then the one after the window: ``steps + 1`` of ``([P,] B, N)``."""


def start(rule: UpdateRule, task: VectorizedTask, generator: torch.Generator) -> InnerState:
    """The state before the first inner step; draws one batch for the first gradient."""
    parameters = task.initial_parameters
    loss, grad = task.losses_and_grads(parameters, task.batch(generator))
    rule_state = rule.init_state(tuple(parameters.shape), device=parameters.device, dtype=parameters.dtype)
    return InnerState(parameters, grad, rule_state, torch.zeros((), device=parameters.device), loss)


def unroll(
    rule: ApplyRule,
    task: VectorizedTask,
    state: InnerState,
    steps: int,
    generator: torch.Generator,
    *,
    record_grads: bool = False,
    second_derivatives: bool = False,
) -> Unroll:
    """Take ``steps`` inner steps: update, then loss and gradient on a fresh batch.

    Differentiable with respect to the rule's weights in grad mode. Under ``torch.no_grad()`` the rule runs as it does
    in :class:`LearnedOptimizer`: in place, and in blocks that stay in the cache. On a GPU it runs by its training
    kernels in either mode, where it has some.

    Args:
        rule: applied to all coordinates of all instances at once.
        task: B instances.
        state: where to go on from; for a :class:`ParticleRule` of P particles, theirs.
        steps: length of the window.
        generator: source of the batches.
        record_grads: keep the gradients, for :mod:`learned_optim.meta_train.estimators`.
        second_derivatives: let meta-gradients flow through the inner gradients; if not, these count as constants.
    """
    parameters, grad, rule_state, step, initial_loss = state
    losses, grads = [], [grad]
    rule = fused_equivalent(rule, grad) or rule
    fast_rule = rule if isinstance(rule, UpdateRule | ParticleRule) and not torch.is_grad_enabled() else None
    if fast_rule is not None:  # it overwrites what it is given
        parameters, rule_state = parameters.clone(), {entry: tensor.clone() for entry, tensor in rule_state.items()}
    for _ in range(steps):
        step = step + 1
        if isinstance(fast_rule, ParticleRule):
            parameters += fast_rule.advance(grad, rule_state, step)
        elif fast_rule is not None:
            apply_in_blocks(fast_rule, [Slot(parameters, grad, rule_state, step)], AS_META_TRAINED)
        else:
            update, rule_state = rule(grad, rule_state, step)
            parameters = parameters + update
        batch = task.batch(generator)
        loss, grad = task.losses_and_grads(parameters, batch, differentiable=second_derivatives)
        grad = grad if second_derivatives else grad.detach()
        losses.append(loss)
        if record_grads:
            grads.append(grad)
    final = InnerState(parameters, grad, rule_state, step, initial_loss)
    return Unroll(final, torch.stack(losses), tuple(grads) if record_grads else None)
