"""Interval arithmetic: the numbers between which the results of a program lie, NaN aside."""

import math

from learned_optim.kernels.tracing.program import (
    STEP_INPUT,
    Constant,
    Elementwise,
    Input,
    MatrixProduct,
    OperationResult,
    Program,
    Scalar,
)

Range = tuple[float, float]
EVERYTHING: Range = (-math.inf, math.inf)


def ranges(program: Program) -> list[Range]:
    """The range of each operation's result."""
    found: list[Range] = []
    for operation in program.operations:
        if isinstance(operation, MatrixProduct):
            found.append(EVERYTHING)
        else:
            found.append(_of_operation(operation, [range_of(operand, found) for operand in operation.operands]))
    return found


def range_of(scalar: Scalar, results: list[Range]) -> Range:
    """The range of a scalar, given the ranges of the operations before it."""
    if isinstance(scalar, Constant):
        return scalar.value, scalar.value
    if isinstance(scalar, OperationResult):
        return results[scalar.operation]
    return (1.0, math.inf) if scalar == Input(STEP_INPUT, 0) else EVERYTHING


def _of_operation(operation: Elementwise, operands: list[Range]) -> Range:
    low, high = operands[0]
    name = operation.name
    if name in ("add", "sub"):
        other_low, other_high = operands[1] if name == "add" else (-operands[1][1], -operands[1][0])
        return low + other_low, high + other_high
    if name == "mul":
        if operation.operands[0] == operation.operands[1]:
            return 0.0, math.inf
        corners = [0.0 if 0 in (one, other) else one * other for one in operands[0] for other in operands[1]]
        return min(corners), max(corners)
    if name in ("maximum", "minimum"):
        choose = max if name == "maximum" else min
        return choose(low, operands[1][0]), choose(high, operands[1][1])
    if name == "where":
        return min(operands[1][0], operands[2][0]), max(operands[1][1], operands[2][1])
    fixed: dict[str, Range] = {
        "tanh": (-1.0, 1.0),
        "gated_tanh": (-1.0, 1.0),
        "sign": (-1.0, 1.0),
        "sin": (-1.0, 1.0),
        "cos": (-1.0, 1.0),
        "erf": (-1.0, 1.0),
        "sigmoid": (0.0, 1.0),
        "exp": (0.0, math.inf),
        "expm1": (-1.0, math.inf),
        "abs": (0.0, math.inf),
        "sqrt": (0.0, math.inf),
        "rsqrt": (0.0, math.inf),
        "relu": (0.0, math.inf),
    }
    return fixed.get(name, EVERYTHING)
