"""The fused step on a CPU: ``cpu.c``, compiled by the C compiler of the machine at the first step, and kept.

It takes the same plans as Triton's kernels.
"""

import ctypes
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
SOURCE, HEADER = FOLDER / "cpu.c", FOLDER / "vector.h"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
NATIVE_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
"""What makes a compiler use all instructions of this processor: the first that it understands."""
LONGEST = 120
"""Seconds that the compiler may take."""
TILE = 1024
"""Coordinates that a thread takes at a time."""
THREADED = 8 * TILE
"""Coordinates from which on other threads take part."""
LARGEST_COPY = 16 * TILE
"""As in ``launch.py``; these stay in the cache."""
DTYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}


_one = np.ones((), np.float32)
NO_SCALE = _one.ctypes.data
"""Address of the scale of a tensor that has none."""


class CompilationError(RuntimeError):
    """The C compiler failed, and said why; or what it made cannot be loaded."""


class Settings(ctypes.Structure):
    """The ``Settings`` of ``cpu.c``."""

    _fields_ = (
        ("lr", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("grad_scale", ctypes.c_float),
        ("maximize", ctypes.c_int32),
        ("skip_nonfinite", ctypes.c_int32),
    )


def why_not_compiled() -> str | None:
    """The reason why there can be no step in C on this machine, None if there can. Compiles nothing."""
    if platform.system() not in ("Linux", "Darwin"):
        return f"the CPU's kernel is not built on {platform.system()}"
    if compiler() is None:
        return f"no C compiler was found ({', '.join(COMPILERS)}, or what the environment variable CC names)"
    return None


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """The command that compiles C."""
    commands = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else [[name] for name in COMPILERS]
    return next(((path, *options) for name, *options in commands if (path := shutil.which(name))), None)


class Kernel:
    """A rule's step, compiled for parameters, gradients, hidden states and cells of given dtypes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._step = library.step
        integer = ctypes.c_int64
        self._step.argtypes = (ctypes.c_void_p, integer, integer, integer, ctypes.POINTER(Settings))
        self._step.restype = None

    def __call__(self, table: np.ndarray, settings: Settings) -> None:
        """Step the tensors of a table in place, by as many threads as torch uses.

        Args:
            table: ``(tensors, columns)``, int64, contiguous: of each tensor number of coordinates, distance between
                features of the state, and the addresses of scale, weights, step count, parameter, gradient and entries
                of the state, in the kernels' order.
            settings: of all tensors.
        """
        sizes = table[:, 0]
        tiles = int((-(-sizes // TILE)).sum())
        threads = min(torch.get_num_threads(), tiles) if sizes.sum() >= THREADED else 1
        self._step(table.ctypes.data, len(table), tiles, threads, settings)


def kernel(architecture: str, constants: str, dtypes: tuple[torch.dtype, ...]) -> Kernel:
    """That of a rule for parameters, gradients, hidden states and cells of these dtypes.

    Args:
        architecture: of the plan.
        constants: the plan's description.
        dtypes: four, in that order.

    Raises:
        CompilationError: the compiler failed.
    """
    with _lock:
        return _kernel(architecture, constants, dtypes)


@functools.cache
def _kernel(architecture: str, constants: str, dtypes: tuple[torch.dtype, ...]) -> Kernel:
    source = _prologue(architecture, constants, dtypes) + SOURCE.read_text()
    try:
        # Not linked with an OpenMP of its own: torch has loaded one, and its threads, awake since the backward pass,
        # would be in the way of others.
        return _loaded(source, "-fopenmp")
    except CompilationError:  # torch's is another OpenMP than the compiler's, or the compiler has none
        return _loaded(source)


def _loaded(source: str, *flags: str) -> Kernel:
    library = _compiled(source, *flags)
    try:
        return Kernel(ctypes.CDLL(str(library)))
    except OSError as error:  # a missing symbol, a folder that nothing may be run from, a damaged file
        raise CompilationError(f"{library} cannot be loaded: {error}") from error


def _prologue(architecture: str, constants: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """The constants in C."""
    lines = [f"#define {architecture.upper().replace('-', '_')}", f"#define TILE {TILE}"]
    names = ("PARAMETER_DTYPE", "GRAD_DTYPE", "HIDDEN_DTYPE", "CELL_DTYPE")
    lines += [f"#define {name} {DTYPES[dtype]}" for name, dtype in zip(names, dtypes, strict=True)]
    for name, value in json.loads(constants).items():
        if isinstance(value, list):
            lines.append(f"static const double {name}[] = {{{', '.join(map(repr, value))}}};")
        else:
            lines.append(f"#define {name} {value!r}" + ("f" if isinstance(value, float) else ""))
    return "\n".join(lines) + "\n"


def _compiled(source: str, *flags: str) -> Path:
    """The shared library of a source: one that was kept, or a new one."""
    command = compiler()
    if command is None:
        raise CompilationError(str(why_not_compiled()))
    identity = "\0".join([source, HEADER.read_text(), *command, *FLAGS, *flags, _processor()])
    name = f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.so"
    for folder in filter(_is_ours, _folders()):
        if (folder / name).is_file():
            return folder / name
        try:
            with tempfile.TemporaryDirectory(dir=folder) as made:
                os.replace(_compile(command, source, flags, Path(made)), folder / name)
        except OSError:  # no place left
            continue
        return folder / name
    raise CompilationError(f"no folder can be written to: {', '.join(map(str, _folders()))}")


def _is_ours(folder: Path) -> bool:
    """Whether a folder, made if need be, can be written to by this user and by no other: code is run from it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK)


def _compile(command: Sequence[str], source: str, flags: Sequence[str], folder: Path) -> Path:
    """Compile for this processor; for any of its kind if the compiler does not know how."""
    compiled, library = folder / "cpu.o", folder / "cpu.so"
    for native in NATIVE_FLAGS:
        arguments = [*command, *FLAGS, *flags, *native, "-I", str(FOLDER), "-x", "c", "-c", "-", "-o", str(compiled)]
        complaint = _complaint(arguments, source)
        if complaint is None:
            break
    else:
        raise CompilationError(complaint)
    if complaint := _complaint([*command, "-shared", str(compiled), "-o", str(library), "-lm"]):
        raise CompilationError(complaint)
    return library


def _complaint(arguments: Sequence[str], source: str = "") -> str | None:
    """What the compiler says against it, None if it does it."""
    try:
        subprocess.run(arguments, input=source, capture_output=True, text=True, check=True, timeout=LONGEST)
    except subprocess.CalledProcessError as error:
        return f"{' '.join(arguments)} failed: {error.stderr.strip()[:2000]}"
    except subprocess.TimeoutExpired:
        return f"{' '.join(arguments)} took longer than {LONGEST} seconds"
    return None


def _folders() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [Path(cache) / "learned_optim" / "kernels", Path(tempfile.gettempdir()) / f"learned_optim-{os.getuid()}"]


@functools.cache
def _processor() -> str:
    """What a library that was compiled for this processor needs: homes may be shared by several."""
    with_flags = Path("/proc/cpuinfo")
    if with_flags.is_file():
        lines = with_flags.read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return f"{platform.machine()} {platform.processor()} {platform.version()}"


_lock = threading.Lock()
