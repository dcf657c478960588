"""Output to a terminal: text without control characters, and streams that may be closed at any time."""

import io
import os
import sys
from typing import Any


def printable(text: str) -> str:
    """``text`` with whatever a terminal would act on (line breaks, control characters and the like) as escapes.

    Names and descriptions in files come from whoever wrote them: printed as they are, they could clear the screen, hide
    lines, or pretend to be output of ours.
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def say(text: object, *, error: bool = False) -> None:
    """Print lines that may hold words of others, at once; to standard error if it is no result."""
    lines = "\n".join(printable(line) for line in str(text).split("\n"))
    print(lines, file=sys.stderr if error else sys.stdout, flush=True)


class _Output(io.FileIO):
    """A file whose reader may go away: what is written from then on is lost. Another error is raised once."""

    lost = False

    def write(self, data: Any, /) -> int:
        if not self.lost:
            try:
                return super().write(data)
            except OSError as error:  # such as a full disk
                self.lost = True
                if not isinstance(error, BrokenPipeError):
                    raise
        return memoryview(data).nbytes


def settle_streams() -> None:
    """Let a standard stream that is closed, or whose reader goes away (``| head``), be no failure of the work.

    What cannot be encoded is written as an escape. Streams that somebody has replaced stay as they are.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # the lowest free descriptor is the closed one: no other file must take its place
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r"))  # noqa: SIM115
        elif descriptor and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _tolerant(stream, descriptor))


def _tolerant(stream: io.TextIOWrapper, descriptor: int) -> io.TextIOWrapper:
    if stream.isatty():  # cannot lose its reader, and is a console on Windows
        stream.reconfigure(errors="backslashreplace")
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
