"""The state of an optimizer as it is saved, loaded and kept beside what users put into it."""

from typing import Any

import torch
from torch import Tensor

from learned_optim.rules import UpdateRule


def has_begun(state: Any) -> bool:
    """Whether the optimizer has begun a parameter's state: users may keep things of their own in one before."""
    return isinstance(state, dict) and "step" in state


def state_by_parameter(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """The states in a state dict, without those of parameters that have none yet.

    Args:
        groups: the optimizer's, whose parameters are those of the state dict in the same order.
        state_dict: as :meth:`torch.optim.Optimizer.state_dict` returns it.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = ((parameter, state_dict["state"].get(key)) for key, parameter in zip(keys, parameters, strict=False))
    return {parameter: state for parameter, state in states if state}


def copied(value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A saved number or tensor as a tensor of its own, there and in that dtype."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    return tensor.to(device, dtype, copy=True)


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
