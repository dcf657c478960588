"""Layers of an LSTM in a program: on a GPU they are loops over units, as straight code would not fit the cache."""

from dataclasses import dataclass

from learned_optim.kernels.sources.writer import ProductRow, ProductRows
from learned_optim.kernels.tracing.program import (
    Elementwise,
    Input,
    MatrixProduct,
    OperationResult,
    Program,
    Scalar,
    Weight,
)

LARGEST_STRAIGHT = 1024
"""Multiply-adds of a product that are straight code."""
MOST_OUTPUTS = 8
"""Rows of a product that a loop sums, and carries in registers."""


@dataclass(frozen=True)
class Unit:
    """One unit: the rows of its gates, and the operations that follow."""

    rows: tuple[int, int, int, int]
    """Input, forget, candidate and output gate, as weights lie in memory."""
    cell: int
    """The operation ``lstm_cell``."""
    hidden: int
    """The operation ``gated_tanh``."""
    kept: Input
    """The feature of the state that holds the cell, before and after."""
    target: Input
    """The feature of the state that the hidden value is written to."""


@dataclass(frozen=True)
class Layer:
    """The units of one product, whose cells lie next to one another in the state."""

    product: int
    units: tuple[Unit, ...]
    context: MatrixProduct | None
    """A product of what all coordinates share, which is added to the gates row by row."""
    biases: tuple[Weight, ...]
    """The bias of each row of the product."""
    outputs: int | None
    """The only product that reads the hidden values, if it has few rows: these are then summed unit by unit."""


def layers(program: Program, rows: ProductRows) -> list[Layer]:
    """Find all layers of a program that are too large for straight code."""
    found = []
    for place, operation in enumerate(program.operations):
        if program.shared[place] or not isinstance(operation, MatrixProduct):
            continue
        if operation.multiply_adds > LARGEST_STRAIGHT:
            layer = _layer(program, rows, place, operation)
            found += [layer] if layer is not None else []
    return found


def _layer(program: Program, rows: ProductRows, product: int, operation: MatrixProduct) -> Layer | None:
    units = [unit for place in range(len(program.operations)) if (unit := _unit(program, rows, product, place))]
    units.sort(key=lambda unit: unit.kept.feature)
    if sorted(row for unit in units for row in unit.rows) != list(range(operation.outputs)):
        return None
    first = units[0].kept
    target = units[0].target
    for k, unit in enumerate(units):
        if unit.kept != Input(first.entry, first.feature + k) or unit.target != Input(target.entry, target.feature + k):
            return None
    biases, contexts = [], set()
    for row in range(operation.outputs):
        offset = _offset(program, rows.offset(product, row), row)
        if offset is None:
            return None
        biases.append(offset[0])
        contexts.add(offset[1])
    if len(contexts) > 1:
        return None
    (context,) = contexts
    found = None if context is None else program.operations[context]
    assert not isinstance(found, Elementwise)
    return Layer(product, tuple(units), found, tuple(biases), _outputs(program, units))


def _outputs(program: Program, units: list[Unit]) -> int | None:
    """The small product whose inputs are the hidden values, which nothing else reads but the state."""
    hidden = tuple(OperationResult(unit.hidden) for unit in units)
    readers = [place for place, other in enumerate(program.operations) if {*hidden} & {*other.operands}]
    if len(readers) != 1:
        return None
    reader = program.operations[readers[0]]
    small = isinstance(reader, MatrixProduct) and reader.operands == hidden and reader.outputs <= MOST_OUTPUTS
    return readers[0] if small else None


def _unit(program: Program, rows: ProductRows, product: int, place: int) -> Unit | None:
    """The unit whose cell an operation computes."""
    cell = program.operations[place]
    if not isinstance(cell, Elementwise) or cell.name != "lstm_cell":
        return None
    forget, kept, input_gate, candidate = cell.operands
    if not isinstance(kept, Input) or program.outputs[kept.entry][kept.feature] != OperationResult(place):
        return None
    users = [user for user, other in enumerate(program.operations) if OperationResult(place) in other.operands]
    outputs = [scalar for scalars in program.outputs.values() for scalar in scalars if scalar == OperationResult(place)]
    if len(users) != 1 or len(outputs) != 1:
        return None
    hidden = program.operations[users[0]]
    if (
        not isinstance(hidden, Elementwise)
        or hidden.name != "gated_tanh"
        or hidden.operands[1] != OperationResult(place)
    ):
        return None
    gates = [rows.of(scalar) for scalar in (input_gate, forget, candidate, hidden.operands[0])]
    of_product: list[ProductRow] = [gate for gate in gates if gate is not None and gate[0] == product]
    if len(of_product) < 4:
        return None
    targets = [
        Input(entry, feature)
        for entry, scalars in program.outputs.items()
        for feature, scalar in enumerate(scalars)
        if scalar == OperationResult(users[0])
    ]
    if len(targets) != 1 or targets[0].entry == "update":
        return None
    i, f, g, o = (row for _, row in of_product)
    return Unit((i, f, g, o), place, users[0], kept, targets[0])


def _offset(program: Program, scalar: Scalar, row: int) -> tuple[Weight, int | None] | None:
    """The bias that a row begins with, and the product of shared signals that is added to it."""
    if isinstance(scalar, Weight):
        return scalar, None
    operation = program.operations[scalar.operation] if isinstance(scalar, OperationResult) else None
    if not isinstance(operation, Elementwise) or operation.name != "add":
        return None
    for bias, context in (operation.operands, operation.operands[::-1]):
        follows = isinstance(context, OperationResult) and isinstance(
            program.operations[context.operation], MatrixProduct
        )
        if isinstance(bias, Weight) and isinstance(context, OperationResult) and follows and context.output == row:
            return bias, context.operation
    return None
