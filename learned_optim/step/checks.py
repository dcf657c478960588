"""Refusals of a step: sparse or nonfinite gradients, and tensors that do not fit their parameter."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learned_optim.kernels.slots import Columns
from learned_optim.rules import UpdateRule


def check_gradients(groups: Sequence[dict[str, Any]], *, is_unscaled: bool) -> None:
    """Raise a RuntimeError, before anything is changed, if a gradient cannot be stepped with.

    Args:
        groups: parameter groups. Sparse gradients are refused, and, in groups with ``nonfinite="error"``, NaN and
            infinity.
        is_unscaled: no ``GradScaler`` has looked for nonfinite gradients.
    """
    watched = []
    for group in groups:
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(
                    "LearnedOptimizer does not support sparse gradients; use sparse=False in the embedding, or "
                    "torch.optim.SparseAdam for its parameters"
                )
            if group["nonfinite"] == "error" and grad.numel() > 0:
                watched.append(grad)
    if watched and is_unscaled:
        refuse_nonfinite(watched)


def refuse_nonfinite(grads: list[Tensor]) -> None:
    """Raise a RuntimeError if a gradient is NaN or infinite; waits for the GPU."""
    largest: Any = torch.nn.utils.get_total_norm(grads, math.inf)
    if hasattr(largest, "full_tensor"):  # a DTensor: all processes raise or none
        largest = largest.full_tensor()
    if not largest.isfinite():
        raise RuntimeError(
            "a gradient is NaN or infinite, and nonfinite='error'; nothing was changed. Find the cause with "
            "torch.autograd.set_detect_anomaly(True), or use nonfinite='skip'"
        )


def refuse_other_shapes(parameters: list[Tensor], grads: list[Tensor], states: Sequence[list[Tensor]]) -> None:
    """Raise a RuntimeError if a gradient or a state was made when its parameter had another shape.

    Args:
        parameters: tensors whose ``.data`` may have been replaced.
        grads: the gradient of each parameter.
        states: entry of the state -> the tensors of all parameters.
    """
    shapes = [parameter.shape for parameter in parameters]
    if shapes != [grad.shape for grad in grads]:
        _refuse_first_other_shape(shapes, [grad.shape for grad in grads], "gradient")
    for entry in states:
        of_states = [tensor.shape[1:] for tensor in entry]
        if shapes != of_states:
            _refuse_first_other_shape(shapes, of_states, "state")


def refuse_other_features(rule: UpdateRule, columns: Columns) -> None:
    """Raise a RuntimeError if an entry of a state has not the shape that the rule and its parameter need.

    Args:
        rule: the rule that the states belong to.
        columns: parameters with their states.
    """
    for entry, features in rule.state_features.items():
        for parameter, tensor in zip(columns.parameters, columns.states[entry], strict=True):
            if tensor.shape != (features, *parameter.shape):
                raise RuntimeError(
                    f"the state's entry {entry!r} of a parameter of shape {tuple(parameter.shape)} has the shape "
                    f"{tuple(tensor.shape)}, where {(features, *parameter.shape)} is needed; start the parameter anew: "
                    "optimizer.state.pop(parameter)"
                )


def _refuse_first_other_shape(shapes: list[torch.Size], others: list[torch.Size], what: str) -> None:
    for shape, other in zip(shapes, others, strict=True):
        if shape != other:
            raise RuntimeError(
                f"a parameter has the shape {tuple(shape)}, its {what} is for {tuple(other)}: the parameter's data "
                "were replaced. Construct the optimizer after that, or start the parameter anew: "
                "optimizer.state.pop(parameter); parameter.grad = None"
            )
