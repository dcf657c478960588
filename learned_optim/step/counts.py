"""Step counts: of each parameter, and of a training whose length is known."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def count_steps(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Advance the step counts in place, unless a ``GradScaler`` has found infinities and calls the step off."""
    if found_inf is not None:
        done = (found_inf == 0).float()
        torch._foreach_add_(steps, [done.to(step.device) for step in steps])
    elif steps[0].device.type == "cpu" and not torch.compiler.is_compiling():
        torch._foreach_add_(steps, torch.ones((), device="cpu", dtype=torch.float32), alpha=1.0)  # a number is slower
    else:
        torch._foreach_add_(steps, 1.0)


def start_training_count(group: dict[str, Any], other: dict[str, Any], states: Sequence[dict[str, Any]] = ()) -> None:
    """Start or continue the count of training steps of a group, from which :func:`training_progress` follows.

    Args:
        group: a parameter group; without ``total_steps`` it needs no count.
        other: a group of the same training, whose count is continued: a group that is added later joins it.
        states: the states of the group's parameters, whose counts are taken in a training that began without this one.
    """
    if group["total_steps"] is None:
        group.pop("steps_done", None)
        return
    parameters = group["params"]
    device = parameters[0].device if group["capturable"] and parameters else torch.device("cpu")
    done = other.get("steps_done")
    if done is None:
        done = max((float(state["step"]) for state in states if "step" in state), default=0.0)
    if not isinstance(done, Tensor):
        done = torch.tensor(done, device="cpu")  # whatever the default device is
    group["steps_done"] = done.to(device, torch.float32, copy=True)


def count_training_step(
    group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]], found_inf: Tensor | None
) -> None:
    """Count one more step of the training, whether or not the group has gradients.

    Args:
        group: its ``total_steps`` may have been set, changed or taken back since the last step.
        states: those of all parameters; a length that is given late counts from the steps that they have made.
        found_inf: of a ``GradScaler``, which calls the step off where it is not zero; None: there is none.
    """
    if group["total_steps"] is None:
        group.pop("steps_done", None)
        return
    if "steps_done" not in group:
        start_training_count(group, group, [states[p] for p in group["params"] if p in states])
    done: Tensor = group["steps_done"]
    done += 1 if found_inf is None else (found_inf == 0).to(done)


def training_progress(group: dict[str, Any]) -> float | Tensor:
    """The fraction of the training that is done with this step: below 1, then 1; 0 if its length is unknown."""
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
