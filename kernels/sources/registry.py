"""The register of programs, by key, with their sources in C and Triton, each written when it is first needed."""

import functools
import hashlib
from dataclasses import dataclass

import torch

from learned_optim.kernels.sources.c import c_source
from learned_optim.kernels.sources.triton import triton_source
from learned_optim.kernels.sources.writer import Source
from learned_optim.kernels.tracing.branches import Branches, branches
from learned_optim.kernels.tracing.program import Program

WIDE_PRODUCT = 16
"""The largest number of inputs of a product for which a thread of a GPU takes four coordinates; with more its registers
hold two."""


@dataclass(frozen=True)
class Sources:
    """A program and its sources.

    Args:
        traced: the program as it was traced.
        dtype: dtype of the arithmetic.
        name: name of the rule, for comments.
        conditions: whether the program reads the conditions of a step, and so multiplies by lr itself.
    """

    traced: Program
    dtype: torch.dtype
    name: str
    conditions: bool = False

    @functools.cached_property
    def branches(self) -> Branches:
        """The programs of a step, one for each outcome of its conditions."""
        return branches(self.traced)

    @functools.cached_property
    def c(self) -> Source:
        """The functions of a coordinate in C."""
        return c_source(self.branches, self.dtype, self.name)

    @functools.cached_property
    def triton(self) -> Source:
        """The kernel in Triton."""
        return triton_source(self.branches, self.name)

    @functools.cached_property
    def key(self) -> str:
        """A hash of everything that the program consists of: the same in every process."""
        program = f"{self.dtype} {self.traced.features} {self.traced.prologue!r} {self.c} {self.conditions}"
        return hashlib.sha256(program.encode()).hexdigest()[:32]

    @property
    def block(self) -> int:
        """Coordinates of a program on a GPU."""
        widths = [len(product.operands) for program in self.branches.programs for product in program.products]
        return 256 if max(widths, default=0) > WIDE_PRODUCT else 512

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the products of a coordinate, in the branch that has most."""
        return max(sum(product.multiply_adds for product in program.products) for program in self.branches.programs)


def register(program: Program, dtype: torch.dtype, name: str, *, conditions: bool = False) -> Sources:
    """Register a program under its key, which operations of torch.compile can pass on.

    Args:
        program: the program as it was traced.
        dtype: dtype of the arithmetic.
        name: name of the rule.
        conditions: whether it was traced with conditions.
    """
    made = Sources(program, dtype, name, conditions)
    return _known.setdefault(made.key, made)


def registered(key: str) -> Sources:
    """The sources of that key."""
    return _known[key]


_known: dict[str, Sources] = {}
