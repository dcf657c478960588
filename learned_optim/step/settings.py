"""The settings of a step: what a parameter group may hold, and what follows from it for one step."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from learned_optim.kernels.slots import StepSettings
from learned_optim.rules import UpdateRule
from learned_optim.step.counts import training_progress
from learned_optim.step.modes import is_known_to_host
from learned_optim.step.programs import unsupported_reason

SWITCHES = ("averaging", "maximize", "capturable", "differentiable")
NONFINITE = ("skip", "propagate", "error")
DECAY_RATE = 1e-3
"""AdamW's default rate, which its weight decay is multiplied by; ``lr`` here is relative to the rule's own rate."""


def check_group(group: dict[str, Any], rule: UpdateRule) -> None:
    """Raise a TypeError, ValueError or RuntimeError if the rule cannot step such a group."""
    check_types(group)
    for name in ("rule", "state_dtype"):
        if name in group:
            raise ValueError(f"{name} is the same for all groups of parameters: give it to LearnedOptimizer itself")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}; it multiplies the learned update, 1.0 is the rule as trained")
    if group["weight_decay"] is not None and not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}; None leaves it to the rule")
    check_total_steps(group["total_steps"], rule)
    if not rule.uses_conditions and not group["averaging"]:
        raise ValueError(f"the rule {rule.name!r} does not average: leave averaging out")
    if group["nonfinite"] not in NONFINITE:
        raise ValueError(f"nonfinite must be one of {NONFINITE}, got {group['nonfinite']!r}")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise TypeError(f"LearnedOptimizer needs real floating-point parameters, got one of {parameter.dtype}")
        reason = unsupported_reason(rule, parameter.device, parameter.dtype) if group["fused"] else None
        if reason is not None:
            raise RuntimeError(f"fused=True cannot be had: {reason}; use fused=None")


def check_types(group: dict[str, Any]) -> None:
    """Raise a TypeError if a number is none, or a switch is neither True nor False.

    Python takes ``"no"`` for true and a text for no number: without this check a switch would be on that was meant to
    be off, and a number would be refused in words that do not name it.
    """
    if not isinstance(group["lr"], Tensor | Real):
        raise TypeError(
            f"lr must be a number or a tensor of one element, got {group['lr']!r}; 1.0 is the rule as trained"
        )
    decay = group["weight_decay"]
    if decay is not None and (isinstance(decay, bool) or not isinstance(decay, Tensor | Real)):
        raise TypeError(
            f"weight_decay must be a number or None, got {decay!r}; None leaves it to the rule, 0 turns it off"
        )
    for name in SWITCHES:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
    if group["fused"] is not None and not isinstance(group["fused"], bool):
        raise TypeError(f"fused must be True, False or None, got {group['fused']!r}")


def check_total_steps(total_steps: Any, rule: UpdateRule) -> None:
    """Raise a TypeError or ValueError if ``total_steps`` is no number of steps, or the rule has no use for it."""
    if total_steps is None:
        return
    if isinstance(total_steps, bool) or not isinstance(total_steps, Integral):
        raise TypeError(f"total_steps must be an integer or None, got {total_steps!r}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}; None if the length is not known")
    if not rule.uses_conditions:
        raise ValueError(
            f"the rule {rule.name!r} has not learned to make use of the end of a training: leave total_steps out, and "
            "let a scheduler lower lr"
        )


def step_settings(group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> StepSettings:
    """The settings of a group for this step; ``grad_scale`` and ``found_inf`` are those of a ``GradScaler``."""
    lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
    decay, skips = DECAY_RATE * (group["weight_decay"] or 0.0), group["nonfinite"] == "skip"
    return StepSettings(
        lr, decay, group["maximize"], skips, grad_scale, found_inf, training_progress(group), group["averaging"]
    )


def unless_paused(settings: StepSettings) -> StepSettings | None:
    """The settings of a step; None for one that leaves everything as it is, parameters, states and counts.

    A step is left out if its learning rate is zero or the training is over. If only the device knows that, it is
    written into ``found_inf``, as if a ``GradScaler`` had called the step off.
    """
    stops = settings.lr == 0, settings.progress >= 1
    if any(stop for stop in stops if is_known_to_host(stop)):
        return None
    unknown = [stop for stop in stops if isinstance(stop, Tensor) and not is_known_to_host(stop)]
    for stop in unknown:
        found_inf = settings.found_inf
        stop = stop if found_inf is None else stop | (found_inf.to(stop.device) != 0)
        settings = settings._replace(found_inf=stop.float())
    return settings


def settings_on(device: torch.device, settings: StepSettings) -> StepSettings:
    """The settings with the tensors of a ``GradScaler``, which lie on one device, moved to this one."""
    if settings.found_inf is None:
        return settings
    scale = settings.grad_scale
    return settings._replace(
        grad_scale=None if scale is None else scale.to(device), found_inf=settings.found_inf.to(device)
    )
