"""The C compiler of the machine: how it is called, and when it is given up."""

import contextlib
import itertools
import os
import platform
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from learned_optim.kernels.cache import CompilationError

HEADERS = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
NATIVE_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",))
"""Options that make a compiler use all instructions of this processor: the first that it understands is taken."""
CHOOSES_PROCESSOR = ("-march=", "-mcpu=")
"""Beginnings of options by which a user chooses the processors that the code is for: ``CC="gcc -march=x86-64-v3"``."""
SIMPLEST = "int one(void) { return 1; }\n"
TIMEOUT = 60
"""Seconds that the compiler may take for a call: some forty times what it takes for the largest kernel."""
LONGEST_MESSAGE = 2000
"""Characters of a compiler's message that are passed on."""


class Compiler:
    """A C compiler. Once it has failed on the simplest source, or has hung, it is not called again.

    Args:
        command: program and options.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = tuple(command)
        self._native: tuple[str, ...] | None = None
        self._given_up: str | None = None

    def identity(self) -> tuple[str, ...]:
        """Everything that a library depends on besides its source and flags: command, options, C library, processor."""
        flags = *FLAGS, *itertools.chain(*NATIVE_FLAGS)
        return (*self.command, *flags, *platform.libc_ver(), processor())

    def shared_library(self, source: str, flags: Sequence[str], folder: Path) -> bytes:
        """Compile for this processor; for any of its kind if the compiler, or its assembler, does not know how.

        Args:
            source: the text of a C file.
            flags: options of the compiler that the linker does not get.
            folder: an empty folder, for the output and for temporary files.

        Raises:
            CompilationError: the compiler cannot be run, fails, takes too long or writes nothing.
        """
        native = self._native_flags(folder)
        compiled, library = folder / "compiled.o", folder / "library.so"
        try:
            self._compile(source, (*flags, *native), compiled)
        except CompilationError:
            if not native:
                raise
            self._compile(source, flags, compiled)
        self._run(["-shared", str(compiled), "-o", str(library), "-lm"], folder)
        try:
            return library.read_bytes()
        except FileNotFoundError:
            raise CompilationError(f"{shlex.join(self.command)} wrote nothing, and did not say why") from None

    def _native_flags(self, folder: Path) -> tuple[str, ...]:
        if self._native is None:
            self._native = self._understood(folder)
        return self._native

    def _understood(self, folder: Path) -> tuple[str, ...]:
        """Options for this processor, found by compiling a source that only a broken compiler refuses."""
        tried = folder / "simplest.o"
        try:
            self._compile(SIMPLEST, (), tried)
        except CompilationError as error:
            self._given_up = str(error)
            raise
        if any(option.startswith(CHOOSES_PROCESSOR) for option in self.command):
            return ()
        for flags in NATIVE_FLAGS:
            with contextlib.suppress(CompilationError):
                self._compile(SIMPLEST, flags, tried)
                return flags
        return ()

    def _compile(self, source: str, flags: Sequence[str], output: Path) -> None:
        options = [*FLAGS, *flags, "-I", str(HEADERS), "-x", "c", "-c", "-", "-o", str(output)]
        self._run(options, output.parent, source)

    def _run(self, options: Sequence[str], folder: Path, source: str = "") -> None:
        if self._given_up is not None:
            raise CompilationError(self._given_up)
        name = shlex.join(self.command)
        try:
            process = subprocess.Popen(
                [*self.command, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "TMPDIR": str(folder)},  # the usual one may be full, or read-only
                start_new_session=True,
            )
        except OSError as error:
            raise CompilationError(f"the C compiler {name} cannot be run: {error.strerror}") from error
        with process:
            try:
                _, said = process.communicate(source.encode(), TIMEOUT)
            except BaseException as error:
                with contextlib.suppress(OSError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                self._given_up = f"the C compiler {name} took longer than {TIMEOUT} seconds"
                raise CompilationError(self._given_up) from None
        if process.returncode != 0:
            complaint = said.decode(errors="replace").replace(f"{folder}{os.sep}", "").strip()
            raise CompilationError(f"{name} failed: {complaint[:LONGEST_MESSAGE] or _ending(process.returncode)}")


def _ending(status: int) -> str:
    return f"exit status {status}" if status > 0 else f"ended by signal {-status}"


def processor() -> str:
    """The features of this processor, which a library compiled for it needs: several machines may share a home."""
    lines: list[str] = []
    with contextlib.suppress(OSError):  # hidden, or of another system
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    needed = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join(needed or [platform.machine(), platform.processor(), platform.version(), platform.node()])
