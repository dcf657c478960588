"""The state of parameters: how it begins, how a saved one is checked and restored, and the scale of a tensor."""

import functools
from typing import Any

import torch
from torch import Tensor

from learned_optim.kernels.layout import laid_out_like
from learned_optim.rules import UpdateRule
from learned_optim.step.programs import arithmetic_dtype


def has_begun(state: Any) -> bool:
    """Whether the optimizer has begun a parameter's state: users may keep things of their own in one before."""
    return isinstance(state, dict) and "step" in state


def state_by_parameter(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """The states in a state dict, without those of parameters that have none yet.

    Args:
        groups: the optimizer's groups, whose parameters are those of the state dict in the same order.
        state_dict: the result of :meth:`torch.optim.Optimizer.state_dict`.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = ((parameter, state_dict["state"].get(key)) for key, parameter in zip(keys, parameters, strict=False))
    return {parameter: state for parameter, state in states if state}


def begin_state(
    state: dict[str, Tensor],
    rule: UpdateRule,
    parameter: Tensor,
    state_dtype: torch.dtype | None,
    *,
    capturable: bool,
) -> None:
    """Fill the state of a parameter before its first step: count zero, scale, and entries of zeros.

    Args:
        state: filled in place.
        rule: the rule that the state belongs to.
        parameter: entries are laid out in its memory order and, for a DTensor, sharded like it.
        state_dtype: dtype of the recurrent entries, None for the rule's choice.
        capturable: keep the step count on the device of the parameter.
    """
    # On the CPU otherwise, whatever torch.set_default_device says: no step has to ask a GPU.
    state["step"] = torch.zeros((), device=parameter.device if capturable else "cpu", dtype=torch.float32)
    scale = tensor_scale_of(rule, parameter)
    if scale is not None:
        state["scale"] = scale
    for entry, features in rule.state_features.items():
        # Made from the parameter, so that a DTensor's state is sharded like the DTensor.
        like = parameter.detach().unsqueeze(0).expand(features, *parameter.shape)
        dtype, dense = entry_dtype(rule, entry, parameter, state_dtype), torch.contiguous_format
        zeros = functools.partial(torch.zeros_like, dtype=dtype, memory_format=dense)
        state[entry] = laid_out_like(parameter, like, zeros)


def restore_state(
    state: dict[str, Tensor],
    saved: dict[str, Any],
    rule: UpdateRule,
    parameter: Tensor,
    state_dtype: torch.dtype | None,
    *,
    capturable: bool,
) -> None:
    """Fill the state of a parameter with copies of a saved one, which :func:`check_state` has accepted.

    Args:
        state: filled in place.
        saved: numbers or tensors, of any dtype and on any device.
        rule: the rule that the state belongs to.
        parameter: the parameter, in whose memory order entries are laid out.
        state_dtype: dtype of the recurrent entries, None for the rule's choice.
        capturable: keep the step count on the device of the parameter.
    """
    for entry in rule.state_features:
        value = _copy(saved[entry], parameter.device, entry_dtype(rule, entry, parameter, state_dtype))
        state[entry] = laid_out_like(parameter, value)
    for entry in rule.recurrent_state - set(rule.state_features):
        state.pop(entry, None)  # of an LSTM that this rule does without
    place = parameter.device if capturable else torch.device("cpu")
    state["step"] = _copy(saved["step"], place, torch.float32).reshape(())
    if rule.uses_tensor_scale:
        scale = saved.get("scale", 1.0)  # older states have none
        state["scale"] = _copy(scale, parameter.device, torch.float32).reshape(())


def entry_dtype(rule: UpdateRule, entry: str, parameter: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which an entry of a parameter's state is kept."""
    arithmetic = arithmetic_dtype(parameter.dtype)
    return recurrent_dtype(rule, arithmetic, state_dtype) if entry in rule.recurrent_state else arithmetic


def recurrent_dtype(rule: UpdateRule, arithmetic: torch.dtype, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of recurrent entries: the user's, else the rule's, else float64 where the arithmetic is float64."""
    if state_dtype is not None:
        return state_dtype
    return arithmetic if arithmetic == torch.float64 else rule.recurrent_dtype


def check_state(rule: UpdateRule, parameter: Tensor, state: dict[str, Any]) -> None:
    """Raise a ValueError if a saved state is not one of this rule for this parameter."""
    shapes = {entry: tuple(getattr(value, "shape", ())) for entry, value in state.items()}
    features = {entry: shape[0] if shape else 1 for entry, shape in shapes.items()}
    needed = {"step": 1, **rule.state_features}
    if {entry: features.get(entry) for entry in needed} != needed:  # users may have added entries of their own
        raise ValueError(
            f"the state was saved with another rule: it holds {features} (entry: features), "
            f"the rule {rule.name!r} needs {needed}; construct the optimizer with that rule"
        )
    for entry in needed:
        value = torch.as_tensor(state[entry]) if isinstance(state[entry], int | float) else state[entry]
        if not isinstance(value, Tensor) or value.is_complex() or (entry == "step" and value.numel() != 1):
            raise ValueError(f"the state's entry {entry!r} must be a real tensor, got {value!r:.200}")
    for entry in rule.state_features:
        if shapes[entry][1:] != parameter.shape:
            raise ValueError(
                f"the state was saved for other parameters: {entry!r} is for one of shape {shapes[entry][1:]}, "
                f"the parameter in its place has {tuple(parameter.shape)}"
            )


@torch.no_grad()
def tensor_scale_of(rule: UpdateRule, parameter: Tensor) -> Tensor | None:
    """The factor on all updates of a parameter, 0-d, float32, on its device; None for a rule that scales no tensors."""
    if not rule.uses_tensor_scale:
        return None
    scale = rule.tensor_scale(parameter.shape, root_mean_square(parameter)) if parameter.dim() > 1 else None
    return torch.ones((), device=parameter.device, dtype=torch.float32) if scale is None else scale


def root_mean_square(parameter: Tensor) -> Tensor:
    """The root mean square of all values of a parameter, on whatever process: 0-d, float32, on its device.

    Zero if one of them is not finite: a rule then takes the tensor for one whose values do not show its size.
    """
    # In float64, so that shards and memory orders do not change a bit of it; where there may be none, they may.
    dtype = torch.float64 if parameter.device.type in ("cpu", "cuda", "meta") else torch.float32
    norm: Any = torch.linalg.vector_norm(parameter.detach(), dtype=dtype)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    root: Tensor = norm / max(1, parameter.numel()) ** 0.5
    return root.float().nan_to_num(nan=0.0, posinf=0.0)


def _copy(value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of a saved number or tensor, on this device and in this dtype."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    return tensor.to(device, dtype, copy=True)
