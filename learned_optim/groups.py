"""What a parameter group may hold."""

from typing import Any

from torch import Tensor

from learned_optim.fused import why_not
from learned_optim.rules import UpdateRule

NONFINITE = ("skip", "propagate", "error")


def check_group(group: dict[str, Any], rule: UpdateRule) -> None:
    """Raise a TypeError, ValueError or RuntimeError if the rule cannot step such a group."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}; it multiplies the learned update, 1.0 is the rule as trained")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
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
