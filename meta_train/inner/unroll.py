"""Inner training under a rule: the one loop that evaluation and all gradient estimators share."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.kernels.slots import Slot, StepSettings
from learned_optim.meta_train.inner.particles import ParticleRule
from learned_optim.meta_train.inner.training_kernels import fused_equivalent, in_place_step
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.rules import Conditions, RuleState, UpdateRule
from learned_optim.rules.base import condition_arguments
from learned_optim.step.plain import apply_in_blocks

AS_META_TRAINED = StepSettings(lr=1.0, weight_decay=0.0, maximize=False)

Advance = Callable[[Tensor, Tensor, RuleState, Tensor], tuple[Tensor, RuleState]]
"""``(parameters, grad, rule_state, step) -> (parameters, rule_state)``: the update of one inner step."""

ApplyRule = Callable[..., tuple[Tensor, RuleState]]
"""``(grad, state, step) -> (update, state)``: a rule, or a function that applies it with other meta-parameters; those
with ``uses_conditions`` take :class:`Conditions` too."""


class InnerOptimizer(Protocol):
    """An optimizer of an inner training: a rule, or a differentiable version of a usual optimizer."""

    def init_state(
        self, coordinates: tuple[int, ...], *, device: torch.device | str = ..., dtype: torch.dtype = ...
    ) -> RuleState:
        """The state before the first step, as :meth:`UpdateRule.init_state`."""
        ...

    @property
    def __call__(self) -> ApplyRule:
        """``(grad, state, step) -> (update, state)``."""
        ...


class InnerState(NamedTuple):
    """The state of the inner training of B instances; all that has to be kept between two windows.

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
    counted: Tensor
    """The losses that the meta-loss is taken from: ``losses``, or their means over the outer batches of each step."""
    grads: tuple[Tensor, ...] | None = None
    """If recorded: the gradients that the rule saw, then the one after the window: ``steps + 1`` of ``([P,] B, N)``."""
    counted_grads: tuple[Tensor, ...] | None = None
    """If recorded: gradients of ``counted`` with respect to the parameters there, ``steps`` of ``([P,] B, N)``."""


def start(
    rule: InnerOptimizer, task: VectorizedTask, generator: torch.Generator, *, second_derivatives: bool = False
) -> InnerState:
    """The state before the first inner step; draws one batch for the first gradient.

    ``second_derivatives`` lets gradients flow through it to the starting point: see :func:`unroll`.
    """
    parameters = task.initial_parameters
    loss, grad = task.losses_and_grads(parameters, task.batch(generator), differentiable=second_derivatives)
    rule_state = rule.init_state(tuple(parameters.shape), device=parameters.device, dtype=parameters.dtype)
    return InnerState(parameters, grad, rule_state, torch.zeros((), device=parameters.device), loss)


def check_positive(task: VectorizedTask, state: InnerState, reason: str) -> None:
    """Raise ``ValueError`` if a loss at the start is zero or negative."""
    if bool((state.initial_loss <= 0).any()):
        lowest = float(state.initial_loss.min())
        raise ValueError(
            f"{reason}, which must be positive; {type(task.task).__name__} starts at {lowest:g}: "
            "add a constant to its loss"
        )


def unroll(
    rule: ApplyRule,
    task: VectorizedTask,
    state: InnerState,
    steps: int,
    generator: torch.Generator,
    *,
    outer_batches: int = 0,
    record_grads: bool = False,
    second_derivatives: bool = False,
) -> Unroll:
    """Take ``steps`` inner steps: update, then loss and gradient on a fresh batch.

    Differentiable with respect to the rule's weights in grad mode. Under ``torch.no_grad()`` the rule runs as it does
    in :class:`LearnedOptimizer`: in place, by its kernel for CPUs or else in blocks that stay in the cache. On a GPU it
    runs by its training kernels in either mode, where it has some.

    Args:
        rule: applied to all coordinates of all instances at once.
        task: B instances.
        state: state at the start of the window; with the axis of particles for a :class:`ParticleRule`.
        steps: length of the window.
        generator: source of the batches.
        outer_batches: fresh batches after each step that ``counted`` is taken on, from
            :meth:`VectorizedTask.outer_batch`; 0: the batch that yields the next gradient.
        record_grads: keep the gradients, for :mod:`learned_optim.meta_train.estimators`.
        second_derivatives: let meta-gradients flow through the inner gradients; if not, these count as constants.
    """
    parameters, grad, rule_state, step, initial_loss = state
    losses, grads = [], [grad]
    counted, counted_grads = [], []
    rule = fused_equivalent(rule, grad) or rule
    advance = _advance_in_place(rule, task, grad)
    if advance is None:
        advance = _advance_with_graph(rule, task)
    else:
        dense = torch.contiguous_format
        parameters = parameters.clone(memory_format=dense)
        rule_state = {entry: tensor.clone(memory_format=dense) for entry, tensor in rule_state.items()}
    for _ in range(steps):
        step = step + 1
        parameters, rule_state = advance(parameters, grad, rule_state, step)
        batch = task.batch(generator)
        loss, grad = task.losses_and_grads(parameters, batch, differentiable=second_derivatives)
        grad = grad if second_derivatives else grad.detach()
        losses.append(loss)
        outer_loss, outer_grad = loss, grad
        if outer_batches > 0:
            outer_loss, outer_grad = _outer(task, parameters, outer_batches, generator, record_grads)
        counted.append(outer_loss)
        if record_grads:
            grads.append(grad)
            counted_grads.append(outer_grad)
    final = InnerState(parameters, grad, rule_state, step, initial_loss)
    recorded = (tuple(grads), tuple(counted_grads)) if record_grads else (None, None)
    return Unroll(final, torch.stack(losses), torch.stack(counted), *recorded)


def _advance_with_graph(rule: ApplyRule, task: VectorizedTask) -> Advance:
    """The update by the rule's own ``forward``, which overwrites nothing and can be differentiated."""

    def advance(parameters: Tensor, grad: Tensor, rule_state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        conditions = condition_arguments(rule, Conditions(parameters * task.decays, progress=task.progress(step)))
        update, rule_state = rule(grad, rule_state, step, *conditions)
        return parameters + update, rule_state

    return advance


def _advance_in_place(rule: ApplyRule, task: VectorizedTask, like: Tensor) -> Advance | None:
    """The update without a graph, which overwrites parameters and rule state; None in grad mode or if there is none."""
    if torch.is_grad_enabled() or not isinstance(rule, UpdateRule | ParticleRule):
        return None
    kernel = in_place_step(rule, like)

    def by_kernel(parameters: Tensor, grad: Tensor, rule_state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        assert kernel is not None
        kernel(parameters, grad, rule_state, step, Conditions(task.decays, progress=task.progress(step)))
        return parameters, rule_state

    def in_blocks(parameters: Tensor, grad: Tensor, rule_state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        assert isinstance(rule, UpdateRule)
        apply_in_blocks(rule, [Slot(parameters, grad, rule_state, step)], AS_META_TRAINED)
        return parameters, rule_state

    if kernel is not None:
        return by_kernel
    return in_blocks if isinstance(rule, UpdateRule) and not rule.uses_conditions else None


def _outer(
    task: VectorizedTask, parameters: Tensor, batches: int, generator: torch.Generator, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss ``([P,] B)`` on fresh outer batches and, if asked for, its gradient ``([P,] B, N)``; else empty."""
    losses, grads = [], []
    for _ in range(batches):
        batch = task.outer_batch(generator)
        if with_grad:
            loss, grad = task.losses_and_grads(parameters, batch)
            grads.append(grad)
        else:
            loss = task.losses(parameters, batch)
        losses.append(loss)
    return torch.stack(losses).mean(0), torch.stack(grads).mean(0) if with_grad else parameters.new_empty(0)
