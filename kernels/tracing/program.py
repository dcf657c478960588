"""The program of one coordinate: a list of operations on scalars, which knows no rule.

:func:`~learned_optim.kernels.tracing.trace.trace` makes it from a rule's ``forward``,
:mod:`~learned_optim.kernels.tracing.simplify` brings it into the form that is cheapest, and the writers of
``kernels/sources/`` turn it into source.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

STEP_INPUT = "step"
SHARED_INPUTS = (STEP_INPUT, "lr", "progress", "averaging")
"""Inputs that are the same for all coordinates of a tensor: the count of the step, and its conditions."""
PARAMETER_INPUT = "parameter"
"""The input that is a coordinate's own value."""


@dataclass(frozen=True)
class Constant:
    """A number that the rule's source holds."""

    value: float


@dataclass(frozen=True)
class Weight:
    """An entry of a meta-parameter, or of a tensor that depends on meta-parameters alone."""

    tensor: int
    """Place among the results of the prologue."""
    place: int
    """Place in the flattened tensor."""


@dataclass(frozen=True)
class Input:
    """The gradient, the parameter, one of :data:`SHARED_INPUTS`, or a feature of an entry of the state."""

    entry: str
    feature: int


@dataclass(frozen=True)
class OperationResult:
    """The result of an operation of the program."""

    operation: int
    output: int = 0


Scalar = Constant | Weight | Input | OperationResult


@dataclass(frozen=True)
class Elementwise:
    """One elementary operation."""

    name: str
    """The name of torch's function of the same arguments, ``"add"``, ``"where"``, ``"tanh"`` ...; or one of
    :data:`learned_optim.kernels.tracing.simplify.SHORT_CUTS`."""
    operands: tuple[Scalar, ...]


@dataclass(frozen=True)
class MatrixProduct:
    """``outputs = matrix @ operands``, kept whole: emitters choose their loops."""

    matrix: int
    """Place among the results of the prologue; ``(outputs, operands)``."""
    outputs: int
    operands: tuple[Scalar, ...]
    transposed: bool = False
    """Whether that result is ``(operands, outputs)``."""

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the product for one coordinate."""
        return self.outputs * len(self.operands)


Operation = Elementwise | MatrixProduct


@dataclass(frozen=True)
class Program:
    """The operations of a coordinate's step, in order.

    Args:
        prologue: computes the tensors that :class:`Weight` and :class:`MatrixProduct` name from meta-parameters.
        shapes: the shapes of these tensors.
        features: number of features of each entry of the state.
        operations: each reads only results of those before it.
        outputs: output (``"update"`` and the entries of the state) -> its features.
        notes: the line of the rule's source that each operation comes from.
    """

    prologue: Callable[..., Sequence[Tensor]]
    shapes: tuple[tuple[int, ...], ...]
    features: dict[str, int]
    operations: tuple[Operation, ...]
    outputs: dict[str, tuple[Scalar, ...]]
    notes: tuple[str, ...]

    @functools.cached_property
    def shared(self) -> tuple[bool, ...]:
        """Whether each operation is the same for all coordinates, so that it is computed once a step."""
        shared: list[bool] = []
        for operation in self.operations:
            shared.append(all(is_shared(operand, shared) for operand in operation.operands))
        return tuple(shared)

    @property
    def products(self) -> list[MatrixProduct]:
        """Products that are different for each coordinate."""
        operations = zip(self.operations, self.shared, strict=True)
        return [operation for operation, shared in operations if isinstance(operation, MatrixProduct) and not shared]

    @functools.cached_property
    def written(self) -> dict[Input, Scalar]:
        """The features of outputs that may change, with their values; others of the state stay as they are."""
        features = {Input(name, place): s for name, scalars in self.outputs.items() for place, s in enumerate(scalars)}
        return {feature: scalar for feature, scalar in features.items() if scalar != feature}

    @functools.cached_property
    def read(self) -> frozenset[Scalar]:
        """Everything that an operation or an output reads."""
        operands = [scalar for operation in self.operations for scalar in operation.operands]
        return frozenset([*operands, *self.written.values()])

    @property
    def reads_parameter(self) -> bool:
        """Whether anything depends on the coordinate's own value."""
        return Input(PARAMETER_INPUT, 0) in self.read


def is_shared(scalar: Scalar, shared: Sequence[bool]) -> bool:
    """Whether a scalar is the same for all coordinates; ``shared`` holds the answer for the operations before it."""
    if isinstance(scalar, OperationResult):
        return shared[scalar.operation]
    return not isinstance(scalar, Input) or scalar.entry in SHARED_INPUTS
