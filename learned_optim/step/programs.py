"""The way from a rule to its kernels: the program traced from its ``forward``, and the plan of the fused step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from learned_optim.kernels import availability
from learned_optim.kernels.cache import CompilationError
from learned_optim.kernels.cpu.kernel import kernel, warn_once
from learned_optim.kernels.devices import interpreting, supported_dtypes, uses_c
from learned_optim.kernels.launch import Plan
from learned_optim.kernels.sources.registry import Sources, register
from learned_optim.kernels.tracing.program import Program
from learned_optim.kernels.tracing.trace import NotCoordinatewiseError, trace
from learned_optim.rules import Conditions, RuleState, UpdateRule
from learned_optim.step.modes import without_autocast

MOST_MULTIPLY_ADDS = 1 << 14
"""The most multiply-adds of a coordinate on a GPU: larger networks fit neither the instruction cache nor, with their
state, the registers."""


def unsupported_reason(rule: UpdateRule, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why parameters of this device and dtype cannot be stepped by a kernel, None if they can.

    Every rule that is coordinatewise has a kernel: it is made from its ``forward``.
    """
    dtypes = supported_dtypes(device)
    if dtype not in dtypes:
        return f"fused kernels on {device.type} serve parameters of {', '.join(map(str, dtypes))}, not of {dtype}"
    reason = availability.unavailable_reason(device)
    if reason is not None:
        return reason
    found = sources_of(rule, arithmetic_dtype(dtype))
    if isinstance(found, str):
        return f"no fused kernel can be made of the rule {rule.name!r} ({type(rule).__name__}): {found}"
    if not uses_c(device) and found.multiply_adds > MOST_MULTIPLY_ADDS:
        return (
            f"fused kernels on a GPU serve networks of up to {MOST_MULTIPLY_ADDS:,} multiply-adds a coordinate; the "
            f"rule {rule.name!r} has {found.multiply_adds:,}"
        )
    return None


def is_faster_fused(device: torch.device) -> bool:
    """Whether a kernel is the fastest path on this device. Triton's interpreter, which only tests use, is not."""
    return not (device.type == "cpu" and interpreting())


def plan_if_wanted(
    rule: UpdateRule, device: torch.device, dtype: torch.dtype, recurrent: torch.dtype, fused: bool | None
) -> Plan | None:
    """The rule's plan; None if its kernel is not to be used or cannot run.

    Args:
        rule: a rule on the device.
        device: the device of the parameters.
        dtype: the dtype of parameters and gradients.
        recurrent: the dtype of the recurrent entries of the state.
        fused: True demands the kernel, False forbids it, None takes it where it is faster.

    Raises:
        CompilationError: the kernel is demanded, but the C compiler does not make it; otherwise the user is warned.
    """
    wanted = is_faster_fused(device) if fused is None else fused
    if not wanted or unsupported_reason(rule, device, dtype) is not None:
        return None
    plan = plan_of(rule)
    if uses_c(device):
        try:
            of_state = [
                recurrent if entry in rule.recurrent_state else arithmetic_dtype(dtype) for entry in plan.entries
            ]
            kernel(plan.key, (dtype, dtype, *of_state))
        except CompilationError as error:
            if fused:
                raise
            warn_once(error)
            return None
    return plan


@torch.no_grad()
def plan_of(rule: UpdateRule) -> Plan:
    """The rule in the form that its kernel takes, with a copy of its weights.

    Args:
        rule: one that :func:`unsupported_reason` does not refuse.
    """
    parameters = weight_tensors(rule)
    like = parameters[0]
    sources = sources_of(rule, like.dtype)
    assert isinstance(sources, Sources), sources
    source = sources.c if uses_c(like.device) else sources.triton
    order = torch.tensor(source.weights, dtype=torch.int64, device=like.device)
    with without_autocast(like.device):
        weights = flat_weights(sources.traced, parameters)[order]
    return Plan(sources.key, weights, tuple(rule.state_features), tuple(rule.state_features.values()))


def sources_of(rule: UpdateRule, dtype: torch.dtype) -> Sources | str:
    """The sources of a rule's kernels, or why none can be made; they follow from its class and settings.

    Args:
        rule: any rule; its weights do not matter.
        dtype: the dtype of the arithmetic, float32 or float64.
    """
    settings = tuple(rule.settings.items())
    try:
        hash(settings)
    except TypeError:
        return f"its settings are not all numbers, strings and tuples of these: {dict(settings)}"
    return _sources(type(rule), settings, dtype)


@functools.cache
@torch.no_grad()
def _sources(
    architecture: type[UpdateRule], settings: tuple[tuple[str, Any], ...], dtype: torch.dtype
) -> Sources | str:
    """The sources of a rule's program, or why it has none."""
    # Whatever surrounds the first step that needs them: a fake mode, a default device, autocast, inference.
    modes = unset_fake_temporarily(), torch.device("cpu"), torch.autocast("cpu", enabled=False)
    with modes[0], modes[1], modes[2], torch.inference_mode(False):
        try:
            rule = architecture(**dict(settings)).to("cpu", dtype)
            if not weight_tensors(rule):
                return "it has no meta-parameters"
            conditions = rule.uses_conditions
            program = trace(_with_conditions(rule), weight_tensors(rule), rule.state_features, conditions=conditions)
        except NotCoordinatewiseError as error:
            return str(error)
        except Exception as error:  # of a class that someone else wrote; its plain path may well work
            return (
                f"its settings do not build it again, or its forward fails in a trace: {type(error).__name__}: {error}"
            )
        return register(program, dtype, rule.name, conditions=conditions)


def _with_conditions(rule: UpdateRule) -> Callable[..., tuple[Tensor, RuleState]]:
    """The rule as a function of gradient, state, step, and each of the conditions if it uses them."""
    return lambda grad, state, step, *conditions: rule(
        grad, state, step, *([Conditions(*conditions)] if conditions else [])
    )


def weight_tensors(rule: UpdateRule) -> list[Tensor]:
    """Meta-parameters, and buffers if a rule has them, in the order of the arguments of its program's prologue."""
    return [*rule.parameters(), *rule.buffers()]


def flat_weights(program: Program, parameters: Sequence[Tensor]) -> Tensor:
    """The results of a program's prologue for these meta-parameters, flattened, one after the other."""
    return torch.cat([parameters[0].new_empty(0), *(result.reshape(-1) for result in program.prologue(*parameters))])


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parameters of this dtype are stepped: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
