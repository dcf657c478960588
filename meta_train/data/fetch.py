"""Download data sets: from their official addresses, resumed where they were cut off, held to their checksums."""

import functools
import hashlib
import os
import sys
import tarfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from learned_optim.meta_train.data.datasets import cache_folder, data_set_named
from learned_optim.meta_train.data.readers import missing_files

_CHUNK = 1 << 20  # bytes read at a time
_TIMEOUT = 30.0  # seconds without a byte after which an address counts as dead


class FetchError(OSError):
    """No address gave a file whole and unchanged; the message names each one, why, and what to do."""


def fetch(
    name: str,
    destination: str | Path | None = None,
    *,
    progress: bool = True,
    mirrors: Sequence[str] | None = None,
) -> Path:
    """Download a data set and return its folder.

    Every file is checked, and appears under its name whole or not at all. Files that are there already are kept if
    their checksum is right. An interrupted download leaves a ``.part``, from which the next one continues.
    Archives are removed once unpacked; unpacked files are kept if all are there.

    Args:
        name: one of :data:`~learned_optim.meta_train.data.datasets.DATA_SETS`.
        destination: the folder to put ``name/`` in; default:
            :func:`~learned_optim.meta_train.data.datasets.cache_folder`.
        progress: show a progress bar on a terminal, if tqdm is installed.
        mirrors: addresses of folders to download from, in this order, instead of the official ones.

    Raises:
        ValueError: the name is unknown, or there is nothing to download.
        FetchError: no address gave the file whole and unchanged.
    """
    data_set = data_set_named(name)
    if data_set.by_hand:
        raise ValueError(f"data set {name!r} cannot be downloaded: {data_set.by_hand}")
    if not data_set.downloads:
        raise ValueError(f"data set {name!r} needs no download: {data_set.description}")
    folder = (cache_folder() if destination is None else Path(destination).expanduser()) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, sha256 in data_set.downloads.items():
        archive = file.endswith(".tar.gz")
        if archive and not missing_files(data_set.layouts[0], folder):
            continue
        _download(name, folder / file, sha256, mirrors or data_set.mirrors, progress)
        if archive:
            _unpack(folder / file, data_set.layouts[0])
    return folder


class _AddressError(Exception):
    """Why an address did not give a file."""


class _UselessPartError(_AddressError):
    """The downloaded bytes cannot become the file, so it is not worth keeping."""


def _download(name: str, target: Path, sha256: str, mirrors: Sequence[str], progress: bool) -> None:
    """Get a file from the first mirror that has it."""
    if target.is_file() and _sha256(target) == sha256:
        return
    failures = []
    for mirror in mirrors:
        address = f"{mirror.rstrip('/')}/{target.name}"
        try:
            _download_from(address, target, sha256, progress)
            return
        except _AddressError as error:
            failures.append(f"{address} ({error})")
    again = " and run this again to continue" if _part(target).exists() else ""
    raise FetchError(
        f"cannot fetch {name!r}: {'; '.join(failures)}; "
        f"check the network{again}, or put the files by hand in {target.parent}"
    )


def _download_from(address: str, target: Path, sha256: str, progress: bool) -> None:
    """Continue or start a ``.part``, check it, and give it its name."""
    part = _part(target)
    may_start_afresh = part.exists()  # once: what was there may be at fault
    while True:
        try:
            _receive(address, part, progress)
            # Copied while it is checked: whatever another process does to the .part, what is published was checked.
            with part.open("rb") as stream:
                _write_whole(target, _checked(stream, sha256))
            part.unlink(missing_ok=True)
            return
        except _UselessPartError:
            part.unlink(missing_ok=True)
            if not may_start_afresh:
                raise
            may_start_afresh = False


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _receive(address: str, part: Path, progress: bool) -> None:
    """Append what is missing; where the server cannot continue, start again."""
    offset = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={offset}-"} if offset else {})
    with _address_errors():
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    with response:
        continued = response.status == 206  # Partial Content
        start = offset if continued else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with part.open("ab" if continued else "wb") as stream, _bar(progress, part.stem, total, start) as advance:
            for chunk in _chunks(response):
                stream.write(chunk)
                advance(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise _AddressError(f"the connection closed after {part.stat().st_size} of {total} bytes")


@contextmanager
def _address_errors() -> Iterator[None]:
    """Turn what can go wrong on the network, and only that, into the reason why an address failed."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        failure = _UselessPartError if error.code == 416 else _AddressError  # 416: nothing follows the .part
        raise failure(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _AddressError(str(error.reason)) from error
    except (HTTPException, OSError) as error:
        raise _AddressError(str(error) or type(error).__name__) from error


def _chunks(response: BinaryIO) -> Iterator[bytes]:
    while True:
        with _address_errors():
            chunk = response.read(_CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _bar(progress: bool, name: str, total: int | None, start: int) -> Iterator[Callable[[int], object]]:
    """A progress bar in bytes, on a terminal and with tqdm; else nothing."""
    if progress and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            with tqdm(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=name) as bar:
                yield bar.update
            return
    yield lambda count: None


def _checked(stream: BinaryIO, sha256: str) -> Iterator[bytes]:
    """Chunks of a stream; at its end an error unless they have this checksum."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != sha256:
        raise _UselessPartError(f"SHA-256 is {digest.hexdigest()} instead of {sha256}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_whole(target: Path, chunks: Iterable[bytes]) -> None:
    """Write a file so that nobody ever sees a part of it under its name."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            stream.writelines(chunks)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _unpack(archive: Path, files: Sequence[str]) -> None:
    """Unpack these regular files, and nothing else, beside an archive; then remove it."""
    with tarfile.open(archive) as members:
        for member in members:
            if member.isreg() and member.name in files and (stream := members.extractfile(member)) is not None:
                target = archive.parent / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream:
                    _write_whole(target, iter(functools.partial(stream.read, _CHUNK), b""))
    if missing := missing_files(tuple(files), archive.parent):
        raise FetchError(f"{archive} lacks {', '.join(missing)}; delete it and fetch it again")
    archive.unlink()
