"""From a program to C: the function of one coordinate, sixteen of them side by side.

The rest of the source, ``cpu.c``, runs it over tensors. What all coordinates share is computed before, in float64.
"""

import functools
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from learned_optim.kernels.program import (
    Constant,
    Elementwise,
    Input,
    Operation,
    Product,
    Program,
    Result,
    Scalar,
    Weight,
)
from learned_optim.kernels.ranges import range_of, ranges

DTYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float64: "FLOAT64"}
TOGETHER = 4
"""Rows of a product that are summed side by side: as many sums as hide the latency of a multiply-add."""
WITHIN_RANGE = 87.0
"""An exponential of at most that size is neither zero nor infinity in float32."""
COMPARISONS = {"eq": "==", "ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
FUNCTIONS = {
    "abs": "magnitude",
    "exp": "exponential",
    "exp_within_range": "exponential_within_range",
    "expm1": "exponential_minus_1",
    "gated_tanh": "gated_tanh",
    "log": "logarithm",
    "lstm_cell": "lstm_cell",
    "maximum": "larger",
    "minimum": "smaller",
    "pow": "power",
    "relu": "rectified",
    "rsqrt": "reciprocal_root",
    "sigmoid": "sigmoid",
    "sign": "sign",
    "sqrt": "root",
    "tanh": "hyperbolic_tangent",
}
"""Names in ``vector.h``; with ``shared_`` before them those on single numbers."""


class Source(NamedTuple):
    """The C of a program."""

    text: str
    weights: tuple[int, ...]
    """Places of the weights, in the order in which it reads them, among all results of the prologue, flattened."""


def source(program: Program, dtype: torch.dtype, name: str = "") -> Source:
    """Write the C of a program, without what depends on the dtypes of tensors.

    Args:
        program: as simplified.
        dtype: of the arithmetic, float32 or float64.
        name: of the rule, for the first comment.
    """
    return _Writer(program, dtype).source(name)


def storage(program: Program, dtypes: Sequence[torch.dtype]) -> str:
    """How state is read and written.

    Args:
        program: whose state it is.
        dtypes: of parameters, gradients and each entry of the state.
    """
    parameter, grad, *entries = (DTYPES[dtype] for dtype in dtypes)
    calls = {
        kind: "\n".join(
            f"    next = {kind}_features(next, tensor, {entry}, place, {dtype}, count, {features});"
            for entry, (dtype, features) in enumerate(zip(entries, program.features.values(), strict=True))
        )
        for kind in ("load", "store")
    }
    return f"""
#define PARAMETER_DTYPE {parameter}
#define GRAD_DTYPE {grad}
#define LOAD_STATE \\
{_continued(calls["load"])}
#define STORE_STATE \\
{_continued(calls["store"])}
"""


def _continued(lines: str) -> str:
    return lines.replace("\n", " \\\n")


class _Writer:
    """Writes the two functions of a program: ``share`` of a step, ``update`` of a vector of coordinates."""

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self.program = program
        self.suffix = "f" if dtype == torch.float32 else ""
        self.real = dtype
        self.share: list[str] = []
        self.update: list[str] = []
        self.weights: list[int] = []
        self.places: dict[tuple[int, int], int] = {}
        sizes = [functools.reduce(int.__mul__, shape, 1) for shape in program.shapes]
        self.starts = [sum(sizes[:tensor]) for tensor in range(len(sizes))]
        self.kept: dict[int, int] = {}  # shared results that the coordinates read -> their place in Shared
        firsts = [sum(list(program.features.values())[:entry]) for entry in range(len(program.features))]
        self.firsts = dict(zip(program.features, firsts, strict=True))
        self.users: defaultdict[int, list[int]] = defaultdict(list)
        for place, operation in enumerate(program.operations):
            for operand in operation.operands:
                if isinstance(operand, Result):
                    self.users[operand.operation].append(place)
        self.rows = _Rows(program)
        self.ranges = ranges(program)
        self.written_rows: dict[tuple[int, int], str] = {}
        self.masks = {
            place
            for place, operation in enumerate(program.operations)
            if isinstance(operation, Elementwise) and operation.name in COMPARISONS
        }

    def source(self, name: str) -> Source:
        """Both functions, and the order of the weights."""
        note = ""
        for place, operation in enumerate(self.program.operations):
            lines = self.share if self.program.shared[place] else self.update
            line = self.program.notes[place] if self.program.notes else ""
            if line != note and not self.rows.is_offset(place):
                note = line
                if line:
                    lines.append(f"/* {line.replace('*/', '* /')} */")
            if self.program.shared[place]:
                self.write_shared(place, operation)
            elif isinstance(operation, Product):
                inputs = ", ".join(self.vector(operand) for operand in operation.operands)
                lines += _wrapped(f"const vec inputs{place}[] = {{{inputs}}};")
            elif not self.rows.is_offset(place):
                self.write_rows_for(place)
                self.write_elementwise(place, operation)
        results = self.results()
        features = sum(self.program.features.values())
        counts = {"FEATURES": max(features, 1), "ENTRIES": max(len(self.program.features), 1), "SHARED": len(self.kept)}
        text = f"""/* The step of {name or "a rule"}, made from its forward. */

enum {{ {", ".join(f"{key} = {value}" for key, value in counts.items())} }};

typedef struct {{
    real values[SHARED + 1];
}} Shared;

/* What all coordinates share. */
static void share(Shared *shared, const real *weights, double step) {{
{_indented(self.share)}
}}

/* The update of a vector of coordinates, and their new state in the place of the old one. */
static __attribute__((noinline)) vec update(vec *state, vec grad, const Shared *shared, const real *weights) {{
{_indented([*self.update, *results])}
}}
"""
        return Source(text, tuple(self.weights))

    def results(self) -> list[str]:
        """The lines that write the state, and return the update."""
        for scalars in self.program.outputs.values():
            self.write_rows([row for scalar in scalars if (row := self.rows.of(scalar)) is not None])
        change = self.vector(self.program.outputs["update"][0])
        copies, stores = ([f"const vec change = {change};"], []) if change.startswith("state") else ([], [])
        change = "change" if copies else change
        for entry, scalars in self.program.outputs.items():
            for feature, scalar in enumerate(scalars):
                if entry == "update" or scalar == Input(entry, feature):
                    continue
                place, value = self.firsts[entry] + feature, self.vector(scalar)
                if value.startswith("state"):  # moves to another place
                    copies.append(f"const vec moved{place} = {value};")
                    value = f"moved{place}"
                stores.append(f"state[{place}] = {value};")
        return ["/* The new state */", *copies, *stores, f"return {change};"]

    # What all coordinates share

    def write_shared(self, place: int, operation: Operation) -> None:
        """One operation on float64 numbers; its result is kept if coordinates read it."""
        if isinstance(operation, Product):
            operands = ", ".join(map(self.number, operation.operands))
            count = len(operation.operands)
            first = self.matrix(operation, range(operation.outputs), interleaved=False)
            self.share += _wrapped(f"const double x{place}[] = {{{operands}}};")
            self.share += [
                f"double s{place}[{operation.outputs}];",
                f"shared_product(s{place}, {operation.outputs}, weights + {first}, x{place}, {count});",
            ]
        else:
            numbers = list(map(self.number, operation.operands))
            self.share.append(f"const double s{place} = {_expression(operation.name, numbers, 'shared_', _where)};")
        if any(not self.program.shared[user] for user in self.users[place]) or self.is_output(place):
            outputs = operation.outputs if isinstance(operation, Product) else 1
            self.kept[place] = len(self.kept)
            for output in range(outputs):
                if output:
                    self.kept[-place * 10_000 - output] = len(self.kept)
                name = f"s{place}[{output}]" if isinstance(operation, Product) else f"s{place}"
                self.share.append(f"shared->values[{self.kept[place] + output}] = (real){name};")

    def is_output(self, place: int) -> bool:
        return any(Result(place) == scalar for scalars in self.program.outputs.values() for scalar in scalars)

    def number(self, scalar: Scalar) -> str:
        """A scalar in ``share``."""
        if isinstance(scalar, Constant):
            return _literal(scalar.value, "")
        if isinstance(scalar, Weight):
            return f"weights[{self.weight(scalar.tensor, scalar.place)}]"
        if isinstance(scalar, Input):
            return "step"
        whole = isinstance(self.program.operations[scalar.operation], Elementwise)
        return f"s{scalar.operation}" if whole else f"s{scalar.operation}[{scalar.output}]"

    # What is different for each coordinate

    def write_elementwise(self, place: int, operation: Elementwise) -> None:
        """One operation on vectors."""
        kind = "const ivec" if place in self.masks else "const vec"
        if operation.name in INFIX or operation.name in COMPARISONS or operation.name == "reciprocal":
            operands = [self.operand(operand) for operand in operation.operands]
        elif operation.name == "where":
            operands = [self.mask(operation.operands[0]), *map(self.vector, operation.operands[1:])]
        else:
            operands = [self.vector(operand) for operand in operation.operands]
        if operation.name == "exp" and max(map(abs, range_of(operation.operands[0], self.ranges))) <= WITHIN_RANGE:
            name = "exp_within_range"
        else:
            name = operation.name
        expression = _expression(name, operands, "", lambda *of: f"where({', '.join(of)})", self.literal(1.0))
        self.update += _wrapped(f"{kind} t{place} = {expression};")

    def operand(self, scalar: Scalar) -> str:
        """A scalar in ``update``: a vector, or one number for all."""
        if isinstance(scalar, Constant):
            return self.literal(scalar.value)
        if isinstance(scalar, Weight):
            return f"weights[{self.weight(scalar.tensor, scalar.place)}]"
        if isinstance(scalar, Input):
            return "grad" if scalar.entry == "grad" else f"state[{self.firsts[scalar.entry] + scalar.feature}]"
        if self.program.shared[scalar.operation]:
            return f"shared->values[{self.kept[scalar.operation] + scalar.output}]"
        row = self.rows.of(scalar)
        if row is not None:
            return self.written_rows[row]
        name = f"t{scalar.operation}"
        return f"where({name}, all(1), all(0))" if scalar.operation in self.masks else name

    def vector(self, scalar: Scalar) -> str:
        """A scalar in ``update`` as a vector."""
        name = self.operand(scalar)
        single = isinstance(scalar, Constant | Weight) or name.startswith("shared->")
        return f"all({name})" if single else name

    def mask(self, scalar: Scalar) -> str:
        """The condition of a choice."""
        is_mask = isinstance(scalar, Result) and scalar.operation in self.masks
        if is_mask and isinstance(scalar, Result) and not self.program.shared[scalar.operation]:
            return f"t{scalar.operation}"
        return f"({self.vector(scalar)} != 0)"

    def write_rows_for(self, place: int) -> None:
        """Sum the rows of products that an operation needs, and those that what follows from it needs at once."""
        needed = self.rows.needed_by(place, self.written_rows)
        if not needed:
            return
        for user in self.users[place]:
            needed += [row for row in self.rows.needed_by(user, self.written_rows) if row not in needed]
        self.write_rows(needed)

    def write_rows(self, needed: Sequence[tuple[int, int]]) -> None:
        """Sum rows of products."""
        by_product: defaultdict[int, list[int]] = defaultdict(list)
        for product, row in needed:
            if (product, row) not in self.written_rows:
                by_product[product].append(row)
        for product, rows in by_product.items():
            pending = [row for row in self.rows.rows[product] if (product, row) not in self.written_rows]
            if len(pending) <= TOGETHER:
                rows = pending
            elif len(rows) == 1:  # some neighbours that will be needed too
                rows = [row for row in pending if row >= rows[0]][:TOGETHER]
            for first in range(0, len(rows), TOGETHER):
                self.write_sums(product, rows[first : first + TOGETHER])

    def write_sums(self, place: int, rows: Sequence[int]) -> None:
        """Sum some rows of one product."""
        product = self.program.operations[place]
        assert isinstance(product, Product)
        name = f"rows{place}_{rows[0]}"
        starts = ", ".join(self.vector(self.rows.offset(place, row)) for row in rows)
        first = self.matrix(product, rows, interleaved=True)
        self.update += _wrapped(f"vec {name}[] = {{{starts}}};")
        inputs = f"inputs{place}, {len(product.operands)}"
        self.update.append(f"add_products({name}, {len(rows)}, weights + {first}, {inputs});")
        for place_of_row, row in enumerate(rows):
            self.written_rows[place, row] = f"{name}[{place_of_row}]"

    # Weights

    def weight(self, tensor: int, place: int) -> int:
        """Where a weight lies."""
        key = tensor, place
        if key not in self.places:
            self.places[key] = len(self.weights)
            self.weights.append(self.starts[tensor] + place)
        return self.places[key]

    def matrix(self, product: Product, rows: Sequence[int], *, interleaved: bool) -> int:
        """Where the rows of a matrix begin: one after the other, or column by column."""
        width, first = len(product.operands), len(self.weights)
        start = self.starts[product.matrix]
        table = [[start + row * width + column for column in range(width)] for row in rows]
        flat = zip(*table, strict=True) if interleaved else table
        self.weights += [place for line in flat for place in line]
        return first

    def literal(self, value: float) -> str:
        return _literal(value, self.suffix)


class _Rows:
    """Rows of products, and what is added to each straight away: the sum then begins with it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        uses: defaultdict[Scalar, int] = defaultdict(int)
        for scalars in [*(operation.operands for operation in program.operations), *program.outputs.values()]:
            for scalar in scalars:
                uses[scalar] += 1
        self.rows: defaultdict[int, list[int]] = defaultdict(list)
        for scalar in uses:
            if isinstance(scalar, Result) and self.is_product(scalar.operation):
                self.rows[scalar.operation].append(scalar.output)
        for rows in self.rows.values():
            rows.sort()
        self.offsets: dict[tuple[int, int], Scalar] = {}
        self.sums: dict[int, tuple[int, int]] = {}  # additions of an offset -> the row
        for place, operation in enumerate(program.operations):
            if not isinstance(operation, Elementwise) or operation.name != "add" or program.shared[place]:
                continue
            for row, offset in (operation.operands, operation.operands[::-1]):
                if (
                    isinstance(row, Result)
                    and self.is_product(row.operation)
                    and uses[row] == 1
                    and not self._differs(offset)
                ):
                    self.offsets[row.operation, row.output] = offset
                    self.sums[place] = row.operation, row.output

    def is_product(self, place: int) -> bool:
        """Whether an operation is a product that each coordinate has to itself."""
        return isinstance(self.program.operations[place], Product) and not self.program.shared[place]

    def _differs(self, scalar: Scalar) -> bool:
        if isinstance(scalar, Result):
            return not self.program.shared[scalar.operation]
        return isinstance(scalar, Input) and scalar.entry != "step"

    def is_offset(self, place: int) -> bool:
        """Whether an operation is but the addition that a row begins with."""
        return place in self.sums

    def offset(self, product: int, row: int) -> Scalar:
        """What a row's sum begins with."""
        return self.offsets.get((product, row), Constant(0.0))

    def of(self, scalar: Scalar) -> tuple[int, int] | None:
        """The product and row that a scalar is."""
        if not isinstance(scalar, Result):
            return None
        if scalar.operation in self.sums:
            return self.sums[scalar.operation]
        return (scalar.operation, scalar.output) if self.is_product(scalar.operation) else None

    def needed_by(self, place: int, written: dict[tuple[int, int], str]) -> list[tuple[int, int]]:
        """The rows among the operands of an elementwise operation that have not been summed."""
        operation = self.program.operations[place]
        if isinstance(operation, Product):
            return []
        rows = [row for operand in operation.operands if (row := self.of(operand)) is not None]
        return [row for row in dict.fromkeys(rows) if row not in written]


def _where(condition: str, yes: str, no: str) -> str:
    return f"({condition} ? {yes} : {no})"


def _expression(name: str, operands: Sequence[str], prefix: str, where: Callable[..., str], one: str = "1.0") -> str:
    if name in INFIX:
        return f"{operands[0]} {INFIX[name]} {operands[1]}"
    if name in COMPARISONS:
        return f"{operands[0]} {COMPARISONS[name]} {operands[1]}"
    if name == "reciprocal":
        return f"{one} / {operands[0]}"
    if name == "where":
        return where(*operands)
    return f"{prefix}{FUNCTIONS[name]}({', '.join(operands)})"


def _literal(value: float, suffix: str) -> str:
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = f"{value!r}{suffix}"
    return f"({text})" if value < 0 else text


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 112, subsequent_indent="    ", break_long_words=False)


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)
