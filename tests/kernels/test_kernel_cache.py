"""Cached libraries: whatever is wrong with a folder or a file, an intact library is loaded, or the error says why not.

Nothing is compiled here: a library is a few bytes, and loading is reading.
"""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from learned_optim.kernels import cache

CONTENT = b"a library" * 1000


class Places:
    """The two places for libraries, and how often one was made."""

    def __init__(self, root: Path) -> None:
        self.cache = root / "cache" / "learned_optim" / "kernels"
        self.temporary = root / "temporary" / f"learned_optim-{os.getuid()}"
        self.made = 0

    def make(self, folder: Path) -> bytes:
        assert not list(folder.iterdir())
        (folder / "intermediate").write_bytes(b"")
        self.made += 1
        return CONTENT

    def load(self) -> Path:
        """The folder that the library is loaded from; it is a whole one."""
        library: object = cache.load_library("name", self.make)
        assert isinstance(library, Path)
        assert sorted(path.name for path in library.parent.iterdir()) == ["name.json", "name.so"]
        return library.parent


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def load(path: str) -> Path:
        assert Path(path).read_bytes() == CONTENT
        return Path(path)

    monkeypatch.setattr(ctypes, "CDLL", load)
    return Places(tmp_path)


def dangling(library: Path) -> None:
    library.unlink()
    library.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda library: library.write_bytes(CONTENT[:4096]),
    "a block of zeros": lambda library: library.write_bytes(CONTENT[:512] + bytes(512) + CONTENT[1024:]),
    "empty": lambda library: library.write_bytes(b""),
    "longer": lambda library: library.write_bytes(CONTENT + b"\0"),
    "foreign": lambda library: library.write_bytes(b"of another machine"),
    "gone": Path.unlink,
    "record gone": lambda library: library.with_suffix(".json").unlink(),
    "record empty": lambda library: library.with_suffix(".json").write_bytes(b""),
    "record not text": lambda library: library.with_suffix(".json").write_bytes(b"\xff\xfe"),
    "dangling link": dangling,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_library_is_rebuilt_once(damage: Callable[[Path], object], places: Places) -> None:
    assert places.load() == places.cache
    damage(places.cache / "name.so")
    for _ in range(3):
        assert places.load() == places.cache
    assert places.made == 2


def test_damaged_library_is_replaced_by_the_copy_in_the_other_folder(places: Places) -> None:
    library = places.load() / "name.so"
    places.temporary.mkdir(mode=0o700)
    for name in ("name.so", "name.json"):
        shutil.copy(places.cache / name, places.temporary)
    library.write_bytes(b"")
    assert places.load() == places.cache
    assert places.made == 1


def test_library_in_use_is_replaced_by_a_new_file(places: Places) -> None:
    library = places.load() / "name.so"
    with library.open("rb") as mapped:
        library.with_suffix(".json").unlink()
        places.load()
        assert os.fstat(mapped.fileno()).st_ino != library.stat().st_ino


def test_cached_library_is_loaded_from_a_read_only_folder(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.load()

    def read_only(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", read_only)
    assert places.load() == places.cache


def a_file(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.cache.parents[1].write_bytes(b"")


def dangling_link(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.cache.parent.mkdir(parents=True)
    places.cache.symlink_to("nowhere")


def writable_by_others(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.cache.mkdir(parents=True)
    places.cache.chmod(0o777)


def folder_in_the_place_of_the_library(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    (places.cache / "name.so").mkdir(parents=True)


def full(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def fails_there(path: Path, content: bytes) -> int:
        if path.is_relative_to(places.cache):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fails_there)


def full_when_the_library_is_kept(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def fails_there(old: Path, new: Path) -> None:
        if new.is_relative_to(places.cache):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", fails_there)


def not_executable(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_there(path: str) -> Path:
        if Path(path).is_relative_to(places.cache):
            raise OSError(f"{path}: failed to map segment from shared object")
        return Path(path)

    monkeypatch.setattr(ctypes, "CDLL", fails_there)


def no_home(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)


def relative_home(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "relative")


Hindrance = Callable[[Places, pytest.MonkeyPatch], None]
HINDRANCES: list[Hindrance] = [
    a_file,
    dangling_link,
    writable_by_others,
    folder_in_the_place_of_the_library,
    full,
    full_when_the_library_is_kept,
    not_executable,
    no_home,
    relative_home,
]


@pytest.mark.parametrize("hindrance", HINDRANCES, ids=lambda hindrance: hindrance.__name__)
def test_unusable_folder_falls_back_to_the_next(
    hindrance: Hindrance, places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    hindrance(places, monkeypatch)
    for _ in range(2):
        assert places.load() == places.temporary
    assert places.made == 1
    assert not (tmp_path / "relative").exists()


def test_damaged_fallback_copy_is_restored_from_the_first_folder(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_executable(places, monkeypatch)
    (places.load() / "name.so").write_bytes(b"")
    assert places.load() == places.temporary
    assert (places.temporary / "name.so").read_bytes() == CONTENT
    assert places.made == 1


@pytest.mark.parametrize("cache", ["", "relative"])
def test_relative_cache_home_is_ignored(
    cache: str, places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert places.load() == tmp_path / "home" / ".cache" / "learned_optim" / "kernels"
    assert not (tmp_path / "relative").exists()


def test_link_to_a_private_folder_is_followed(places: Places, tmp_path: Path) -> None:
    places.cache.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    places.cache.symlink_to(tmp_path / "elsewhere")
    assert places.load() == places.cache
    assert (tmp_path / "elsewhere" / "name.so").is_file()


def test_folder_of_another_user_is_refused(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.load()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(OSError, match=r"kernels: it belongs to another user; .*-12345: it belongs to another user"):
        places.load()


def test_missing_home_and_temporary_folder_are_named(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    no_home(places, monkeypatch)
    with pytest.raises(OSError, match="neither a home nor a temporary folder"):
        places.load()


def test_error_message_is_the_same_for_every_library(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.temporary.write_bytes(b"")
    full(places, monkeypatch)
    messages = set()
    for name in ("one", "two"):
        with pytest.raises(OSError, match="kernels: No space left on device") as raised:
            cache.load_library(name, places.make)
        messages.add(str(raised.value).split(";")[0])
    assert len(messages) == 1
    assert places.made == 0  # a compiler would only say that it failed


def test_interrupted_build_leaves_no_files(places: Places) -> None:
    def interrupted(folder: Path) -> bytes:
        (folder / "intermediate").write_bytes(b"")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.load_library("name", interrupted)
    assert not list(places.cache.iterdir())


def test_concurrent_builds_load_a_whole_library(places: Places) -> None:
    with ThreadPoolExecutor(8) as threads:
        loaded: list[object] = list(threads.map(lambda _: cache.load_library("name", places.make), range(32)))
    assert set(loaded) == {places.cache / "name.so"}
    assert places.load() == places.cache
