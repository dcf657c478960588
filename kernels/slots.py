"""The arguments of a step: parameters with their gradients and states, and the settings that hold for all of them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class StepSettings(NamedTuple):
    """The settings of a step, as a parameter group and perhaps a ``GradScaler`` give them."""

    lr: float | Tensor
    """A number or a 0-d tensor."""
    weight_decay: float
    maximize: bool
    skip_nonfinite: bool = False
    """Leave a coordinate whose gradient is NaN or infinite as it is: parameter and state."""
    grad_scale: Tensor | None = None
    """Gradients are this factor too large."""
    found_inf: Tensor | None = None
    """A flag of gradient scalers, not zero if a gradient is infinite: the step then leaves everything as it is."""
    progress: float | Tensor = 0.0
    """Fraction of the training that is done, a number or a 0-d tensor; 0 if its length is not known."""
    averaging: bool = True
    """Whether parameters may be averages over the steps."""


class Slot(NamedTuple):
    """One parameter with its gradient and state, all on one device."""

    parameter: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    """Entries of shape ``(features, *parameter.shape)``: contiguous, or each feature dense and all in one memory order,
    best the parameter's."""
    step: Tensor
    """Count of this step, 0-d; on the slot's device, or on the CPU if all slots of a call share it."""
    scale: Tensor | None = None
    """Factor on the updates of this tensor, 0-d, on the slot's device; None is 1. All slots of a call have one, or
    none."""
    sees_parameter: bool = False
    """Whether a rule that uses conditions gets the values of the parameter; otherwise it gets zeros."""


class Columns(NamedTuple):
    """Many slots, column by column: one list for each field of a :class:`Slot`.

    With thousands of small tensors, making a slot of each would take longer than the step.
    """

    parameters: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Tensor]]
    """Entry of the state -> the tensors of all parameters."""
    steps: list[Tensor]
    scales: list[Tensor | None]
    sees_parameter: list[bool]

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> "Columns":
        """The columns of at least one slot."""
        states: dict[str, list[Tensor]] = {entry: [slot.state[entry] for slot in slots] for entry in slots[0].state}
        return cls(
            [slot.parameter for slot in slots],
            [slot.grad for slot in slots],
            states,
            [slot.step for slot in slots],
            [slot.scale for slot in slots],
            [slot.sees_parameter for slot in slots],
        )

    def slots(self) -> list[Slot]:
        """The slots, one by one."""
        states = [dict(zip(self.states, tensors, strict=True)) for tensors in zip(*self.states.values(), strict=True)]
        if not self.states:
            states = [{} for _ in self.parameters]
        return list(map(Slot, self.parameters, self.grads, states, self.steps, self.scales, self.sees_parameter))

    def at(self, places: Sequence[int]) -> "Columns":
        """The columns of the slots in these places."""
        slots = self.slots()
        return Columns.of([slots[place] for place in places])
