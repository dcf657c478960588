"""The source of a step in C: a function of a vector of coordinates for each branch, and one of what they share.

The rest of the source, ``cpu.c``, runs it over tensors. The shared part is computed first, in float64.
"""

import textwrap
from collections.abc import Callable, Sequence

import torch

from learned_optim.kernels.sources.writer import COMPARISONS, INFIX, Source, Writer, bare, block
from learned_optim.kernels.tracing.branches import Branches
from learned_optim.kernels.tracing.program import (
    PARAMETER_INPUT,
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

DTYPE_MACROS = {
    torch.float32: "FLOAT32",
    torch.bfloat16: "BFLOAT16",
    torch.float16: "FLOAT16",
    torch.float64: "FLOAT64",
}
C_FUNCTIONS = {
    "abs": "magnitude",
    "cos": "cosine",
    "erf": "error_function",
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
    "remainder": "modulo",
    "rsqrt": "reciprocal_root",
    "sigmoid": "sigmoid",
    "sign": "sign",
    "sin": "sine",
    "sqrt": "root",
    "tanh": "hyperbolic_tangent",
}
"""Names of functions in ``vector.h``; with ``shared_`` before them, functions of single numbers."""
INLINED = 80
"""Lines of an update that is put into the loop over vectors: a tenth faster. Longer ones take seconds to compile so."""


def c_source(branches: Branches, dtype: torch.dtype, name: str = "a rule") -> Source:
    """Write the C of a step, without what depends on the dtypes of tensors.

    Args:
        branches: the programs of the step.
        dtype: dtype of the arithmetic, float32 or float64.
        name: name of the rule, for the first comment.
    """
    weights: list[int] = []
    suffix = "f" if dtype == torch.float32 else ""
    chooser, *writers = (_CWriter(program, suffix, weights) for program in (branches.choice, *branches.programs))
    chooser.kept.clear()  # its result is read in place
    chooser.write()
    updates = "\n".join(writer.function(f"update_{place}") for place, writer in enumerate(writers))
    share, branch = writers[0].share, "0"
    if len(writers) > 1:
        share, branch = chooser.share, "branch"
        share.append(f"const int branch = {bare(chooser.number(branches.choice.outputs['branch'][0]))};")
        for place, writer in enumerate(writers):
            share += [f"if (branch == {place}) {{", *(f"    {line}" for line in writer.share), "}"]
    features = branches.choice.features
    counts = {
        "FEATURES": max(sum(features.values()), 1),
        "ENTRIES": max(len(features), 1),
        "SHARED": max(len(writer.places_of_shared) for writer in writers),
        "READS_PARAMETER": int(any(program.reads_parameter for program in branches.programs)),
    }
    text = f"""/* The step of {name}, made from its forward. */

enum {{ {", ".join(f"{key} = {value}" for key, value in counts.items())} }};

typedef struct {{
    real values[SHARED + 1];
}} Shared;

/* What all coordinates share; returns the number of the update that this step takes. */
static int share(Shared *shared, const real *weights, const SharedInputs *inputs) {{
{block(share, "/*")}
    return {branch};
}}

{updates}"""
    return Source(text, tuple(weights))


def macros(branches: Branches, dtypes: Sequence[torch.dtype]) -> str:
    """The macros of C that say how entries of the state are stored, and which of them each update reads and writes.

    Args:
        branches: the programs that the state belongs to.
        dtypes: the dtypes of parameters, gradients and each entry of the state.
    """
    parameter, grad, *entries = (DTYPE_MACROS[dtype] for dtype in dtypes)
    lines = [f"#define PARAMETER_DTYPE {parameter}", f"#define GRAD_DTYPE {grad}", "#define EACH_ENTRY(of)"]
    first = 0
    for place, (dtype, features) in enumerate(zip(entries, branches.choice.features.values(), strict=True)):
        lines[-1] += f" of({place}, {first}, {dtype}, {features})"
        first += features
    lines.append("#define EACH_UPDATE(of)")
    for place, program in enumerate(branches.programs):
        written = {target.entry for target in program.written}
        used = written | {scalar.entry for scalar in program.read if isinstance(scalar, Input)}
        digits = ("".join("01"[entry in which] for entry in program.features) for which in (used, written))
        lines[-1] += ' of({}, update_{}, "{}", "{}")'.format(place, place, *digits)
    return "\n".join(lines) + "\n"


class _CWriter(Writer):
    """Writes a program: the lines of ``share`` for a step, and the function ``update`` of a vector of coordinates."""

    def __init__(self, program: Program, suffix: str, weights: list[int]) -> None:
        super().__init__(program, weights)
        self.suffix = suffix
        self.share: list[str] = []
        self.update: list[str] = []
        self.places_of_shared: dict[Scalar, int] = {}  # what coordinates read of what they share -> its place in Shared
        self.firsts: dict[str, int] = {}
        for entry in program.features:
            self.firsts[entry] = sum(program.features[before] for before in self.firsts)

    def function(self, name: str) -> str:
        """The source of the function of this name."""
        self.write()
        self.write_results()
        results = self.results()
        kind = "INLINE" if len(self.update) <= INLINED else "static __attribute__((noinline))"
        return f"""/* The update of a vector of coordinates, and their new state in the place of the old one. */
{kind} vec {name}(
    vec *state, vec grad, vec parameter, const Shared *shared, const real *weights
) {{
{block([*self.update, *results], "/*")}
}}
"""

    def results(self) -> list[str]:
        """The lines that write the state, and return the update."""
        change = self.vector(self.program.outputs["update"][0])
        copies, stores = ([f"const vec change = {change};"], []) if change.startswith("state") else ([], [])
        change = "change" if copies else change
        for target, scalar in self.program.written.items():
            if target.entry == "update":
                continue
            place, value = self.firsts[target.entry] + target.feature, self.vector(scalar)
            if value.startswith("state"):  # moves to another place
                copies.append(f"const vec moved{place} = {value};")
                value = f"moved{place}"
            stores.append(f"state[{place}] = {value};")
        return ["/* The new state */", *copies, *stores, f"return {change};"]

    def write_note(self, line: str, shared: bool) -> None:
        (self.share if shared else self.update).append(f"/* {line.replace('*/', '* /')} */")

    # What all coordinates share

    def write_shared(self, place: int, operation: Elementwise) -> None:
        operands = list(map(self.number, operation.operands))
        expression = _expression(operation.name, operands, "shared_", _where)
        if not self.put_inline(place, expression):
            self.share.append(f"const double s{place} = {expression};")
            self.keep(place, 1)

    def write_shared_product(self, place: int, product: MatrixProduct) -> None:
        operands = ", ".join(map(self.number, product.operands))
        first = self.matrix(product, range(product.outputs), interleaved=False)
        self.share += _wrapped(f"const double x{place}[] = {{{operands}}};")
        self.share.append(f"double s{place}[{product.outputs}];")
        self.share.append(
            f"shared_product(s{place}, {product.outputs}, weights + {first}, x{place}, {len(product.operands)});"
        )
        self.keep(place, product.outputs)

    def keep(self, place: int, outputs: int) -> None:
        """Write the results that coordinates read into ``Shared``."""
        for output in range(outputs):
            result = OperationResult(place, output)
            readers = [user for user in self.users[place] if result in self.program.operations[user].operands]
            if result in self.kept or not all(self.program.shared[reader] for reader in readers):
                self.value_in_shared(result)

    def value_in_shared(self, scalar: Scalar) -> str:
        """The expression, in ``update``, of a number that all coordinates share; it is put into ``Shared`` once."""
        if scalar not in self.places_of_shared:
            self.places_of_shared[scalar] = len(self.places_of_shared)
            self.share.append(f"shared->values[{self.places_of_shared[scalar]}] = (real){self.number(scalar)};")
        return f"shared->values[{self.places_of_shared[scalar]}]"

    def number(self, scalar: Scalar) -> str:
        """The expression of a scalar in ``share``."""
        if isinstance(scalar, Constant):
            return _literal(scalar.value, "")
        if isinstance(scalar, Weight):
            return f"weights[{self.weight(scalar)}]"
        if isinstance(scalar, Input):
            return f"inputs->{scalar.entry}"
        if scalar.operation in self.inline:
            return self.inline[scalar.operation]
        whole = isinstance(self.program.operations[scalar.operation], Elementwise)
        return f"s{scalar.operation}" if whole else f"s{scalar.operation}[{scalar.output}]"

    # What is different for each coordinate

    def write_inputs(self, place: int, product: MatrixProduct) -> None:
        inputs = ", ".join(self.vector(operand) for operand in product.operands)
        self.update += _wrapped(f"const vec inputs{place}[] = {{{inputs}}};")

    def write_sums(self, place: int, product: MatrixProduct, rows: Sequence[int]) -> None:
        name = f"rows{place}_{rows[0]}"
        starts = ", ".join(self.vector(self.rows.offset(place, row)) for row in rows)
        first = self.matrix(product, rows, interleaved=True)
        self.update += _wrapped(f"vec {name}[] = {{{starts}}};")
        inputs = f"inputs{place}, {len(product.operands)}"
        self.update.append(f"add_products({name}, {len(rows)}, weights + {first}, {inputs});")
        for place_of_row, row in enumerate(rows):
            self.names_of_rows[place, row] = f"{name}[{place_of_row}]"

    def write_elementwise(self, place: int, operation: Elementwise) -> None:
        kind = "const ivec" if place in self.masks else "const vec"
        if operation.name in INFIX or operation.name in COMPARISONS or operation.name == "reciprocal":
            operands = [self.operand(operand) for operand in operation.operands]
        elif operation.name == "where":
            operands = [self.mask(operation.operands[0]), *map(self.vector, operation.operands[1:])]
        else:
            operands = [self.vector(operand) for operand in operation.operands]
        one = _literal(1.0, self.suffix)
        expression = _expression(self.name_of(operation), operands, "", lambda *of: f"where({', '.join(of)})", one)
        if place in self.masks or not self.put_inline(place, expression):
            self.update += _wrapped(f"{kind} t{place} = {expression};")

    def operand(self, scalar: Scalar) -> str:
        """The expression of a scalar in ``update``: a vector, or one number for all."""
        if isinstance(scalar, Constant):
            return _literal(scalar.value, self.suffix)
        if isinstance(scalar, Weight):
            return f"weights[{self.weight(scalar)}]"
        if isinstance(scalar, Input):
            if scalar.entry in ("grad", PARAMETER_INPUT):
                return scalar.entry
            if scalar.entry in SHARED_INPUTS:
                return self.value_in_shared(scalar)
            return f"state[{self.firsts[scalar.entry] + scalar.feature}]"
        if self.program.shared[scalar.operation]:
            return self.value_in_shared(scalar)
        row = self.rows.of(scalar)
        if row is not None:
            return self.names_of_rows[row]
        name = self.inline.get(scalar.operation, f"t{scalar.operation}")
        return f"where({name}, all(1), all(0))" if scalar.operation in self.masks else name

    def vector(self, scalar: Scalar) -> str:
        """The expression of a scalar in ``update``, as a vector."""
        name = self.operand(scalar)
        single = isinstance(scalar, Constant | Weight) or name.startswith("shared->")
        return f"all({bare(name)})" if single else name

    def mask(self, scalar: Scalar) -> str:
        """The expression of a scalar in ``update``, as the mask of a choice."""
        if (
            isinstance(scalar, OperationResult)
            and scalar.operation in self.masks
            and not self.program.shared[scalar.operation]
        ):
            return f"t{scalar.operation}"
        return f"({self.vector(scalar)} != 0)"


def _where(condition: str, yes: str, no: str) -> str:
    return f"({condition} ? {yes} : {no})"


def _expression(name: str, operands: Sequence[str], prefix: str, where: Callable[..., str], one: str = "1.0") -> str:
    if name in INFIX or name in COMPARISONS:
        return f"{operands[0]} {INFIX.get(name) or COMPARISONS[name]} {operands[1]}"
    if name == "reciprocal":
        return f"{one} / {operands[0]}"
    if name == "where":
        return where(*operands)
    return f"{prefix}{C_FUNCTIONS[name]}({', '.join(map(bare, operands))})"


def _literal(value: float, suffix: str) -> str:
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = f"{value!r}{suffix}"
    return f"({text})" if value < 0 else text


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 112, subsequent_indent="    ", break_long_words=False)
