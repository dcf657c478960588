"""Tensors that are not a plain piece of memory, and a program that steps thousands of them: `python odd_tensors.py`.

An optimizer that takes addresses without looking crashes the process, so that tests run the program in a child.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from learned_optim import LearnedOptimizer
from learned_optim.rules import LSTML2L, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

EXAMPLES = 1000
"""Examples of each of the two programs."""


class Wrapper(Tensor):
    """A tensor without memory of its own: only its operations know the tensor that it wraps."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, wrapped: Tensor) -> "Wrapper":
        new: Wrapper = Tensor._make_wrapper_subclass(cls, wrapped.shape, dtype=wrapped.dtype, device=wrapped.device)
        new.wrapped = wrapped
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        def unwrapped(value: Any) -> Any:
            return value.wrapped if isinstance(value, Wrapper) else value

        result = function(*tree_map(unwrapped, arguments), **tree_map(unwrapped, keywords or {}))
        if function is torch.ops.aten.detach.default:
            return Wrapper(result)
        return arguments[0] if result is unwrapped(arguments[0]) else result  # in place


class Subclass(Tensor):
    """A tensor of another type that has memory."""


def with_gaps(tensor: Tensor) -> Tensor:
    """The values in every second place of memory."""
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    """The values with the last two axes exchanged in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def negated(tensor: Tensor) -> Tensor:
    """A tensor whose sign is flipped lazily, by a bit."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": torch.clone,
    "transposed": transposed,
    "gaps": with_gaps,
    "negated": negated,
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
    "wrapper": lambda tensor: Wrapper(tensor.clone()),
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = LAYOUTS | {
    "expanded": lambda tensor: tensor.sum().expand(tensor.shape),
    "zero": lambda tensor: torch._efficientzerotensor(tensor.shape),
    "not finite": lambda tensor: tensor / 0,
}
REPLACEMENTS: dict[str, Callable[[Tensor], Tensor]] = LAYOUTS | {
    "half": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "double": Tensor.double,
    "integers": Tensor.int,
    "shorter": lambda tensor: tensor[..., :-1],
    "longer": lambda tensor: torch.cat([tensor, tensor], -1),
    "fewer features": lambda tensor: tensor[:1],
    "turned": lambda tensor: tensor.mT.contiguous(),
    "empty": lambda tensor: tensor[:0],
    "elsewhere": lambda tensor: tensor.to("meta"),
}
"""Replacements of an entry of a state, as editing by hand, casts and moved models leave them."""


def steered(rule: ScheduleFreeLSTM) -> ScheduleFreeLSTM:
    """The rule with outputs that are not zero: an LSTM without a say would be left out."""
    nn.init.constant_(rule.output_weight, 0.1)
    return rule


RULES: Mapping[str, Callable[[], UpdateRule]] = {
    "schedule-free-lstm": lambda: steered(ScheduleFreeLSTM(3)),
    "scale-free-lstm": lambda: ScaleFreeLSTM(3),
    "lstm-l2l": lambda: LSTML2L(3),
}
SHAPES = ((3, 4), (1, 1), (17,), (2, 3, 5), (64, 33))
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)


def made(layout: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random values as a gradient of the named layout."""
    return GRADIENTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


class Case:
    """A parameter, three steps, a mishap, two more steps: by the kernel, and by the plain path."""

    def __init__(self, rule: str, shape: tuple[int, ...], parameter: str, gradients: list[str]) -> None:
        self.rule, self.shape, self.parameter, self.gradients = rule, shape, parameter, gradients

    def run(self, fused: bool, mishap: Callable[[LearnedOptimizer, nn.Parameter], None]) -> Tensor | None:
        """The parameter's values at the end; None if the optimizer refused something."""
        parameter = nn.Parameter(made(self.parameter, self.shape, 0), requires_grad=False)
        optimizer = LearnedOptimizer([parameter], RULES[self.rule](), fused=fused, weight_decay=10.0)
        try:
            for step, layout in enumerate(self.gradients):
                parameter.grad = made(layout, tuple(parameter.shape), 1 + step)
                optimizer.step()
                if step == 2:
                    mishap(optimizer, parameter)
        except REFUSALS:
            return None
        return torch.empty(parameter.shape, dtype=parameter.dtype).copy_(parameter)


def compare(case: Case, mishap: Callable[[LearnedOptimizer, nn.Parameter], None]) -> None:
    """Both paths end at the same values, unless one of them refused."""
    plain, kernel = case.run(False, mishap), case.run(True, mishap)
    if plain is not None and kernel is not None:
        # Steps are of the order of 0.01 to 0.1; states in half precision are rounded by both, in another order.
        torch.testing.assert_close(kernel, plain, rtol=1e-2, atol=1e-3, equal_nan=True)


cases = st.builds(
    Case,
    st.sampled_from(sorted(RULES)),
    st.sampled_from(SHAPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.lists(st.sampled_from(sorted(GRADIENTS)), min_size=5, max_size=5),
)
budget = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@budget
@given(cases, st.integers(0, 7), st.sampled_from(sorted(REPLACEMENTS)))
def step_odd_tensors(case: Case, place: int, replacement: str) -> None:
    """Step tensors of any layout; halfway an entry of the state or the parameter is replaced."""

    def mishap(optimizer: LearnedOptimizer, parameter: nn.Parameter) -> None:
        state = optimizer.state[parameter]
        entries = sorted(state)
        if place >= len(entries):
            if replacement == "wrapper":
                return  # makes a parameter without memory, on which torch's own operations crash
            parameter.data = REPLACEMENTS[replacement](parameter.data).detach()
        elif state[entries[place]].dim() > 1:
            state[entries[place]] = REPLACEMENTS[replacement](state[entries[place]])

    compare(case, mishap)


@budget
@given(cases, st.integers(0, 7), st.sampled_from(sorted(REPLACEMENTS)), st.booleans())
def load_odd_states(case: Case, place: int, replacement: str, missing: bool) -> None:
    """Step tensors of any layout; halfway a state with a replaced or missing entry is loaded."""

    def mishap(optimizer: LearnedOptimizer, parameter: nn.Parameter) -> None:
        saved = copy.deepcopy(optimizer.state_dict())
        (state,) = saved["state"].values()
        entry = sorted(state)[place % len(state)]
        if missing:
            del state[entry]
        elif state[entry].dim() > 1:
            state[entry] = REPLACEMENTS[replacement](state[entry])
        else:
            state[entry] = [state[entry].item(), state[entry].half(), state[entry][None], float("nan")][place % 4]
        optimizer.load_state_dict(saved)

    compare(case, mishap)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with torch.no_grad():
        step_odd_tensors()
        load_odd_states()
    sys.stdout.write("stepped\n")
