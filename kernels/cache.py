"""Compiled libraries and generated sources, kept in a private folder and loaded only if they are whole.

A damaged library would not fail to load, but end the process: its pages are mapped, and read when they are needed.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

ROOM = 1 << 20
"""Bytes that a folder must have room for before a library is made in it: ten times what is written."""
Used = TypeVar("Used")
NO_WRITABLE_FOLDER = "there is neither a home nor a temporary folder that can be written to"


class CompilationError(RuntimeError):
    """A kernel could not be compiled, for the reason that the compiler gave; or no folder can keep or load it."""


def load_library(name: str, make: Callable[[Path], bytes]) -> ctypes.CDLL:
    """Load a library from the first folder that allows it: a kept one if it is whole, else a new one, which is kept.

    Args:
        name: a hash of all that the library depends on.
        make: makes the library, and may use the empty folder that it is called with. It is called again only after
            an OSError.

    Raises:
        OSError: no folder can keep it, or it can be loaded from none; the message gives the reason for each.
    """
    file = f"{name}.so"
    kept = {folder: _intact(folder / file) for folder in _folders()}
    content = next(filter(None, kept.values()), None)

    def load_from(library: Path) -> ctypes.CDLL:
        nonlocal content
        if kept.get(library.parent) is None:
            with _work_folder(library.parent) as work:
                content = content or _made(make, work)
                _keep(content, library, work)
        return ctypes.CDLL(str(library))

    return _in_first_folder(file, load_from)


def keep_text(name: str, text: str) -> Path:
    """A file with this text, in the first folder that allows it.

    Raises:
        OSError: no folder can keep it; the message gives the reason for each.
    """

    def written(path: Path) -> Path:
        if not path.is_file() or path.read_bytes() != text.encode():
            with _work_folder(path.parent) as work:
                (work / name).write_bytes(text.encode())
                os.replace(work / name, path)
        return path

    return _in_first_folder(name, written)


def _in_first_folder(name: str, use: Callable[[Path], Used]) -> Used:
    """Use the file of this name in the first private folder in which that raises no OSError."""
    objections: list[str] = []
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_unless_private(folder)
            return use(folder / name)
        except OSError as error:  # the cause alone: it is the same for the next file
            objections.append(f"{folder}: {error.strerror or str(error).removeprefix(f'{folder / name}: ')}")
    raise OSError("; ".join(objections) or NO_WRITABLE_FOLDER)


@contextlib.contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder within another, removed afterwards."""
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as work:
        yield Path(work)


def _folders() -> Iterator[Path]:
    """The folders in which libraries may be kept, the best place first."""
    with contextlib.suppress(RuntimeError):  # neither HOME nor a user whom the system knows
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # to be ignored if relative, says its specification
        cache = cache if cache.is_absolute() else Path.home() / ".cache"
        if cache.is_absolute():
            yield cache / "learned_optim" / "kernels"
    with contextlib.suppress(OSError):  # there is none that can be written to
        yield Path(tempfile.gettempdir()) / f"learned_optim-{os.getuid()}"


def _refuse_unless_private(folder: Path) -> None:
    """Raise an OSError if the folder can be written to by another user: code is run from it."""
    status = folder.stat()
    if not status.st_uid == folder.lstat().st_uid == os.getuid():  # a link is its maker's
        raise PermissionError("it belongs to another user")
    if status.st_mode & 0o022:
        raise PermissionError("other users can write to it")


def _intact(library: Path) -> bytes | None:
    """The content of a kept library, None if there is none that is as this user wrote it."""
    try:
        if not library.is_file():
            return None
        _refuse_unless_private(library.parent)
        content, record = library.read_bytes(), _record_of(library).read_bytes()
    except OSError:
        return None
    return content if record == _record(content) else None


def _made(make: Callable[[Path], bytes], work: Path) -> bytes:
    room = work / "room"
    room.write_bytes(bytes(ROOM))  # a compiler would only say that it failed
    room.unlink()
    return make(work)


def _keep(content: bytes, library: Path, work: Path) -> None:
    """Put a library and its record in their places, each in one step: other processes may have the old ones mapped."""
    for path, written in ((_record_of(library), _record(content)), (library, content)):
        new = work / path.name
        new.write_bytes(written)
        os.replace(new, path)


def _record_of(library: Path) -> Path:
    return library.with_suffix(".json")


def _record(content: bytes) -> bytes:
    """The length and checksum of a library, by which a damaged one is found."""
    return json.dumps({"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}).encode()
