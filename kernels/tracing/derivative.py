"""The backward pass of a program: reverse mode, operation by operation.

The backward program computes the forward pass again. Gradients of weights are sums over coordinates, either of
*signals* or of products of two signals: the program returns the signals of each coordinate, and torch multiplies and
adds them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from learned_optim.kernels.tracing.program import (
    PARAMETER_INPUT,
    Constant,
    Elementwise,
    Input,
    MatrixProduct,
    OperationResult,
    Program,
    Scalar,
    Weight,
)
from learned_optim.kernels.tracing.simplify import Rewriter, simplified

SIGNALS = "signals"
"""The output of a backward program that gradients of weights are made of."""


@dataclass(frozen=True)
class MatrixGradient:
    """The gradient of a matrix: deltas times inputs, summed over coordinates. Both are scalars by their place."""

    matrix: int
    transposed: bool
    deltas: tuple[int, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Derivative:
    """A backward program, and how gradients of weights are made from what it returns.

    Args:
        program: computes gradients of the inputs, and signals, from the inputs and the gradients of the outputs.
        matrices: how gradients of matrices are made.
        weights: each single weight -> the place of the signal whose sum is its gradient.
    """

    program: Program
    matrices: tuple[MatrixGradient, ...]
    weights: dict[Weight, int]


def derivative(program: Program) -> Derivative:
    """Differentiate a program without shared operations.

    Args:
        program: a program without short cuts.
    """
    return _Differentiation(program).derivative()


class _Differentiation:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.made = Rewriter()
        self.made.note = "The program itself"
        for operation in program.operations:
            self.made.emit(operation)
        self.made.note = "Backwards"
        self.contributions: defaultdict[Scalar, list[Scalar]] = defaultdict(list)
        self.signals: list[Scalar] = []
        self.matrices: list[MatrixGradient] = []

    def derivative(self) -> Derivative:
        """Go backwards through all operations."""
        inputs = {"grad": 1, **({PARAMETER_INPUT: 1} if self.program.reads_parameter else {}), **self.program.features}
        results = {name: len(scalars) for name, scalars in self.program.outputs.items()}
        for name, scalars in self.program.outputs.items():
            for feature, scalar in enumerate(scalars):
                self.contributions[scalar].append(Input(f"d_{name}", feature))
        for place in reversed(range(len(self.program.operations))):
            operation = self.program.operations[place]
            if isinstance(operation, MatrixProduct):
                self.product(place, operation)
            elif (gradient := self.total(OperationResult(place))) is not None:
                for operand, contribution in self.elementwise(operation, OperationResult(place), gradient):
                    self.contributions[operand].append(contribution)
        zero = Constant(0.0)
        outputs = {
            f"d_{name}": tuple(self.total(Input(name, feature)) or zero for feature in range(count))
            for name, count in inputs.items()
        }
        weights = {
            scalar: self.signal(total)
            for scalar in list(self.contributions)
            if isinstance(scalar, Weight) and (total := self.total(scalar)) is not None
        }
        outputs[SIGNALS] = tuple(self.signals)
        backward = replace(
            self.program,
            features={**self.program.features, **{f"d_{name}": count for name, count in results.items()}},
            operations=tuple(self.made.made),
            outputs=outputs,
            notes=tuple(self.made.notes),
        )
        return Derivative(simplified(backward, short_cuts=False), tuple(self.matrices), weights)

    def total(self, scalar: Scalar) -> Scalar | None:
        """The gradient with respect to a scalar, None for zero."""
        found = self.contributions.get(scalar)
        if not found:
            return None
        while len(found) > 1:
            one, other = found.pop(), found.pop()
            found.append(self.made.apply("add", one, other))
        return found[0]

    def signal(self, scalar: Scalar) -> int:
        """The place of a scalar among the signals."""
        if scalar not in self.signals:
            self.signals.append(scalar)
        return self.signals.index(scalar)

    def product(self, place: int, product: MatrixProduct) -> None:
        """Gradients of a matrix and of what it is multiplied with."""
        deltas = [self.total(OperationResult(place, row)) or Constant(0.0) for row in range(product.outputs)]
        if all(delta == Constant(0.0) for delta in deltas):
            return
        back = MatrixProduct(product.matrix, len(product.operands), tuple(deltas), not product.transposed)
        result = self.made.emit(back)
        for column, operand in enumerate(product.operands):
            self.contributions[operand].append(replace(result, output=column))
        places = tuple(map(self.signal, deltas)), tuple(map(self.signal, product.operands))
        self.matrices.append(MatrixGradient(product.matrix, product.transposed, *places))

    def elementwise(self, operation: Elementwise, out: Scalar, d: Scalar) -> Iterator[tuple[Scalar, Scalar]]:
        """The contributions of an operation to the gradients of its operands."""
        apply, zero = self.made.apply, Constant(0.0)
        x = operation.operands[0]
        y = operation.operands[-1]
        times: Callable[..., Scalar] = lambda *factors: _folded(apply, factors)  # noqa: E731
        minus: Callable[[Scalar], Scalar] = lambda scalar: apply("neg", scalar)  # noqa: E731
        match operation.name:
            case "add":
                yield x, d
                yield y, d
            case "sub":
                yield x, d
                yield y, minus(d)
            case "mul":
                yield x, times(d, y)
                yield y, times(d, x)
            case "div":
                quotient = apply("div", d, y)
                yield x, quotient
                yield y, minus(times(quotient, out))
            case "maximum" | "minimum":  # at the bound itself the gradient passes, as in torch.clamp
                keeps = apply("ge" if operation.name == "maximum" else "le", x, y)
                yield x, apply("where", keeps, d, zero)
                yield y, apply("where", keeps, zero, d)
            case "where":
                condition, x, y = operation.operands
                yield x, apply("where", condition, d, zero)
                yield y, apply("where", condition, zero, d)
            case "remainder" if isinstance(y, Constant):
                yield x, d
            case "pow" if isinstance(y, Constant):
                yield x, times(d, y, apply("pow", x, Constant(y.value - 1)))
            case "eq" | "ge" | "gt" | "le" | "lt" | "ne" | "sign":
                return
            case _:
                yield x, self.of_function(operation.name, x, out, d)

    def of_function(self, name: str, x: Scalar, out: Scalar, d: Scalar) -> Scalar:
        """The contribution of a function of one number to the gradient of its argument."""
        apply, one = self.made.apply, Constant(1.0)
        times: Callable[..., Scalar] = lambda *factors: _folded(apply, factors)  # noqa: E731
        minus: Callable[[Scalar], Scalar] = lambda scalar: apply("neg", scalar)  # noqa: E731
        match name:
            case "neg":
                return minus(d)
            case "reciprocal":
                return minus(times(d, out, out))
            case "exp":
                return times(d, out)
            case "expm1":
                return times(d, apply("add", out, one))
            case "log":
                return apply("div", d, x)
            case "sqrt":
                return apply("div", times(d, Constant(0.5)), out)
            case "rsqrt":
                return times(d, Constant(-0.5), out, out, out)
            case "tanh":
                return times(d, apply("sub", one, times(out, out)))
            case "sigmoid":
                return times(d, out, apply("sub", one, out))
            case "abs":
                return times(d, apply("sign", x))
            case "relu":
                return apply("where", apply("gt", x, Constant(0.0)), d, Constant(0.0))
            case "sin":
                return times(d, apply("cos", x))
            case "cos":
                return minus(times(d, apply("sin", x)))
            case "erf":
                return times(d, Constant(2 / math.pi**0.5), apply("exp", minus(times(x, x))))
            case _:
                raise NotImplementedError(f"the derivative of {name} is not known")


def _folded(apply: Callable[..., Scalar], factors: tuple[Scalar, ...]) -> Scalar:
    product, *others = factors
    for factor in others:
        product = apply("mul", product, factor)
    return product
