"""The base of the writers of C and Triton: the order of operations, rows of products, the order of weights."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from learned_optim.kernels.tracing.program import (
    SHARED_INPUTS,
    Constant,
    Elementwise,
    Input,
    MatrixProduct,
    OperationResult,
    Program,
    Scalar,
    Weight,
)
from learned_optim.kernels.tracing.ranges import Range, range_of, ranges

ROWS_SIDE_BY_SIDE = 4
"""Rows of a product that are summed side by side: as many sums as hide the latency of a multiply-add."""
LONGEST_INLINE = 60
"""Letters of an expression that is written within another."""
WITHIN_RANGE = 87.0
"""An exponential of at most that size is neither zero nor infinity in float32."""
COMPARISONS = {"eq": "==", "ge": ">=", "gt": ">", "le": "<=", "lt": "<", "ne": "!="}
INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
ProductRow = tuple[int, int]
"""A product, and one of its outputs."""


class Source(NamedTuple):
    """The source that is made of a program, in C or in Triton."""

    text: str
    weights: tuple[int, ...]
    """Places of the weights among all results of the prologue, flattened, in the order in which the source reads
    them."""


class Writer(ABC):
    """Writes the operations of a program, in order; sub-classes write one language each.

    Rows of a product are summed only where they are needed, some together, so that few wait in registers.

    Args:
        program: a simplified program.
        weights: places of weights that other programs of the source read, to which those of this one are added.
    """

    def __init__(self, program: Program, weights: list[int]) -> None:
        self.program = program
        self.ranges = ranges(program)
        self.rows = ProductRows(program)
        self.names_of_rows: dict[ProductRow, str] = {}
        self.weights = weights
        """Places of the weights, in the order in which the source reads them, among all results of the prologue."""
        self.done: set[int] = set()
        """Operations that have been written together with others."""
        self._places: dict[Weight, int] = {}
        sizes = list(map(math.prod, program.shapes))
        self._starts = [sum(sizes[:tensor]) for tensor in range(len(sizes))]
        self.users: defaultdict[int, list[int]] = defaultdict(list)
        for place, operation in enumerate(program.operations):
            for operand in operation.operands:
                if isinstance(operand, OperationResult):
                    self.users[operand.operation].append(place)
        self.inline: dict[int, str] = {}
        """Expressions of operations that are read once, and are written where they are read."""
        self.kept = {scalar for scalars in program.outputs.values() for scalar in scalars}
        """Results that are read after all operations."""
        self.masks = {
            place
            for place, operation in enumerate(program.operations)
            if isinstance(operation, Elementwise) and operation.name in COMPARISONS
        }

    def write(self) -> None:
        """Write all operations."""
        note = {True: "", False: ""}
        for place, operation in enumerate(self.program.operations):
            if self.rows.is_offset(place) or place in self.done:
                continue
            shared, line = self.program.shared[place], self.program.notes[place]
            if line and line != note[shared]:
                note[shared] = line
                self.write_note(line, shared)
            if isinstance(operation, MatrixProduct):
                write = self.write_shared_product if shared else self.write_inputs
                write(place, operation)
            elif shared:
                self.write_shared(place, operation)
            elif not self.write_together(place):
                self._write_rows_for(place)
                self.write_elementwise(place, operation)

    @abstractmethod
    def write_note(self, line: str, shared: bool) -> None:
        """Write a comment: the line of the rule's source that the following operations come from."""

    @abstractmethod
    def write_shared(self, place: int, operation: Elementwise) -> None:
        """Write an operation on shared scalars."""

    @abstractmethod
    def write_shared_product(self, place: int, product: MatrixProduct) -> None:
        """Write all rows of a product of shared scalars."""

    @abstractmethod
    def write_inputs(self, place: int, product: MatrixProduct) -> None:
        """Write the inputs of a product, which its rows are sums over."""

    @abstractmethod
    def write_elementwise(self, place: int, operation: Elementwise) -> None:
        """Write an operation on each coordinate."""

    @abstractmethod
    def write_sums(self, place: int, product: MatrixProduct, rows: Sequence[int]) -> None:
        """Sum some rows of a product, and note their names."""

    def write_together(self, place: int) -> bool:
        """Write several operations at once, of which this is the first, if the language has a better way."""
        return False

    def put_inline(self, place: int, expression: str) -> bool:
        """Keep a short sum or product for the one operation that reads it."""
        operation, users = self.program.operations[place], self.users[place]
        readers = [self.program.operations[user] for user in users]
        if (
            not isinstance(operation, Elementwise)
            or operation.name not in INFIX
            or len(users) != 1
            or OperationResult(place) in self.kept
            or isinstance(readers[0], MatrixProduct)
            or self.program.shared[users[0]] != self.program.shared[place]
            or self.rows.is_offset(users[0])
            or len(expression) > LONGEST_INLINE
        ):
            return False
        self.inline[place] = f"({expression})"
        return True

    def _write_rows_for(self, place: int) -> None:
        """Sum the rows that an operation needs, and those that what follows from it needs at once."""
        needed = self.rows.needed_by(place, self.names_of_rows)
        if not needed:
            return
        for user in self.users[place]:
            needed += [row for row in self.rows.needed_by(user, self.names_of_rows) if row not in needed]
        self.write_rows(needed)

    def write_rows(self, needed: Sequence[ProductRow]) -> None:
        """Sum rows of products."""
        by_product: defaultdict[int, list[int]] = defaultdict(list)
        for place, row in needed:
            if (place, row) not in self.names_of_rows:
                by_product[place].append(row)
        for place, rows in by_product.items():
            pending = [row for row in self.rows.used[place] if (place, row) not in self.names_of_rows]
            if len(pending) <= ROWS_SIDE_BY_SIDE:
                rows += [row for row in pending if row not in rows]
            elif len(rows) == 1:  # some neighbours that will be needed too
                rows = [row for row in pending if row >= rows[0]][:ROWS_SIDE_BY_SIDE]
            product = self.program.operations[place]
            assert isinstance(product, MatrixProduct)
            for first in range(0, len(rows), ROWS_SIDE_BY_SIDE):
                self.write_sums(place, product, rows[first : first + ROWS_SIDE_BY_SIDE])

    def write_results(self) -> None:
        """Sum the rows that are results themselves."""
        self.write_rows([row for scalars in self.program.outputs.values() for s in scalars if (row := self.rows.of(s))])

    def weight(self, weight: Weight) -> int:
        """The place of a weight in the order in which the source reads them."""
        if weight not in self._places:
            self._places[weight] = len(self.weights)
            self.weights.append(self.place(weight))
        return self._places[weight]

    def place(self, weight: Weight) -> int:
        """The place of a weight among all results of the prologue."""
        return self._starts[weight.tensor] + weight.place

    def matrix(self, product: MatrixProduct, rows: Sequence[int], *, interleaved: bool, align: int = 1) -> int:
        """Add rows of a matrix to the weights, one by one or interleaved; returns the place at which they begin."""
        self.weights += [0] * (-len(self.weights) % align)
        width, first, start = len(product.operands), len(self.weights), self._starts[product.matrix]
        apart = (1, product.outputs) if product.transposed else (width, 1)
        table = [[start + row * apart[0] + column * apart[1] for column in range(width)] for row in rows]
        flat = zip(*table, strict=True) if interleaved else table
        self.weights += [place for line in flat for place in line]
        return first

    def range(self, scalar: Scalar) -> Range:
        """The range of a scalar."""
        return range_of(scalar, self.ranges)

    def name_of(self, operation: Elementwise) -> str:
        """The name of an operation, or of a cheaper one where the ranges of its operands allow it."""
        if operation.name == "exp" and max(map(abs, self.range(operation.operands[0]))) <= WITHIN_RANGE:
            return "exp_within_range"
        return operation.name


class ProductRows:
    """Rows of products, and the offset that is added to each: the sum then begins with it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        uses: defaultdict[Scalar, int] = defaultdict(int)
        for scalars in [*(operation.operands for operation in program.operations), *program.outputs.values()]:
            for scalar in scalars:
                uses[scalar] += 1
        self.used: defaultdict[int, list[int]] = defaultdict(list)
        for scalar in uses:
            if isinstance(scalar, OperationResult) and self._is_product(scalar.operation):
                self.used[scalar.operation].append(scalar.output)
        for rows in self.used.values():
            rows.sort()
        self._offsets: dict[ProductRow, Scalar] = {}
        self._sums: dict[int, ProductRow] = {}  # additions of an offset -> the row
        for place, operation in enumerate(program.operations):
            if not isinstance(operation, Elementwise) or operation.name != "add":
                continue
            for row, offset in (operation.operands, operation.operands[::-1]):
                begins = isinstance(row, OperationResult) and self._is_product(row.operation) and uses[row] == 1
                if begins and isinstance(row, OperationResult) and not self._is_of_coordinate(offset):
                    self._offsets[row.operation, row.output] = offset
                    self._sums[place] = row.operation, row.output

    def _is_product(self, place: int) -> bool:
        return isinstance(self.program.operations[place], MatrixProduct) and not self.program.shared[place]

    def _is_of_coordinate(self, scalar: Scalar) -> bool:
        if isinstance(scalar, OperationResult):
            return not self.program.shared[scalar.operation]
        return isinstance(scalar, Input) and scalar.entry not in SHARED_INPUTS

    def is_offset(self, place: int) -> bool:
        """Whether an operation is but the addition that a row begins with."""
        return place in self._sums

    def offset(self, place: int, row: int) -> Scalar:
        """The scalar that the sum of a row begins with."""
        return self._offsets.get((place, row), Constant(0.0))

    def of(self, scalar: Scalar) -> ProductRow | None:
        """The row that a scalar is."""
        if not isinstance(scalar, OperationResult):
            return None
        if scalar.operation in self._sums:
            return self._sums[scalar.operation]
        return (scalar.operation, scalar.output) if self._is_product(scalar.operation) else None

    def needed_by(self, place: int, written: dict[ProductRow, str]) -> list[ProductRow]:
        """The rows among the operands of an elementwise operation that have not been summed."""
        operation = self.program.operations[place]
        if isinstance(operation, MatrixProduct):
            return []
        rows = [row for operand in operation.operands if (row := self.of(operand)) is not None]
        return [row for row in dict.fromkeys(rows) if row not in written]


def block(lines: Sequence[str], mark: str) -> str:
    """The body of a function, without comments that another directly follows: what they describe stands elsewhere."""
    following = [*lines[1:], ""][: len(lines)]
    return "\n".join(
        f"    {line}"
        for line, after in zip(lines, following, strict=True)
        if not line.lstrip().startswith(mark) or not after.lstrip().startswith(mark)
    )


def bare(expression: str) -> str:
    """An expression without parentheses around the whole of it."""
    depth = 0
    for place, letter in enumerate(expression):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and place < len(expression) - 1:
            return expression
    return expression[1:-1] if expression.startswith("(") else expression
