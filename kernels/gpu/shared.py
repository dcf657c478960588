"""The shared part of a program, computed by torch: in meta-training gradients flow through it to the weights."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from learned_optim.kernels.tracing.program import (
    SHARED_INPUTS,
    Constant,
    Elementwise,
    Input,
    MatrixProduct,
    Operation,
    OperationResult,
    Program,
    Scalar,
    Weight,
)


class Shared:
    """The shared operations of a program, level by level: those of one kind on a level are one operation of torch.

    Args:
        program: a program without short cuts.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sizes = [torch.Size(shape).numel() for shape in program.shapes]
        self.kept: list[Scalar] = []
        """Shared scalars that operations of coordinates read."""
        readers = [op.operands for op, shared in zip(program.operations, program.shared, strict=True) if not shared]
        for scalar in [scalar for scalars in [*readers, *program.outputs.values()] for scalar in scalars]:
            if _is_shared(program, scalar) and scalar not in self.kept:
                self.kept.append(scalar)
        self.constants: list[float] = []
        self.columns: dict[Scalar, int] = {}
        self.first_constant = sum(self.sizes) + len(SHARED_INPUTS)
        self.width = self.first_constant
        levels: dict[int, int] = {}
        stages: dict[tuple[int, str], list[int]] = {}
        for place, (operation, shared) in enumerate(zip(program.operations, program.shared, strict=True)):
            if shared:
                before = [
                    levels[operand.operation] for operand in operation.operands if isinstance(operand, OperationResult)
                ]
                levels[place] = max(before, default=-1) + 1
                kind = operation.name if isinstance(operation, Elementwise) else f"product {place}"
                stages.setdefault((levels[place], kind), []).append(place)
                for operand in operation.operands:
                    self._note_constant(operand)
        self.width += len(self.constants)
        self.stages: list[tuple[list[Operation], list[list[int]]]] = []
        for (_, _kind), places in sorted(stages.items()):
            operations = [program.operations[place] for place in places]
            self.stages.append((operations, [[self._column(o) for o in op.operands] for op in operations]))
            for place in places:
                operation = program.operations[place]
                for output in range(operation.outputs if isinstance(operation, MatrixProduct) else 1):
                    self.columns[OperationResult(place, output)] = self.width
                    self.width += 1

    def for_coordinates(self) -> Program:
        """The rest of the program, in which the shared scalars are one more tensor of weights."""
        program, tensor = self.program, len(self.program.shapes)
        kept = [place for place, shared in enumerate(program.shared) if not shared]
        places = {old: new for new, old in enumerate(kept)}

        def renamed(scalar: Scalar) -> Scalar:
            if _is_shared(program, scalar):
                return Weight(tensor, self.kept.index(scalar))
            return (
                replace(scalar, operation=places[scalar.operation]) if isinstance(scalar, OperationResult) else scalar
            )

        return replace(
            program,
            shapes=(*program.shapes, (len(self.kept),)),
            operations=tuple(
                replace(program.operations[old], operands=tuple(map(renamed, program.operations[old].operands)))
                for old in kept
            ),
            outputs={name: tuple(map(renamed, scalars)) for name, scalars in program.outputs.items()},
            notes=tuple(program.notes[old] for old in kept),
        )

    def __call__(self, weights: Tensor, given: Sequence[Tensor | float]) -> Tensor:
        """The weights, followed by the shared scalars that coordinates read, ``(P, W + S)``; differentiable.

        Args:
            weights: the results of the prologue for P particles, flattened, ``(P, W)``.
            given: a number for each of :data:`SHARED_INPUTS`, or 0-d tensors.
        """
        if not self.kept:
            return weights
        particles = len(weights)
        numbers = [*given, *self.constants]
        constants = torch.tensor(
            [0.0 if isinstance(number, Tensor) else number for number in numbers], dtype=weights.dtype
        ).to(weights.device)
        for place, number in enumerate(given):
            if isinstance(number, Tensor):  # on the device, which nobody waits for
                constants[place] = number.to(weights)
        values = torch.cat([weights, constants.expand(particles, -1)], 1)
        for operations, columns in self.stages:
            first = operations[0]
            if isinstance(first, MatrixProduct):
                start = sum(self.sizes[: first.matrix])
                matrix = weights[:, start : start + self.sizes[first.matrix]].view(particles, first.outputs, -1)
                made = (matrix @ values[:, columns[0], None])[..., 0]
            else:
                operands = [values[:, list(column)] for column in zip(*columns, strict=True)]
                if first.name == "where":
                    operands[0] = operands[0] != 0
                made = getattr(torch, first.name)(*operands).to(weights.dtype)
            values = torch.cat([values, made], 1)
        return torch.cat([weights, values[:, [self._column(scalar) for scalar in self.kept]]], 1)

    def _note_constant(self, scalar: Scalar) -> None:
        if isinstance(scalar, Constant) and scalar not in self.columns:
            self.columns[scalar] = self.first_constant + len(self.constants)
            self.constants.append(scalar.value)

    def _column(self, scalar: Scalar) -> int:
        if isinstance(scalar, Weight):
            return sum(self.sizes[: scalar.tensor]) + scalar.place
        if isinstance(scalar, Input):
            return sum(self.sizes) + SHARED_INPUTS.index(scalar.entry)
        return self.columns[scalar]


def _is_shared(program: Program, scalar: Scalar) -> bool:
    """Whether a scalar is one of the shared inputs or follows from them."""
    if isinstance(scalar, OperationResult):
        return program.shared[scalar.operation]
    return isinstance(scalar, Input) and scalar.entry in SHARED_INPUTS
