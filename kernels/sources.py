"""Programs that were made known, and their sources in C and Triton, each made when it is first wanted."""

import functools
import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from learned_optim.kernels import c_source, libraries, triton_source
from learned_optim.kernels.compiler import CompilationError
from learned_optim.kernels.program import Product, Program
from learned_optim.kernels.simplify import simplified

WIDE = 16
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
    def c(self) -> c_source.Source:
        """The functions of a coordinate in C."""
        return c_source.source(self.program, self.dtype, self.name)

    @functools.cached_property
    def triton(self) -> triton_source.Source:
        """The kernel in Triton."""
        return triton_source.source(self.program, self.name)

    @functools.cached_property
    def key(self) -> str:
        """Follows from all that the program is, so that it is the same in every process."""
        program = f"{self.dtype} {self.traced.features} {self.traced.prologue!r} {self.c} {self.conditions}"
        return hashlib.sha256(program.encode()).hexdigest()[:32]

    @property
    def block(self) -> int:
        """Coordinates of a program on a GPU."""
        widths = [len(product.operands) for product in self.products]
        return 256 if max(widths, default=0) > WIDE else 512

    @property
    def products(self) -> list[Product]:
        """Those that each coordinate has to itself."""
        operations = zip(self.program.operations, self.program.shared, strict=True)
        return [operation for operation, shared in operations if isinstance(operation, Product) and not shared]

    @property
    def multiply_adds(self) -> int:
        """Of the products of a coordinate."""
        return sum(product.outputs * len(product.operands) for product in self.products)


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


def triton_module(key: str, interpreted: bool) -> ModuleType:
    """The module with the kernel of a program's step; see :func:`module_of`."""
    return module_of(registered(key).triton.text, interpreted)


@functools.cache
def module_of(text: str, interpreted: bool) -> ModuleType:
    """A module with this source, from a file that Triton, debuggers and stack traces can read.

    Raises:
        CompilationError: no folder can keep the file.
    """
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    try:
        path = libraries.keep_text(f"{key}.py", text)
    except OSError as error:
        raise CompilationError(f"its source in Triton cannot be kept: {error}") from error
    name = f"{package_of_kind(interpreted)}.rule_{key}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_of_kind(interpreted: bool) -> str:
    """The package with copies of the files of kernels that are interpreted, or compiled.

    Triton decides when it decorates. Within a package files find one another by relative imports.
    """
    package = "learned_optim.kernels." + ("interpreted" if interpreted else "compiled")
    if package not in sys.modules:
        module = ModuleType(package, "Copies of the kernels of one kind.")
        module.__path__ = [str(Path(__file__).parent)]
        sys.modules[package] = module
    return package


_known: dict[str, Sources] = {}
