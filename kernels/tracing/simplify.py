"""Simplification of programs: fewer and cheaper operations, by reciprocals, constants, and short cuts for an LSTM.

It applies to any program. Results differ from the rule's own formulas by roundings alone.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from learned_optim.kernels.tracing.program import (
    Constant,
    Elementwise,
    MatrixProduct,
    Operation,
    OperationResult,
    Program,
    Scalar,
    is_shared,
)

SHORT_CUTS = {
    "lstm_cell": "sigmoid(f) * c + sigmoid(i) * tanh(g)",
    "gated_tanh": "sigmoid(o) * tanh(c)",
}
"""Operations that emitters know besides torch's: one division each for all their sigmoids and tanhs. Operands in the
order of the formula: ``f, c, i, g`` and ``o, c``."""


def simplified(program: Program, *, short_cuts: bool = True) -> Program:
    """The program for an emitter; ``short_cuts=False`` leaves out :data:`SHORT_CUTS`."""
    program = rewritten(program, _Reciprocals(program))
    program = rewritten(program, _Constants())
    return rewritten(program, _Gates(program)) if short_cuts else program


class Rewriter:
    """Rewrites a program, operation by operation."""

    def __init__(self) -> None:
        self.made: list[Operation] = []
        self.places: dict[Operation, int] = {}
        self.shared: list[bool] = []
        self.notes: list[str] = []
        self.note = ""

    def emit(self, operation: Operation) -> OperationResult:
        """The result of an operation; the same one for the same operands."""
        if operation not in self.places:
            self.places[operation] = len(self.made)
            self.made.append(operation)
            self.notes.append(self.note)
            self.shared.append(all(is_shared(operand, self.shared) for operand in operation.operands))
        return OperationResult(self.places[operation])

    def apply(self, name: str, *operands: Scalar) -> Scalar:
        """The result of an elementwise operation."""
        return self.emit(Elementwise(name, operands))

    def rewrite(self, operation: Elementwise, place: int) -> Scalar:
        """The replacement of an operation, whose operands have been replaced already."""
        raise NotImplementedError


def rewritten(program: Program, rewriter: Rewriter) -> Program:
    """The program as a rewriter writes it, without operations that nothing needs."""
    new: list[Scalar] = []

    def renamed(scalar: Scalar) -> Scalar:
        if not isinstance(scalar, OperationResult):
            return scalar
        found = new[scalar.operation]
        return replace(found, output=scalar.output) if scalar.output and isinstance(found, OperationResult) else found

    for place, operation in enumerate(program.operations):
        rewriter.note = program.notes[place]
        changed = replace(operation, operands=tuple(map(renamed, operation.operands)))
        new.append(rewriter.emit(changed) if isinstance(changed, MatrixProduct) else rewriter.rewrite(changed, place))
    outputs = {name: tuple(map(renamed, scalars)) for name, scalars in program.outputs.items()}
    return _without_dead(
        replace(program, operations=tuple(rewriter.made), outputs=outputs, notes=tuple(rewriter.notes))
    )


def _without_dead(program: Program) -> Program:
    """The program without operations that nothing needs."""
    needed = {scalar.operation for scalars in program.outputs.values() for scalar in _results(scalars)}
    for place in reversed(range(len(program.operations))):
        if place in needed:
            needed |= {operand.operation for operand in _results(program.operations[place].operands)}
    places = {old: new for new, old in enumerate(sorted(needed))}

    def renamed(scalars: Sequence[Scalar]) -> tuple[Scalar, ...]:
        return tuple(
            replace(s, operation=places[s.operation]) if isinstance(s, OperationResult) else s for s in scalars
        )

    kept = [replace(program.operations[old], operands=renamed(program.operations[old].operands)) for old in places]
    return replace(
        program,
        operations=tuple(kept),
        outputs={name: renamed(scalars) for name, scalars in program.outputs.items()},
        notes=tuple(program.notes[old] for old in places),
    )


def _results(scalars: Sequence[Scalar]) -> Iterator[OperationResult]:
    return (scalar for scalar in scalars if isinstance(scalar, OperationResult))


class _Reciprocals(Rewriter):
    """Turns divisions by constants, by shared scalars and by what divides twice into products."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.operations = program.operations
        self.divides = Counter(
            operation.operands[1]
            for operation in program.operations
            if isinstance(operation, Elementwise) and operation.name == "div"
        )

    def rewrite(self, operation: Elementwise, place: int) -> Scalar:
        if operation.name != "div":
            return self.emit(operation)
        numerator, denominator = operation.operands
        often = self.divides[self.operations[place].operands[1]] > 1
        if isinstance(denominator, Constant) and denominator.value != 0:
            return self.apply("mul", numerator, Constant(1 / denominator.value))
        if is_shared(denominator, self.shared) and not is_shared(numerator, self.shared):
            return self.apply("mul", numerator, self.apply("reciprocal", denominator))
        if often and not is_shared(denominator, self.shared):
            return self.apply("mul", numerator, self.apply("reciprocal", denominator))
        return self.emit(operation)


class _Constants(Rewriter):
    """Folds constants, drops factors of one, and multiplies shared factors first."""

    def rewrite(self, operation: Elementwise, place: int) -> Scalar:
        if operation.name == "mul":
            return self.product(*operation.operands)
        if operation.name == "neg":
            return self.product(operation.operands[0], Constant(-1.0))
        return self.emit(operation)

    def product(self, one: Scalar, other: Scalar) -> Scalar:
        """``one * other``, with the shared factor last."""
        if is_shared(one, self.shared) and not is_shared(other, self.shared):
            one, other = other, one
        if isinstance(one, Constant):
            one, other = other, one
        if isinstance(one, Constant) and isinstance(other, Constant):
            return Constant(one.value * other.value)
        if other == Constant(1.0):
            return one
        before = self.made[one.operation] if isinstance(one, OperationResult) else None
        if isinstance(before, Elementwise) and before.name == "mul" and is_shared(other, self.shared):
            inner, factor = before.operands
            if isinstance(factor, Constant) and isinstance(other, Constant):
                return self.product(inner, Constant(factor.value * other.value))
            if is_shared(factor, self.shared) and not is_shared(inner, self.shared):
                return self.product(inner, self.product(factor, other))
        return self.apply("mul", one, other)


class _Gates(Rewriter):
    """Finds :data:`SHORT_CUTS`: sums and products of sigmoids and tanhs that nothing else uses."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        used = [operand for operation in program.operations for operand in operation.operands]
        self.uses = Counter([*used, *(scalar for scalars in program.outputs.values() for scalar in scalars)])
        self.used_once: set[Scalar] = set()

    def rewrite(self, operation: Elementwise, place: int) -> Scalar:
        result = self.short_cut(operation) or self.emit(operation)
        if self.uses[OperationResult(place)] == 1:
            self.used_once.add(result)
        return result

    def short_cut(self, operation: Elementwise) -> Scalar | None:
        """The replacement of a sum or product of gates by a short cut, None if there is none."""
        if operation.name == "mul":
            for gate, value in (operation.operands, operation.operands[::-1]):
                gated, squashed = self.argument(gate, "sigmoid"), self.argument(value, "tanh")
                if gated is not None and squashed is not None:
                    return self.apply("gated_tanh", gated, squashed)
        if operation.name == "add":
            for kept, new in (operation.operands, operation.operands[::-1]):
                candidate, old = self.once(new, "gated_tanh"), self.once(kept, "mul")
                if candidate is None or old is None:
                    continue
                for gate, value in (old.operands, old.operands[::-1]):
                    forget = self.argument(gate, "sigmoid")
                    if forget is not None:
                        return self.apply("lstm_cell", forget, value, *candidate.operands)
        return None

    def once(self, scalar: Scalar, name: str) -> Elementwise | None:
        """The operation of this name whose result a scalar is, if nothing else uses it."""
        operation = (
            self.made[scalar.operation] if isinstance(scalar, OperationResult) and scalar in self.used_once else None
        )
        return operation if isinstance(operation, Elementwise) and operation.name == name else None

    def argument(self, scalar: Scalar, name: str) -> Scalar | None:
        """The argument of the function of this name whose result a scalar is, if nothing else uses it."""
        operation = self.once(scalar, name)
        return None if operation is None else operation.operands[0]
