"""What surrounds the arithmetic of a step: counts, autocast, shards, a scaler's tensors, refusals."""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from learned_optim.execution import Columns, Settings, Slot
from learned_optim.rules import UpdateRule


def count_step(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Advance the step counts in place, but for a step that a ``GradScaler`` calls off."""
    if found_inf is not None:
        done = (found_inf == 0).float()
        torch._foreach_add_(steps, [done.to(step.device) for step in steps])
    elif steps[0].device.type == "cpu" and not torch.compiler.is_compiling():
        torch._foreach_add_(steps, torch.ones((), device="cpu", dtype=torch.float32), alpha=1.0)  # a number is slower
    else:
        torch._foreach_add_(steps, 1.0)


def unless_paused(settings: Settings) -> Settings | None:
    """The settings of a step; None for one that leaves everything as it is, parameters, states and counts.

    That is one with a learning rate of zero, or after the end of the training. What the host does not know goes into
    ``found_inf``, as if a ``GradScaler`` had called the step off.
    """
    stops = settings.lr == 0, settings.progress >= 1
    if any(stop for stop in stops if _is_known(stop)):
        return None
    unknown = [stop for stop in stops if isinstance(stop, Tensor) and not _is_known(stop)]
    for stop in unknown:
        found_inf = settings.found_inf
        stop = stop if found_inf is None else stop | (found_inf.to(stop.device) != 0)
        settings = settings._replace(found_inf=stop.float())
    return settings


def _is_known(value: bool | Tensor) -> bool:
    """Whether the host may look at a value."""
    return not isinstance(value, Tensor) or (
        value.device.type == "cpu" and not torch.compiler.is_compiling() and fake_mode_of(value) is None
    )


def called_together(columns: Columns, *, capturable: bool) -> list[Columns]:
    """Parameters that one call of the rule can serve: of a device, a dtype and, where the host may read it, a count.

    Args:
        columns: of parameters with counts of their own, perhaps on another device.
        capturable: counts that are not on the CPU must not be waited for.

    Returns:
        Columns whose counts are on the parameters' device, one tensor where they are known to be equal.
    """
    parameters, steps = columns.parameters, columns.steps
    compiling = torch.compiler.is_compiling() or fake_mode_of(parameters[0]) is not None
    keys = [
        (
            parameter.device,
            parameter.dtype,
            None if compiling or (capturable and parameter.device.type != "cpu") else float(step),
        )
        for parameter, step in zip(parameters, steps, strict=True)
    ]
    places: defaultdict[Any, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    result = []
    for (device, _, count), chosen in places.items():
        together = columns if len(places) == 1 else columns.at(chosen)
        if count is not None:
            counts = [torch.full((), count, device=device, dtype=torch.float32)] * len(chosen)
        else:  # with torch.compile, but without capturable, they are elsewhere
            counts = [step.to(device, non_blocking=True) for step in together.steps]
        result.append(together._replace(steps=counts))
    return result


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """In which the arithmetic of a step keeps its dtype, even inside an autocast block."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # such as "meta"


def settings_on(device: torch.device, settings: Settings) -> Settings:
    """The settings with the scaler's tensors moved there: they are on one device, whatever the parameters are on."""
    if settings.found_inf is None:
        return settings
    scale = settings.grad_scale
    return settings._replace(
        grad_scale=None if scale is None else scale.to(device), found_inf=settings.found_inf.to(device)
    )


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def local_columns(columns: Columns) -> Columns:
    """The columns of the coordinates that are on this device: see :func:`local_coordinates`."""
    return Columns.of([local_coordinates(slot) for slot in columns.slots()])


def local_coordinates(slot: Slot) -> Slot:
    """The slot of the coordinates that are on this device: all of a tensor, this process's shard of a DTensor."""
    parameter: Any = slot.parameter
    grad: Any = slot.grad
    state: dict[str, Any] = slot.state
    if not hasattr(parameter, "to_local"):
        return slot
    if grad.placements != parameter.placements:
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    shards = {entry: tensor.to_local() for entry, tensor in state.items()}
    return slot._replace(parameter=parameter.to_local(), grad=grad.to_local(), state=shards)


@torch.no_grad()
def scale_of(rule: UpdateRule, parameter: Tensor) -> Tensor | None:
    """The factor on all updates of a parameter, 0-d, float32, on its device; None for a rule that heeds no tensors."""
    if not rule.heeds_tensors:
        return None
    scale = rule.tensor_scale(parameter.shape, root_mean_square(parameter)) if parameter.dim() > 1 else None
    return torch.ones((), device=parameter.device, dtype=torch.float32) if scale is None else scale


def root_mean_square(parameter: Tensor) -> Tensor:
    """Of all values of a parameter, of a DTensor on whatever process: 0-d, float32, on its device."""
    # In float64, so that shards and memory orders do not change a bit of it; where there may be none, they may.
    dtype = torch.float64 if parameter.device.type in ("cpu", "cuda", "meta") else torch.float32
    norm: Any = torch.linalg.vector_norm(parameter.detach(), dtype=dtype)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    root: Tensor = norm / max(1, parameter.numel()) ** 0.5
    return root.float()


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
        parameters: whose ``.data`` may have been replaced.
        grads: of each parameter.
        states: of each entry, the tensors of all parameters.
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
        rule: whose state it is.
        columns: all parameters.
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


def fake_mode_of(tensor: Tensor) -> FakeTensorMode | None:
    """The mode of a tensor that has a shape and a device but no values; None for a usual tensor."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


def placed(rule: UpdateRule, parameter: Tensor, device: torch.device, dtype: torch.dtype) -> UpdateRule:
    """A copy of the rule there and in that dtype; its weights have no values if the parameter has none."""
    mode = fake_mode_of(parameter)
    if mode is None:
        return copy.deepcopy(rule).to(device, dtype)
    with unset_fake_temporarily():
        copied = copy.deepcopy(rule).requires_grad_(False)
        weights = [
            (module, name, parameter.detach())
            for module in copied.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
    with mode:
        for module, name, values in weights:
            fake = mode.from_tensor(values).to(device, dtype)
            module.register_parameter(name, torch.nn.Parameter(fake, requires_grad=False))
    return copied
