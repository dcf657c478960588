"""Programs that were made known, and their sources in C and Triton, each made when it is first wanted."""

import functools
import hashlib
from dataclasses import dataclass

import torch

from learned_optim.kernels.sources.c import c_source
from learned_optim.kernels.sources.triton import triton_source
from learned_optim.kernels.sources.writer import Source
from learned_optim.kernels.tracing.program import Product, Program
from learned_optim.kernels.tracing.simplify import simplified

WIDE_PRODUCT = 16
"""Inputs of a product from which on a thread of a GPU takes two coordinates, not four: its registers hold no more."""


@dataclass(frozen=True)
class Sources:
    """A program and its sources.

    Args:
        traced: the program as it was traced.
        dtype: of the arithmetic.
        name: of the rule, for comments.
        conditions: whether the program is told of the conditions of a step, and so multiplies by lr itself.
    """

    traced: Program
    dtype: torch.dtype
    name: str
    conditions: bool = False

    @functools.cached_property
    def program(self) -> Program:
        """The program as simplified."""
        return simplified(self.traced)

    @functools.cached_property
    def c(self) -> Source:
        """The functions of a coordinate in C."""
        return c_source(self.program, self.dtype, self.name)

    @functools.cached_property
    def triton(self) -> Source:
        """The kernel in Triton."""
        return triton_source(self.program, self.name)

    @functools.cached_property
    def key(self) -> str:
        """Follows from all that the program is, so that it is the same in every process."""
        program = f"{self.dtype} {self.traced.features} {self.traced.prologue!r} {self.c} {self.conditions}"
        return hashlib.sha256(program.encode()).hexdigest()[:32]

    @property
    def block(self) -> int:
        """Coordinates of a program on a GPU."""
        widths = [len(product.operands) for product in self.products]
        return 256 if max(widths, default=0) > WIDE_PRODUCT else 512

    @property
    def products(self) -> list[Product]:
        """Those that each coordinate has to itself."""
        operations = zip(self.program.operations, self.program.shared, strict=True)
        return [operation for operation, shared in operations if isinstance(operation, Product) and not shared]

    @property
    def multiply_adds(self) -> int:
        """Of the products of a coordinate."""
        return sum(product.multiply_adds for product in self.products)


def register(program: Program, dtype: torch.dtype, name: str, *, conditions: bool = False) -> Sources:
    """Make a program known under its key, which is what operations of torch.compile pass on.

    Args:
        program: as traced.
        dtype: of the arithmetic.
        name: of the rule.
        conditions: as it was traced.
    """
    made = Sources(program, dtype, name, conditions)
    return _known.setdefault(made.key, made)


def registered(key: str) -> Sources:
    """The sources of that key."""
    return _known[key]


_known: dict[str, Sources] = {}
