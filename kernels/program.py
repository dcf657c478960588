"""What a kernel computes for one coordinate: a list of operations on scalars, free of any rule.

:func:`learned_optim.kernels.trace.trace` makes it from a rule's ``forward``; emitters turn it into source.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Constant:
    """A number that the rule's source holds."""

    value: float


@dataclass(frozen=True)
class Uniform:
    """An entry of a tensor that is the same for all coordinates: of a weight, or of what the prologue makes of it."""

    tensor: int
    """Place among the results of the prologue."""
    place: int
    """In the flattened tensor."""


@dataclass(frozen=True)
class Input:
    """The gradient, or a feature of an entry of the state."""

    entry: str
    feature: int


@dataclass(frozen=True)
class Result:
    """What an operation of the program has computed."""

    operation: int
    output: int = 0


Scalar = Constant | Uniform | Input | Result


@dataclass(frozen=True)
class Elementwise:
    """One elementary operation."""

    name: str
    """That of torch's function of the same arguments: ``"add"``, ``"where"``, ``"tanh"`` ..."""
    operands: tuple[Scalar, ...]


@dataclass(frozen=True)
class Product:
    """``outputs = matrix @ operands``, kept whole: emitters choose their loops."""

    matrix: int
    """Place among the results of the prologue; ``(outputs, operands)``."""
    outputs: int
    operands: tuple[Scalar, ...]


Operation = Elementwise | Product


@dataclass(frozen=True)
class Program:
    """The operations of a coordinate's step, in order, and what is computed once a step for all of them.

    Args:
        prologue: from meta-parameters and step count to the tensors that :class:`Uniform` and :class:`Product` name.
        operations: each uses results of those before it.
        outputs: of each output (``"update"``, entries of the state), its features.
    """

    prologue: Callable[..., Sequence[Tensor]]
    operations: tuple[Operation, ...]
    outputs: dict[str, tuple[Scalar, ...]]
