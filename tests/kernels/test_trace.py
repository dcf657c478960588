"""The program that is traced from a rule computes what the rule does; what is not coordinatewise is refused."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.rules import RULES, Build, each, randomised
from learned_optim.kernels.tracing.program import Constant, Elementwise, Input, MatrixProduct, Program, Scalar, Weight
from learned_optim.kernels.tracing.trace import NotCoordinatewiseError, trace
from learned_optim.rules import UpdateRule

State = Mapping[str, Tensor]
COORDINATES = 7


def evaluated(program: Program, parameters: Mapping[str, Tensor], grad: Tensor, state: State, step: Tensor) -> State:
    """The outputs of a program, ``(features, coordinates)`` each, operation by operation."""
    uniform = program.prologue(*parameters.values())
    results: list[Any] = []

    def value(scalar: Scalar) -> Tensor:
        if isinstance(scalar, Constant):
            found = torch.tensor(scalar.value, dtype=grad.dtype)
        elif isinstance(scalar, Weight):
            found = uniform[scalar.tensor].reshape(-1)[scalar.place]
        elif isinstance(scalar, Input):
            found = {"grad": grad, "step": step}.get(scalar.entry)  # type: ignore[assignment]
            found = state[scalar.entry][scalar.feature] if found is None else found
        else:
            found = results[scalar.operation][scalar.output]
        return found.expand(COORDINATES)

    for operation in program.operations:
        operands = [value(operand) for operand in operation.operands]
        if isinstance(operation, MatrixProduct):
            results.append(uniform[operation.matrix] @ torch.stack(operands))
        else:
            results.append([getattr(torch, operation.name)(*operands)])
    return {name: torch.stack([value(scalar) for scalar in scalars]) for name, scalars in program.outputs.items()}


def traced(rule: UpdateRule) -> Program:
    return trace(rule, list(rule.parameters()), rule.state_features)


@each(RULES)
def test_program_computes_the_step_of_the_rule(build: Build) -> None:
    rule = randomised(build()).double().requires_grad_(False)
    program = traced(rule)
    generator = torch.Generator().manual_seed(0)
    draw: Callable[..., Tensor] = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    for step in (1.0, 7.0, 300.0):
        grad = draw(COORDINATES) - 0.5
        state = {entry: draw(features, COORDINATES) for entry, features in rule.state_features.items()}
        update, new_state = rule(grad, state, torch.tensor(step, dtype=torch.float64))
        outputs = evaluated(
            program, dict(rule.named_parameters()), grad, state, torch.tensor(step, dtype=torch.float64)
        )
        for name, expected in {"update": update[None], **new_state}.items():
            # Some hundred roundings of numbers of about 1.
            torch.testing.assert_close(outputs[name], expected, rtol=1e-13, atol=1e-14)


@each(RULES)
def test_every_operation_depends_on_more_than_weights(build: Build) -> None:
    program = traced(randomised(build()).requires_grad_(False))
    for operation in program.operations:
        assert not all(isinstance(operand, Constant | Weight) for operand in operation.operands)


def test_values_shared_by_all_coordinates_are_marked() -> None:
    program = traced(randomised(RULES["schedule-free-lstm"]()).requires_grad_(False))
    names = [
        operation.name
        for operation, shared in zip(program.operations, program.shared, strict=True)
        if shared and isinstance(operation, Elementwise)
    ]
    assert names.count("expm1") == 2  # averages and their squares have the same decays
    assert names.count("tanh") == 3  # of the time scales


def test_operations_are_unique_and_used() -> None:
    program = traced(randomised(RULES["schedule-free-lstm"]()).requires_grad_(False))
    assert len(set(program.operations)) == len(program.operations)
    used = {
        s.operation for op in program.operations for s in op.operands if not isinstance(s, Constant | Weight | Input)
    }
    results = {
        s.operation for out in program.outputs.values() for s in out if not isinstance(s, Constant | Weight | Input)
    }
    assert used | results == set(range(len(program.operations)))


Forward = Callable[[Tensor, State, Tensor], tuple[Tensor, State]]


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        pytest.param(lambda g, s, t: (g - g.mean(), s), "aten.mean.default", id="mean"),
        pytest.param(lambda g, s, t: (g - g.sum(), s), "mixes coordinates", id="sum"),
        pytest.param(lambda g, s, t: (g.flip(0), s), "aten.flip.default", id="flip"),
        pytest.param(lambda g, s, t: (torch.stack([g[1], g[0], g[2]]), s), "into another order", id="order"),
        pytest.param(lambda g, s, t: (g.sort().values, s), "aten.sort.default", id="sort"),
        pytest.param(lambda g, s, t: (g * g[0], s), "mixes coordinates", id="another-one"),
        pytest.param(lambda g, s, t: ((s["m"].T @ s["m"]).sum(0), s), "multiplies coordinates", id="product"),
        pytest.param(lambda g, s, t: (g.lgamma(), s), "aten.lgamma.default", id="unknown"),
    ],
)
def test_non_coordinatewise_function_is_refused(forward: Forward, message: str) -> None:
    with pytest.raises(NotCoordinatewiseError, match=f"{message}.*a rule must be coordinatewise"):
        trace(forward, [torch.ones(2)], {"m": 2})
