"""The fused step on a CPU: C made of a program, compiled by the machine's compiler at the first step, and kept.

Nothing here may stop a training: either there is a kernel, or a CompilationError gives the reason, and what has failed
once in a process is not tried again.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import torch

from learned_optim.kernels.cache import CompilationError, load_library
from learned_optim.kernels.cpu.compiler import Compiler
from learned_optim.kernels.sources.c import macros
from learned_optim.kernels.sources.registry import registered

SOURCE_FOLDER = Path(__file__).parent
SOURCE, HEADER = SOURCE_FOLDER / "cpu.c", SOURCE_FOLDER / "vector.h"
COMPILERS = ("cc", "gcc", "clang")
TILE = 1024
"""Coordinates that a thread takes at a time."""
THREADED = 8 * TILE
"""Coordinates from which on other threads take part."""


class Arguments(ctypes.Structure):
    """The settings of a step, as ``Arguments`` of ``cpu.c``."""

    _fields_ = (
        ("step", ctypes.c_double),  # each tensor has its own
        ("lr", ctypes.c_double),
        ("progress", ctypes.c_double),
        ("averaging", ctypes.c_double),
        ("factor", ctypes.c_double),
        ("decay", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
        ("maximize", ctypes.c_int32),
        ("skip_nonfinite", ctypes.c_int32),
    )


def compiler_unavailable_reason() -> str | None:
    """The reason why there can be no step in C on this machine, None if there can. Compiles nothing."""
    if platform.system() not in ("Linux", "Darwin"):
        return f"the CPU's kernel is not built on {platform.system()}"
    if compiler() is None:
        return f"no C compiler was found ({', '.join(COMPILERS)}); the environment variable CC may name one"
    return None


@functools.cache
def compiler() -> Compiler | None:
    """The compiler that the environment variable CC names, even if it cannot be run, else the first that is found."""
    named = os.environ.get("CC", "")
    try:
        words = shlex.split(named)
    except ValueError:  # a quotation mark too many
        words = [named]
    if words:
        return Compiler([shutil.which(words[0]) or words[0], *words[1:]])
    return next((Compiler([path]) for name in COMPILERS if (path := shutil.which(name))), None)


class Kernel:
    """A rule's step, compiled for tensors of given dtypes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._step = library.step
        integer = ctypes.c_int64
        self._step.argtypes = (ctypes.c_void_p, integer, integer, integer, ctypes.POINTER(Arguments))
        self._step.restype = None

    def __call__(self, table: np.ndarray, settings: Arguments) -> None:
        """Step the tensors of a table in place, by as many threads as torch uses.

        Args:
            table: ``(tensors, columns)``, int64, contiguous, as the ``Tensor`` of ``cpu.c``.
            settings: the settings of the step, which hold for all tensors.
        """
        sizes = table[:, 0]
        tiles = int((-(-sizes // TILE)).sum())
        threads = min(torch.get_num_threads(), tiles) if sizes.sum() >= THREADED else 1
        self._step(table.ctypes.data, len(table), tiles, threads, settings)


def kernel(key: str, dtypes: tuple[torch.dtype, ...]) -> Kernel:
    """The kernel of a program for tensors of these dtypes.

    Args:
        key: the key of the program; see :func:`learned_optim.kernels.sources.registry.register`.
        dtypes: the dtypes of parameters, gradients and each entry of the state.

    Raises:
        CompilationError: the compiler failed, or no folder can keep what it makes; now or earlier in this process.
    """
    with _lock:
        made = _kernel(key, dtypes)
    if isinstance(made, str):
        raise CompilationError(made)
    return made


def warn_once(error: CompilationError) -> None:
    """Warn that a slower step is taken, once in a process for each reason."""
    reason = str(error)
    if reason not in _warned:
        _warned.add(reason)  # before the warning, which may be raised: the next step is then taken
        warnings.warn(f"no fused step, a slower one instead: {reason}", stacklevel=3)


@functools.cache
def _kernel(key: str, dtypes: tuple[torch.dtype, ...]) -> Kernel | str:
    """The kernel, or the reason why there is none."""
    reason = ""
    # Not linked with an OpenMP of its own: torch has loaded one, and its threads, awake since the backward pass, would
    # be in the way of others. Torch's may be another than the compiler's, or the compiler may have none.
    for flags in (("-fopenmp",), ()):
        try:
            return Kernel(_load_library(_library_source(key, dtypes), flags))
        except CompilationError as error:
            reason = str(error)
        except (OSError, AttributeError) as error:  # no folder, a missing symbol, a package without its sources
            reason = f"its library cannot be made, kept or loaded: {error}"
    return reason


def _library_source(key: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """The source of a library."""
    sources = registered(key)
    defined = f"#define TILE {TILE}\n" + ("#define DOUBLE\n" if sources.dtype == torch.float64 else "")
    parts = '#include "vector.h"', sources.c.text, macros(sources.branches, dtypes), SOURCE.read_text()
    return defined + "\n".join(parts)


def _load_library(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The shared library of a source: one that was kept, or a new one."""
    found = compiler()
    if found is None:
        raise CompilationError(str(compiler_unavailable_reason()))
    identity = "\0".join([source, HEADER.read_text(), *flags, *found.identity()])
    name = hashlib.sha256(identity.encode(errors="replace")).hexdigest()[:32]
    return load_library(name, functools.partial(found.shared_library, source, flags))


_warned: set[str] = set()
_lock = threading.Lock()
