"""A rule by its kernels: on a GPU one launch forward and two backward, on a CPU compiled C where no graph is wanted."""

from collections.abc import Callable

import torch
from torch import Tensor

from learned_optim.kernels.cache import CompilationError
from learned_optim.kernels.cpu.kernel import warn_once
from learned_optim.meta_train.inner.particles import ParticleRule, flat_meta_parameters
from learned_optim.rules import NO_CONDITIONS, Conditions, RuleState, UpdateRule
from learned_optim.step.particles import ParticleStep, training_step
from learned_optim.step.programs import is_faster_fused, unsupported_reason


class FusedRule:
    """A rule, or a :class:`ParticleRule`, by its training kernels; called as these, and differentiable once.

    Args:
        rule: gives the architecture; see :func:`learned_optim.step.programs.unsupported_reason`.
        meta_parameters: ``(M,)``, as from :func:`flat_meta_parameters`, or of P particles ``(P, M)``; float32. May
            require a gradient.
    """

    def __init__(self, rule: UpdateRule, meta_parameters: Tensor) -> None:
        self.step = training_step(rule)
        self.uses_conditions = rule.uses_conditions
        self.has_particles = meta_parameters.dim() == 2
        shapes = [parameter.shape for parameter in rule.parameters()]
        parts = torch.atleast_2d(meta_parameters).split([shape.numel() for shape in shapes], 1)
        parameters = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        particles = len(parameters[0])
        buffers = [buffer.expand(particles, *buffer.shape) for buffer in rule.buffers()]
        self.weights = self.step.weights([*parameters, *buffers])  # once for all steps that follow

    def __call__(
        self, grad: Tensor, state: RuleState, step: Tensor, conditions: Conditions = NO_CONDITIONS
    ) -> tuple[Tensor, RuleState]:
        """The update and the new state, as :meth:`UpdateRule.forward` and :meth:`ParticleRule.__call__` return them.

        Raises:
            RuntimeError: later, if the result is differentiated twice.
        """
        particles = len(self.weights)
        entries = self.step.entries
        features = [state[entry].shape[int(self.has_particles)] for entry in entries]
        flat_state = [
            state[entry].reshape(particles, count, -1) for entry, count in zip(entries, features, strict=True)
        ]
        values = None
        if self.step.program.reads_parameter:
            values = torch.as_tensor(conditions.parameter, dtype=grad.dtype, device=grad.device)
            values = values.expand_as(grad).reshape(particles, -1)
        given = step, *conditions[1:]
        update, new_state = self.step(self.weights, grad.reshape(particles, -1), flat_state, given, values)
        shaped = {entry: tensor.view(state[entry].shape) for entry, tensor in zip(entries, new_state, strict=True)}
        return update.reshape(grad.shape), shaped


def fused_equivalent(rule: object, like: Tensor) -> FusedRule | None:
    """The rule by its training kernels, or None: where none can run, and on a CPU.

    Args:
        rule: an :class:`UpdateRule` or :class:`ParticleRule`, in float32; for anything else there is no kernel.
        like: a tensor on the device of the inner training.
    """
    if not uses_training_kernels(like.device):
        return None
    if isinstance(rule, ParticleRule):
        architecture, meta_parameters = rule.rule, rule.meta_parameters
    elif isinstance(rule, UpdateRule):
        architecture = rule
        meta_parameters = torch.cat([parameter.flatten() for parameter in rule.parameters()])
    else:
        return None
    if meta_parameters.dtype != torch.float32 or unsupported_reason(architecture, like.device, torch.float32):
        return None
    return FusedRule(architecture, meta_parameters)


InPlaceStep = Callable[[Tensor, Tensor, RuleState, Tensor, Conditions], None]
"""``(parameters, grad, state, step, conditions)``: the first and the third are overwritten. In the conditions, 1 in
place of the parameter says that the rule is told it, 0 that it is not."""


def in_place_step(rule: object, like: Tensor) -> InPlaceStep | None:
    """The rule's step without a graph by its kernel for CPUs, or None where there is none.

    Args:
        rule: an :class:`UpdateRule`, or a :class:`ParticleRule`, whose arguments have the axis of particles in front.
        like: a tensor on the device of the inner training.
    """
    if isinstance(rule, ParticleRule):
        architecture, meta_parameters = rule.rule, rule.meta_parameters
    elif isinstance(rule, UpdateRule):
        architecture, meta_parameters = rule, flat_meta_parameters(rule)[None]
    else:
        return None
    if like.device.type != "cpu" or meta_parameters.dtype != torch.float32 or like.dtype != torch.float32:
        return None
    if not is_faster_fused(like.device) or unsupported_reason(architecture, like.device, torch.float32):
        return None
    try:
        step = ParticleStep(architecture, meta_parameters)
    except CompilationError as error:
        warn_once(error)
        return None
    if isinstance(rule, ParticleRule):
        return step
    return lambda parameters, grad, state, count, conditions: step(
        parameters[None], grad[None], {entry: tensor[None] for entry, tensor in state.items()}, count, conditions
    )


def uses_training_kernels(device: torch.device) -> bool:
    """Whether kernels are to be used where they can run. On a CPU that is the interpreter, which only tests want."""
    return device.type != "cpu"
