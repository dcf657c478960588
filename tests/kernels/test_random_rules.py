"""Randomly drawn rules: their generated kernels match forward, and the generated gradients match autograd."""

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.rules import normal, randomised
from helpers.slots import PLAIN
from helpers.triton import HAS_TRITON
from learned_optim.kernels.cpu import kernel as cpu_kernel
from learned_optim.kernels.slots import Slot
from learned_optim.meta_train.inner.particles import flat_meta_parameters
from learned_optim.meta_train.inner.training_kernels import FusedRule
from learned_optim.rules import RuleState, UpdateRule
from learned_optim.step import fused, programs
from learned_optim.step.plain import apply_per_tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(cpu_kernel.compiler() is None, reason="needs a C compiler"),
]
UNITS = 3
OPERATIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: (x + y) / 2,
    lambda x, y: x * y,
    lambda x, y: x - 0.5 * y,
    lambda x, y: x / (1 + y.abs()),
    lambda x, y: torch.maximum(x, y),
    lambda x, y: torch.minimum(x, 0.3 + y),
    lambda x, y: x.tanh(),
    lambda x, y: x.sigmoid() * y,
    lambda x, y: (-x.abs()).exp(),
    lambda x, y: (x.abs() + 0.01).log() / 5,
    lambda x, y: (x.square() + 0.01).sqrt(),
    lambda x, y: torch.where(x > 0, x, 0.1 * x),
    lambda x, y: x.clamp(-0.5, 0.7),
    lambda x, y: torch.relu(x) + 0.1 * y,
]
"""Continuous, and about as large as their arguments."""


class Drawn(UpdateRule):
    """Instructions on momenta and hidden values, a layer of gates, and a product.

    Args:
        recipe: three numbers for each instruction: the operation and the places of its operands.
    """

    name = "drawn"
    recurrent_state = frozenset()

    def __init__(self, recipe: tuple[float, ...]) -> None:
        super().__init__()
        self.recipe = recipe
        self.gates = nn.Parameter(torch.zeros(4 * UNITS, 4 + UNITS))
        self.bias = nn.Parameter(torch.zeros(4 * UNITS))
        self.output = nn.Parameter(torch.zeros(2, UNITS))

    @property
    def settings(self) -> dict[str, tuple[float, ...]]:
        return {"recipe": self.recipe}

    @property
    def state_features(self) -> dict[str, int]:
        return {"momentum": 2, "cell": UNITS, "hidden": UNITS}

    def reset_parameters(self, seed: int) -> None:
        raise NotImplementedError

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        step = step.to(grad.dtype)
        momentum = torch.stack([m.lerp(grad, w) for m, w in zip(state["momentum"], (0.1, 0.5), strict=True)])
        values = [grad.clamp(-2, 2), *(momentum / (1 - 0.9**step)).tanh(), *state["hidden"]]
        for start in range(0, len(self.recipe), 3):
            operation, one, other = map(int, self.recipe[start : start + 3])
            values.append(OPERATIONS[operation](values[one % len(values)], values[other % len(values)]))
        inputs = torch.cat([torch.stack(values[-4:]), state["hidden"]])
        gates = (self.gates @ inputs.flatten(1)).view(-1, *grad.shape) + self.bias.view(-1, *[1] * grad.dim())
        i, f, g, o = gates.chunk(4)
        cell = f.sigmoid() * state["cell"] + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        size, direction = (self.output @ hidden.flatten(1)).view(-1, *grad.shape)
        update = 0.1 * size.tanh().exp() * (direction + values[-1]) * (step / (step + 5))
        return update, {"momentum": momentum, "cell": cell, "hidden": hidden}


instructions = st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 99), st.integers(0, 99))
recipes = st.lists(instructions, min_size=1, max_size=8).map(
    lambda drawn: tuple(float(n) for one in drawn for n in one)
)
each_rule = functools.partial(
    settings,
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)()


def slot_of(rule: UpdateRule, dtype: torch.dtype) -> Slot:
    state = {
        entry: normal(features, 21, seed=seed).to(dtype)
        for seed, (entry, features) in enumerate(rule.state_features.items(), 1)
    }
    return Slot(normal(21).to(dtype), normal(21, seed=9).to(dtype), state, torch.tensor(4.0))


@torch.no_grad()
def stepped(rule: UpdateRule, dtype: torch.dtype, kernel: bool) -> list[Tensor]:
    slot = slot_of(rule, dtype)
    if kernel:
        fused.apply_fused(programs.plan_of(rule), [slot], PLAIN)
    else:
        apply_per_tensor(rule, [slot], PLAIN)
    return [slot.parameter, *slot.state.values()]


@each_rule
@given(recipe=recipes)
def test_kernels_of_random_rules_match_forward(recipe: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rule = randomised(Drawn(recipe))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert programs.unsupported_reason(rule, torch.device("cpu"), torch.float32) is None
    truth = stepped(rule, torch.float64, kernel=False)
    in_double = stepped(rule, torch.float64, kernel=True)
    rule.float()
    in_c = stepped(rule, torch.float32, kernel=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    in_triton = stepped(rule, torch.float32, kernel=True)
    for exact, double, c, triton in zip(truth, in_double, in_c, in_triton, strict=True):
        torch.testing.assert_close(double, exact, rtol=1e-10, atol=1e-11)  # some dozen roundings of numbers of about 1
        torch.testing.assert_close(c.double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(triton.double(), exact, rtol=1e-4, atol=1e-5)


@each_rule
@given(recipe=recipes)
def test_gradients_of_random_rules_match_autograd(recipe: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rule = randomised(Drawn(recipe))
    found = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype in (torch.float64, torch.float32):
        slot = slot_of(rule.to(dtype), dtype)
        weights = flat_meta_parameters(rule).requires_grad_()
        leaves = [weights, slot.grad.requires_grad_(), *(value.requires_grad_() for value in slot.state.values())]
        if dtype == torch.float64:
            parts = weights.split([parameter.numel() for parameter in rule.parameters()])
            named = {
                name: part.view(parameter.shape)
                for (name, parameter), part in zip(rule.named_parameters(), parts, strict=True)
            }
            update, state = torch.func.functional_call(rule, named, (slot.grad, slot.state, slot.step))
        else:
            update, state = FusedRule(rule, weights)(slot.grad, slot.state, slot.step)
        results = [update, *(state[entry] for entry in slot.state)]
        total = sum((value * normal(*value.shape, seed=30 + k).to(dtype)).sum() for k, value in enumerate(results))
        found.append([*results, *torch.autograd.grad(total, leaves)])
    for exact, computed in zip(*found, strict=True):
        torch.testing.assert_close(computed.double(), exact, rtol=1e-3, atol=1e-4)
