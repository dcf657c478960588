"""Slots, which the paths of execution step: made of tensors in every memory layout, copied and compared."""

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.rules import normal, random_state
from learned_optim.kernels.slots import Slot, StepSettings
from learned_optim.rules import UpdateRule

PLAIN = StepSettings(lr=1.0, weight_decay=0.0, maximize=False)


FIRST = torch.tensor(1.0)
"""The step count of a first step."""

# A rule called on other blocks differs in its last bits (tests/rules/test_rules.py: vector registers and their
# remainders, the kernel that BLAS takes). 32 roundings of the arithmetic, relative to the tensor's largest value;
# seen: 8.5.
ROUNDINGS = 32


def layouts() -> list[Tensor]:
    """Parameters whose memory is not contiguous: transposed, channels last, strided; and a contiguous one."""
    images = normal(2, 3, 4, 5, seed=2).to(memory_format=torch.channels_last)
    return [normal(5, 7, seed=1).t(), images, normal(10, seed=3)[::2], normal(4, 4, seed=4)]


def as_slots(
    rule: UpdateRule,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
    recurrent: torch.dtype | None = None,
    step: Tensor = FIRST,
) -> list[Slot]:
    """Slots as after some steps: moments in the dtype of the arithmetic, the rest in ``recurrent``."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    slots = []
    for index, parameter in enumerate(parameters):
        kept = torch.empty_like(parameter, dtype=dtype).copy_(0.01 * parameter)  # about as large as the updates
        state = {
            entry: value.to(recurrent if recurrent is not None and entry in rule.recurrent_state else arithmetic)
            for entry, value in random_state(rule, *parameter.shape).items()
        }
        # Backward may leave gradients in another layout than the parameters'.
        scale = torch.tensor(1.5 / (index + 1)) if rule.uses_tensor_scale else None
        is_given = rule.uses_conditions and index % 2 == 0
        slots.append(Slot(kept, normal(*parameter.shape, seed=100 + index).to(dtype), state, step, scale, is_given))
    return slots


def clones(slots: Sequence[Slot]) -> list[Slot]:
    """Copies of the slots whose parameters, gradients and states can be stepped apart from the originals."""
    return [
        slot._replace(
            parameter=slot.parameter.clone(),
            grad=slot.grad.clone(),
            state={entry: value.clone() for entry, value in slot.state.items()},
        )
        for slot in slots
    ]


def assert_same(actual: Tensor, expected: Tensor, arithmetic: torch.dtype, largest: float) -> None:
    """Equal up to the arithmetic's roundings, relative to ``largest``, and one of the dtype that is stored."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    stored = torch.finfo(actual.dtype)
    spacing = stored.eps * expected.double().abs().clamp(min=stored.smallest_normal)
    excess = (actual.double() - expected.double()).abs() - spacing
    assert (excess <= ROUNDINGS * torch.finfo(arithmetic).eps * largest).all(), f"apart by {excess.max()}"


def largest_of(tensor: Tensor) -> float:
    """The largest absolute value of a tensor, 0 if it is empty."""
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def assert_same_slots(actual: Sequence[Slot], expected: Sequence[Slot], before: Sequence[Slot]) -> None:
    """Parameters and states are equal up to roundings, relative to the change since ``before``."""
    for one, other, start in zip(actual, expected, before, strict=True):
        arithmetic = torch.float64 if start.parameter.dtype == torch.float64 else torch.float32
        moved = largest_of(other.parameter.double() - start.parameter.double())
        assert_same(one.parameter, other.parameter, arithmetic, moved)
        for entry, value in other.state.items():
            added_to = entry in ("displacement", "log_rate")  # may come to lie near zero; what is added up rounds
            size = max(largest_of(value), largest_of(start.state[entry])) if added_to else largest_of(value)
            assert_same(one.state[entry], value, arithmetic, size)
