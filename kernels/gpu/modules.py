"""Sources in Triton as modules of Python, for Triton to compile or to interpret."""

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from learned_optim.kernels.cache import CompilationError, keep_text
from learned_optim.kernels.sources.registry import registered


def step_module(key: str, interpreted: bool) -> ModuleType:
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
        path = keep_text(f"{key}.py", text)
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
    package = "learned_optim.kernels.gpu." + ("interpreted" if interpreted else "compiled")
    if package not in sys.modules:
        module = ModuleType(package, "Copies of the kernels of one kind.")
        module.__path__ = [str(Path(__file__).parent)]
        sys.modules[package] = module
    return package
