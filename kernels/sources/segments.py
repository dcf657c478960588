"""The division of a program at its large products, which torch computes faster than a kernel would."""

from collections import defaultdict
from dataclasses import dataclass, replace

from learned_optim.kernels.tracing.program import Input, MatrixProduct, Operation, OperationResult, Program, Scalar

LARGEST_PRODUCT_INSIDE = 256
"""Multiply-adds of a product that stays inside a kernel."""
LONGEST_SEGMENT = 192
"""Operations of a kernel: registers hold no more, and compilers take long over it."""


@dataclass(frozen=True)
class Store:
    """One feature of a tensor that a segment writes."""

    tensor: str
    feature: int
    value: Scalar


@dataclass(frozen=True)
class Segment:
    """The operations of one kernel, and the large products that follow it.

    Args:
        program: the operations. They read the inputs of the whole program, results of earlier segments, and rows of
            products.
        stores: the features that the kernel writes.
        products: ``rows{number} = matrix @ inputs{number}``, in the order of their numbers.
    """

    program: Program
    stores: tuple[Store, ...]
    products: tuple[tuple[int, MatrixProduct], ...]


def segments(program: Program) -> tuple[list[Segment], dict[str, int]]:
    """Cut a program without shared operations into segments.

    Returns:
        The segments in their order, and the features of each tensor that they write or that products make.
    """
    return _Cut(program).segments()


class _Cut:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.large = {
            place: number
            for number, place in enumerate(
                place
                for place, operation in enumerate(program.operations)
                if isinstance(operation, MatrixProduct) and operation.multiply_adds > LARGEST_PRODUCT_INSIDE
            )
        }
        self.levels: list[int] = []
        for operation in program.operations:
            self.levels.append(max(map(self.level, operation.operands), default=0))
        self.divide_what_is_long()
        self.features: dict[str, int] = {}

    def level(self, scalar: Scalar) -> int:
        """The first segment in which a scalar is known."""
        if not isinstance(scalar, OperationResult):
            return 0
        return self.levels[scalar.operation] + (scalar.operation in self.large)

    def divide_what_is_long(self) -> None:
        """Cut levels of many operations, which are in an order in which they can be computed."""
        numbers: defaultdict[int, int] = defaultdict(int)
        parts = []
        for level in self.levels:
            parts.append((level, numbers[level] // LONGEST_SEGMENT))
            numbers[level] += 1
        renumbered = {part: number for number, part in enumerate(sorted(set(parts)))}
        self.levels = [renumbered[part] for part in parts]

    def segments(self) -> tuple[list[Segment], dict[str, int]]:
        """The segments in their order, and the features of each tensor between them."""
        stores: defaultdict[int, list[Store]] = defaultdict(list)
        for name, scalars in self.program.outputs.items():
            self.features[name] = len(scalars)
            for feature, scalar in enumerate(scalars):
                stores[self.level(scalar)].append(Store(name, feature, scalar))
        products: defaultdict[int, list[tuple[int, MatrixProduct]]] = defaultdict(list)
        for place, number in self.large.items():
            operation = self.program.operations[place]
            assert isinstance(operation, MatrixProduct)
            products[self.levels[place]].append((number, operation))
            self.features |= {f"inputs{number}": len(operation.operands), f"rows{number}": operation.outputs}
            for feature, scalar in enumerate(operation.operands):
                stores[self.level(scalar)].append(Store(f"inputs{number}", feature, scalar))
        last = max([0, *stores, *(level + 1 for level in products)])
        kept = self.crossing(stores)
        for level in range(last + 1):
            crossing = [scalar for scalar in kept if self.level(scalar) == level]
            stores[level] += [Store(f"kept{level}", place, scalar) for place, scalar in enumerate(crossing)]
            if crossing:
                self.features[f"kept{level}"] = len(crossing)
        made = [
            Segment(*self.part(level, kept, tuple(stores[level])), tuple(products[level])) for level in range(last + 1)
        ]
        return made, self.features

    def crossing(self, stores: dict[int, list[Store]]) -> list[Scalar]:
        """Results of elementwise operations and small products that later segments read."""
        readers = [
            (self.levels[place], operation.operands)
            for place, operation in enumerate(self.program.operations)
            if place not in self.large
        ]
        readers += [(level, (store.value,)) for level, found in stores.items() for store in found]
        return list(
            dict.fromkeys(
                scalar
                for level, scalars in readers
                for scalar in scalars
                if isinstance(scalar, OperationResult)
                and scalar.operation not in self.large
                and self.level(scalar) < level
            )
        )

    def part(self, level: int, kept: list[Scalar], stores: tuple[Store, ...]) -> tuple[Program, tuple[Store, ...]]:
        """The program of a segment, in which results of other segments are inputs."""
        own = [p for p, found in enumerate(self.levels) if found == level and p not in self.large]
        places = {old: new for new, old in enumerate(own)}

        def renamed(scalar: Scalar) -> Scalar:
            if not isinstance(scalar, OperationResult):
                return scalar
            if scalar.operation in self.large:
                return Input(f"rows{self.large[scalar.operation]}", scalar.output)
            if scalar.operation in places:
                return replace(scalar, operation=places[scalar.operation])
            other = self.level(scalar)
            return Input(f"kept{other}", [s for s in kept if self.level(s) == other].index(scalar))

        def moved(operation: Operation) -> Operation:
            return replace(operation, operands=tuple(map(renamed, operation.operands)))

        program = replace(
            self.program,
            features={**self.program.features, **self.features},
            operations=tuple(moved(self.program.operations[old]) for old in own),
            outputs={},
            notes=tuple(self.program.notes[old] for old in own),
        )
        return program, tuple(replace(store, value=renamed(store.value)) for store in stores)
