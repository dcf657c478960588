"""What a parameter group may hold, and where it stands in a training of known length."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learned_optim.execution import Settings
from learned_optim.fused import why_not
from learned_optim.rules import UpdateRule

NONFINITE = ("skip", "propagate", "error")
DECAY_RATE = 1e-3
"""AdamW's default rate, which its weight decay is multiplied by; ``lr`` here is relative to the rule's own rate."""


def check_group(group: dict[str, Any], rule: UpdateRule) -> None:
    """Raise a TypeError, ValueError or RuntimeError if the rule cannot step such a group."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
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
        reason = why_not(rule, parameter.device, parameter.dtype) if group["fused"] else None
        if reason is not None:
            raise RuntimeError(f"fused=True cannot be had: {reason}; use fused=None")


def check_total_steps(total_steps: Any, rule: UpdateRule) -> None:
    """Raise a TypeError or ValueError if it is no length of a training, or the rule cannot make use of it."""
    if total_steps is None:
        return
    if isinstance(total_steps, bool) or not isinstance(total_steps, int):
        raise TypeError(f"total_steps must be an integer or None, got {total_steps!r}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}; None if the length is not known")
    if not rule.uses_conditions:
        raise ValueError(
            f"the rule {rule.name!r} has not learned to make use of the end of a training: leave total_steps out, and "
            "let a scheduler lower lr"
        )


def begin_run(group: dict[str, Any], other: dict[str, Any], states: Sequence[dict[str, Any]] = ()) -> None:
    """Give a group the count of the training's steps that it needs to know how much of it is done.

    Args:
        group: one with ``total_steps``; others need no count.
        other: whose training it is: a group that is added later joins it.
        states: of its parameters, if a training goes on from before there was such a count.
    """
    if group["total_steps"] is None:
        group.pop("steps_done", None)
        return
    parameters = group["params"]
    device = parameters[0].device if group["capturable"] and parameters else torch.device("cpu")
    done = other.get("steps_done")
    if done is None:
        done = max((float(state["step"]) for state in states), default=0.0)
    group["steps_done"] = torch.as_tensor(done).to(device, torch.float32, copy=True)


def count_of_run(group: dict[str, Any]) -> None:
    """One more step of the training, whether or not the group has gradients."""
    if group["total_steps"] is not None:
        group["steps_done"] += 1


def progress_of(group: dict[str, Any]) -> float | Tensor:
    """The fraction of the training that is done with this step, below 1; 1 beyond its end, 0 if nobody knows it."""
    if group["total_steps"] is None:
        return 0.0
    done: Tensor = group["steps_done"]
    if done.device.type != "cpu" or torch.compiler.is_compiling():
        progress: Tensor = (done / (group["total_steps"] + 1)).clamp(max=1.0)
        return progress
    if float(done) == group["total_steps"] + 1:
        warnings.warn(
            f"step {int(done):,} of a training of total_steps={group['total_steps']:,}: it is over, and parameters "
            "stay as they are from now on",
            stacklevel=5,
        )
    return min(1.0, float(done) / (int(group["total_steps"]) + 1))


def settings_of(group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> Settings:
    """What a group says about this step; ``grad_scale`` and ``found_inf`` are those of a ``GradScaler``."""
    lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
    decay, skips = DECAY_RATE * (group["weight_decay"] or 0.0), group["nonfinite"] == "skip"
    return Settings(lr, decay, group["maximize"], skips, grad_scale, found_inf, progress_of(group), group["averaging"])
