"""The source of a step in Triton: one kernel for a block of coordinates of any tensor."""

import textwrap
from collections.abc import Sequence

from learned_optim.kernels.sources.layers import Layer, layers
from learned_optim.kernels.sources.segments import Segment
from learned_optim.kernels.sources.triton_templates import (
    BRANCH,
    HEAD,
    LOAD_PARAMETER,
    SEGMENT_KERNEL,
    STEP_BODY,
    STEP_KERNEL,
)
from learned_optim.kernels.sources.writer import COMPARISONS, INFIX, Source, Writer, bare, block
from learned_optim.kernels.tracing.branches import Branches
from learned_optim.kernels.tracing.program import (
    PARAMETER_INPUT,
    SHARED_INPUTS,
    STEP_INPUT,
    Constant,
    Elementwise,
    Input,
    MatrixProduct,
    OperationResult,
    Program,
    Scalar,
    Weight,
    is_shared,
)

TRITON_FUNCTIONS = {
    "abs": "tl.abs",
    "cos": "tl.cos",
    "erf": "tl.erf",
    "exp": "tl.exp",
    "exp_within_range": "tl.exp",
    "expm1": "exponential_minus_1",
    "gated_tanh": "gated_tanh",
    "log": "tl.log",
    "lstm_cell": "lstm_cell",
    "maximum": "larger",
    "minimum": "smaller",
    "pow": "power",
    "remainder": "remainder",
    "rsqrt": "tl.rsqrt",
    "sigmoid": "sigmoid",
    "sign": "sign",
    "sin": "tl.sin",
    "sqrt": "tl.sqrt",
    "tanh": "hyperbolic_tangent",
}
"""Triton's own functions, and those of ``triton_parts.py``."""


def triton_source(branches: Branches, name: str = "a rule") -> Source:
    """Write the kernel of a step.

    Args:
        branches: the programs of the step.
        name: name of the rule, for the first line.
    """
    weights: list[int] = []
    chooser = _TritonWriter(branches.choice, weights)
    chooser.write()
    (number,) = branches.choice.outputs["branch"]
    bodies = [_StepWriter(program, weights).body() for program in branches.programs]
    entries = list(branches.choice.features)
    text = HEAD.format(title=f"The step of {name}")
    if len(bodies) > 1:
        text += BRANCH.format(lines=block([*chooser.shared, f"return {chooser.name(number)}"], "#"))
        bodies = [f"    if branch == {place}:\n{textwrap.indent(body, '    ')}" for place, body in enumerate(bodies)]
        bodies.insert(0, "    branch = branch_of(weights, count, lr, progress, averaging)\n")
    text += STEP_KERNEL.format(
        entries=len(entries),
        dtypes="\n".join(f"    {dtype_argument(entry)}: tl.constexpr," for entry in entries),
        pointers="\n".join(
            f"    {entry}_state = pointer_in(row, STATE + {place}, {dtype_argument(entry)}) + offsets"
            for place, entry in enumerate(entries)
        ),
        body="".join(bodies),
    )
    return Source(text, tuple(weights))


def segments_source(segments: Sequence[Segment], title: str) -> str:
    """Write one kernel for each segment of a program, ``segment0`` and so on.

    Args:
        segments: the segments of the program, in their order.
        title: the first line of the source.
    """
    kernels = [_SegmentWriter(segment).kernel(f"segment{number}") for number, segment in enumerate(segments)]
    return HEAD.format(title=title) + "\n\n".join(kernels)


def dtype_argument(entry: str) -> str:
    """The name of the kernel's argument for the dtype of an entry of the state."""
    return f"{entry.upper()}_STATE_DTYPE"


class _TritonWriter(Writer):
    """Writes in Triton. Inputs are read where they are first needed, and results written as soon as they are known."""

    def __init__(self, program: Program, weights: list[int]) -> None:
        super().__init__(program, weights)
        self.shared: list[str] = []
        self.update: list[str] = []
        self.loaded: set[Input] = set()
        self.targets: dict[Scalar, list[Input]] = {}
        """Results that are still to be stored, and the features that they are stored in."""
        self.layers: dict[int, Layer] = {}
        self.names_of_units: dict[int, str] = {}

    def write_targets(self) -> None:
        """Store the results that have not been stored yet."""
        self.write_rows([row for scalar in self.targets if (row := self.rows.of(scalar)) is not None])
        for scalar in list(self.targets):
            self.store(scalar)

    def write_note(self, line: str, shared: bool) -> None:
        (self.shared if shared else self.update).append(f"# {line}")

    def write_shared(self, place: int, operation: Elementwise) -> None:
        expression = self.expression(operation)
        if not self.put_inline(place, expression):
            self.shared.append(f"s{place} = {expression}")

    def write_shared_product(self, place: int, product: MatrixProduct) -> None:
        first = self.matrix(product, range(product.outputs), interleaved=True)
        inputs, sums = _tuple([self.name(operand) for operand in product.operands]), _tuple(["0.0"] * product.outputs)
        names = ", ".join(f"s{place}_{output}" for output in range(product.outputs))
        call = f"add_products(weights + {first}, {sums}, {inputs}, {product.outputs}, {len(product.operands)})"
        self.shared.append(f"{names}{',' * (product.outputs == 1)} = {call}")

    def write_inputs(self, place: int, product: MatrixProduct) -> None:
        names = [self.name(operand) for operand in product.operands]
        self.update.append(f"inputs{place} = {_tuple(names)}")

    def write_sums(self, place: int, product: MatrixProduct, rows: Sequence[int]) -> None:
        names = [f"r{place}_{row}" for row in rows]
        starts = [self.name(self.rows.offset(place, row)) for row in rows]
        first = self.matrix(product, rows, interleaved=True, align=2)
        call = f"weights + {first}, {{}}, inputs{place}"
        if len(rows) == 4:
            call = f"add_4_products({call.format(', '.join(starts))}, {len(product.operands)})"
        else:
            call = f"add_products({call.format(_tuple(starts))}, {len(rows)}, {len(product.operands)})"
        self.update.append(f"{', '.join(names)}{',' * (len(names) == 1)} = {call}")
        for row, name in zip(rows, names, strict=True):
            self.names_of_rows[place, row] = name

    def write_together(self, place: int) -> bool:
        layer = self.layers.get(place)
        if layer is None:
            return False
        product = self.program.operations[layer.product]
        assert isinstance(product, MatrixProduct)
        context = layer.context
        shared = [] if context is None else [self.name(operand) for operand in context.operands]
        if layer.outputs is None:
            names = [f"h{unit.hidden}" for unit in layer.units]
            starts = ["tl.full(mask.shape, 0.0, tl.float32)"] * len(names)
        else:
            rows = self.rows.used[layer.outputs]
            names = [f"r{layer.outputs}_{row}" for row in rows]
            zero = "tl.full(mask.shape, 0.0, tl.float32)"
            starts = [f"{zero} + {self.name(self.rows.offset(layer.outputs, row))}" for row in rows]
        self.weights += [0] * (len(self.weights) % 2)
        first = layer.units[0]
        self.update += [
            f"starts = {_tuple(starts)}",
            f"{', '.join(names)}{',' * (len(names) == 1)} = lstm_layer(",
            f"    weights + {len(self.weights)},",
            f"    {_tuple(shared)},",
            f"    inputs{layer.product},",
            "    starts,",
            f"    {first.target.entry}_state + {first.target.feature} * size,",
            f"    {first.kept.entry}_state + {first.kept.feature} * size,",
            "    size,",
            "    mask,",
            "    written,",
            f"    {len(shared)},",
            f"    {len(product.operands)},",
            f"    {len(layer.units)},",
            f"    {0 if layer.outputs is None else len(names)},",
            ")",
        ]
        self.write_weights_of(layer, product)
        for unit in layer.units:
            self.done |= {unit.cell, unit.hidden}
            for result in (unit.cell, unit.hidden):
                self.targets.pop(OperationResult(result))  # the layer has written it
        if layer.outputs is None:
            self.names_of_units |= {unit.hidden: name for unit, name in zip(layer.units, names, strict=True)}
        else:
            self.done.add(layer.outputs)
            self.names_of_rows |= {(layer.outputs, row): name for row, name in zip(rows, names, strict=True)}
        return True

    def write_weights_of(self, layer: Layer, product: MatrixProduct) -> None:
        """Order the weights of a layer unit by unit: biases, weights on context and inputs, weights of the outputs."""
        outputs = None if layer.outputs is None else self.program.operations[layer.outputs]
        for place, unit in enumerate(layer.units):
            self.weights += [self.place(layer.biases[row]) for row in unit.rows]
            if layer.context is not None:
                self.matrix(layer.context, unit.rows, interleaved=True)
            self.matrix(product, unit.rows, interleaved=True)
            if isinstance(outputs, MatrixProduct) and layer.outputs is not None:
                width = len(outputs.operands)
                rows = self.rows.used[layer.outputs]
                self.weights += [self.place(Weight(outputs.matrix, row * width + place)) for row in rows]
                self.weights += [0] * (len(rows) % 2)

    def write_elementwise(self, place: int, operation: Elementwise) -> None:
        expression = self.expression(operation)
        if OperationResult(place) in self.targets or not self.put_inline(place, expression):
            self.update.append(f"t{place} = {expression}")
            self.store(OperationResult(place))

    def store(self, scalar: Scalar) -> None:
        """Store a result, after reading what is still needed from the feature that it overwrites."""
        for target in self.targets.pop(scalar, ()):
            if target in self.program.read:
                self.name(target)
            value = self.name(scalar)
            if is_shared(scalar, self.program.shared):
                value = f"(tl.full(mask.shape, 0.0, tl.float32) + {value})"
            line = f"store_feature({target.entry}_state, {value}, size, written, {target.feature})"
            self.update.append(line)

    def is_single(self, scalar: OperationResult) -> bool:
        """Whether a result is one number, shared by all coordinates."""
        return self.program.shared[scalar.operation]

    def expression(self, operation: Elementwise) -> str:
        """The right side of an assignment."""
        name, operands = operation.name, [self.name(operand) for operand in operation.operands]
        if name in COMPARISONS:
            return f"{operands[0]} {COMPARISONS[name]} {operands[1]}"
        if name == "reciprocal" or name == "div":
            numerator = "1.0" if name == "reciprocal" else operands[0]
            denominator = operation.operands[-1]
            low, high = self.range(denominator)
            if (low > 1e-30 and high < 1e37) or low >= 1.0:
                inverse = f"reciprocal_of_positive({operands[-1]})"
                return inverse if name == "reciprocal" else f"{numerator} * {inverse}"
            return f"{numerator} / {operands[-1]}"
        if name in INFIX:
            return f"{operands[0]} {INFIX[name]} {operands[1]}"
        if name == "relu":
            return f"larger({operands[0]}, 0.0)"
        if name == "where":
            return f"tl.where({self.condition(operation.operands[0])}, {operands[1]}, {operands[2]})"
        return f"{TRITON_FUNCTIONS[self.name_of(operation)]}({', '.join(map(bare, operands))})"

    def name(self, scalar: Scalar) -> str:
        """The expression of a scalar; a feature of the state is loaded when it is first needed."""
        if isinstance(scalar, Constant):
            return _literal(scalar.value)
        if isinstance(scalar, Weight):
            return f"tl.load(weights + {self.weight(scalar)})"
        if isinstance(scalar, Input):
            return self.input(scalar)
        operation = self.program.operations[scalar.operation]
        if scalar.operation in self.inline:
            return self.inline[scalar.operation]
        if self.is_single(scalar):
            return f"s{scalar.operation}" + (f"_{scalar.output}" if isinstance(operation, MatrixProduct) else "")
        row = self.rows.of(scalar)
        if row is not None:
            return self.names_of_rows[row]
        name = self.names_of_units.get(scalar.operation, f"t{scalar.operation}")
        return f"tl.where({name}, 1.0, 0.0)" if scalar.operation in self.masks else name

    def input(self, scalar: Input) -> str:
        """The name of an input: gradient, parameter, a shared input, or a feature of the state."""
        if scalar.entry in ("grad", PARAMETER_INPUT, *SHARED_INPUTS):
            return "count" if scalar.entry == STEP_INPUT else scalar.entry
        return self.loaded_feature(scalar)

    def loaded_feature(self, scalar: Input) -> str:
        """The name of a feature of a tensor, which is loaded when it is first needed."""
        name = f"{scalar.entry}_{scalar.feature}"
        if scalar not in self.loaded:
            self.loaded.add(scalar)
            self.update.append(f"{name} = feature({scalar.entry}_state, size, mask, {scalar.feature})")
        return name

    def condition(self, scalar: Scalar) -> str:
        """The expression of a scalar as the condition of a choice."""
        if isinstance(scalar, OperationResult) and scalar.operation in self.masks:
            return f"{'s' if self.is_single(scalar) else 't'}{scalar.operation}"
        return f"{self.name(scalar)} != 0.0"


class _StepWriter(_TritonWriter):
    """Writes the part of the kernel that steps an optimizer's tensors in place by one program."""

    def __init__(self, program: Program, weights: list[int]) -> None:
        super().__init__(program, weights)
        for target, scalar in program.written.items():
            if target.entry != "update":
                self.targets.setdefault(scalar, []).append(target)
        self.layers = {unit.cell: layer for layer in layers(program, self.rows) for unit in layer.units}

    def body(self) -> str:
        """The lines after those that find the tensor."""
        self.write()
        self.write_results()
        self.write_targets()
        change = self.name(self.program.outputs["update"][0])
        return STEP_BODY.format(
            parameter=LOAD_PARAMETER if self.program.reads_parameter else "",
            shared=block(self.shared, "#"),
            update=block(self.update, "#"),
            change=change,
        )


class _SegmentWriter(_TritonWriter):
    """Writes the kernel of a segment. Weights are read where they lie, as many kernels read the same."""

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment.program, [])
        self.segment = segment
        for store in segment.stores:
            self.targets.setdefault(store.value, []).append(Input(store.tensor, store.feature))

    def kernel(self, name: str) -> str:
        """The whole function."""
        self.write()
        self.write_targets()
        arguments, pointers = [], []
        for tensor in arguments_of(self.segment):
            features = self.segment.program.features.get(tensor, 1)
            arguments.append(f"    {tensor}_state,")
            pointers.append(f"    {tensor}_state += particle * {features} * size + offsets")
        return SEGMENT_KERNEL.format(
            kernel=name,
            arguments="\n".join(arguments),
            pointers="\n".join(pointers),
            update=block([*self.shared, *self.update], "#"),
        )

    def input(self, scalar: Input) -> str:
        """The name of a feature of a tensor; the gradient is a tensor of one feature."""
        return self.loaded_feature(scalar)

    def weight(self, weight: Weight) -> int:
        """The place of a weight among all results of the prologue, flattened."""
        return self.place(weight)

    def write_sums(self, place: int, product: MatrixProduct, rows: Sequence[int]) -> None:
        names = [f"r{place}_{row}" for row in rows]
        starts = [self.name(self.rows.offset(place, row)) for row in rows]
        width = len(product.operands)
        apart = (1, product.outputs) if product.transposed else (width, 1)
        first = self.place(Weight(product.matrix, 0))
        for name, start, row in zip(names, starts, rows, strict=True):
            where = f"weights + {first + row * apart[0]}"
            self.update.append(f"{name} = add_apart({where}, {start}, inputs{place}, {apart[1]}, {width})")
            self.names_of_rows[place, row] = name


def arguments_of(segment: Segment) -> list[str]:
    """The tensors that a segment's kernel takes, in the order of its arguments."""
    read = [
        scalar.entry
        for scalars in [
            *(operation.operands for operation in segment.program.operations),
            [store.value for store in segment.stores],
        ]
        for scalar in scalars
        if isinstance(scalar, Input)
    ]
    return list(dict.fromkeys([*read, *(store.tensor for store in segment.stores)]))


def _literal(value: float) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    return f"({value!r})" if value < 0 else repr(value)


def _tuple(names: Sequence[str]) -> str:
    return f"({', '.join(names)}{',' * (len(names) == 1)})"
