"""Branches: what is chosen by a condition that all coordinates share is chosen once a step, and computed alone.

A ``where`` with such a condition needs one of its sides. For each outcome of the conditions there is a program with the
side that is taken in the place of the choice. What only the other side needs is gone from it, and an entry of the state
that keeps its value is not written and, if nothing else reads it, not read.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from learned_optim.kernels.tracing.program import Constant, Elementwise, Operation, Program, Scalar, is_shared
from learned_optim.kernels.tracing.simplify import Rewriter, rewritten, simplified

MOST_CONDITIONS = 2
"""Conditions that programs are made for. Each doubles their number, and so the code; by others both sides are computed,
and one is selected."""


class Branches(NamedTuple):
    """The programs of a step, one for each outcome of its conditions."""

    choice: Program
    """Computes the place of the program that a step takes, its output ``"branch"``, from what all coordinates share."""
    programs: tuple[Program, ...]
    """One alone if there is no condition."""


def branches(program: Program) -> Branches:
    """Divide a program, as it was traced, by the conditions of its choices; the results are simplified."""
    conditions = list(
        dict.fromkeys(
            operation.operands[0]
            for operation, shared in zip(program.operations, program.shared, strict=True)
            if _is_choice(operation) and not shared and is_shared(operation.operands[0], program.shared)
        )
    )[:MOST_CONDITIONS]
    outcomes = itertools.product((1, 2), repeat=len(conditions))
    programs = [
        simplified(rewritten(program, _Taken(program, dict(zip(conditions, sides, strict=True))))) for sides in outcomes
    ]
    chooser = Rewriter()
    for operation, note in zip(program.operations, program.notes, strict=True):
        chooser.note = note
        chooser.emit(operation)
    numbers: list[Scalar] = [Constant(float(place)) for place in range(len(programs))]
    for condition in reversed(conditions):
        numbers = [chooser.apply("where", condition, *pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    choice = replace(
        program, operations=tuple(chooser.made), outputs={"branch": tuple(numbers)}, notes=tuple(chooser.notes)
    )
    return Branches(simplified(choice, short_cuts=False), tuple(programs))


def _is_choice(operation: Operation) -> bool:
    return isinstance(operation, Elementwise) and operation.name == "where"


class _Taken(Rewriter):
    """Puts a side of each choice in its place: of a condition the operand that is noted for it."""

    def __init__(self, program: Program, sides: Mapping[Scalar, int]) -> None:
        super().__init__()
        self.operations, self.sides = program.operations, sides

    def rewrite(self, operation: Elementwise, place: int) -> Scalar:
        side = self.sides.get(self.operations[place].operands[0]) if _is_choice(operation) else None
        return self.emit(operation) if side is None else operation.operands[side]
