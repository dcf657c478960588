"""Downloads are checked against their checksums, resumed after interruptions, and never leave a damaged file."""

import dataclasses
import errno
import hashlib
import io
import os
import re
import signal
import socket
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from learned_optim import cli
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.data.fetch import FetchError, fetch

FIRST, SECOND = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


class Server(ThreadingHTTPServer):
    """Serves ``files``, and remembers the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []  # file name, Range
        self.ranges = True  # whether Range is honoured
        self.cut: int | None = None  # send only so many bytes of the next answer

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, asked = self.path[1:], self.headers["Range"]
        self.server.requests.append((name, asked))
        if name not in self.server.files:
            return self.send_error(404)
        content = self.server.files[name]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if asked and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.cut and start + self.server.cut])
        self.server.cut = None
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Server]]:
    """Starts servers, and stops them after the test."""
    monkeypatch.setenv("no_proxy", "*")
    running: list[tuple[Server, threading.Thread]] = []

    def start() -> Server:
        server = Server()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(start: Callable[[], Server], monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server of ``mnist`` in two small files, named as in the table of data sets."""
    server = start()
    random = np.random.default_rng(0)
    server.files = {FIRST: random.bytes(5_000), SECOND: random.bytes(5_000)}
    publish(monkeypatch, "mnist", server.files)
    return server


def publish(monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes]) -> None:
    """Make these the official files of a data set; none of its addresses can be reached."""
    checksums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    entry = dataclasses.replace(data.DATA_SETS[name], downloads=checksums, mirrors=("http://127.0.0.1:0/",))
    monkeypatch.setattr(data, "DATA_SETS", {**data.DATA_SETS, name: entry})


def closed_address() -> str:
    """An address on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fetch_downloads_every_file_once(server: Server, tmp_path: Path) -> None:
    folder = fetch("mnist", tmp_path, mirrors=[server.address])
    assert folder == tmp_path / "mnist"
    assert contents(folder) == server.files
    assert server.requests == [(FIRST, None), (SECOND, None)]
    fetch("mnist", tmp_path, mirrors=[server.address])
    assert len(server.requests) == 2


def test_fetch_writes_to_the_cache_that_find_searches(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEARNED_OPTIM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server.files = {name: name.encode() for name in data.DATA_SETS["mnist"].layouts[0]}
    publish(monkeypatch, "mnist", server.files)
    assert fetch("mnist", mirrors=[server.address]) == data.find("mnist")
    assert data.find("mnist").is_relative_to(tmp_path)


@pytest.mark.parametrize("installed", [True, False], ids=["tqdm", "without tqdm"])
def test_progress_is_shown_on_a_terminal_if_tqdm_is_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installed: bool
) -> None:
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    fetch("mnist", tmp_path / "no terminal", mirrors=[server.address])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch("mnist", tmp_path / "quiet", mirrors=[server.address], progress=False)
    assert capsys.readouterr().err == ""
    fetch("mnist", tmp_path / "shown", mirrors=[server.address])
    assert (f"{FIRST}: 100%" in capsys.readouterr().err) == installed
    assert contents(tmp_path / "shown" / "mnist") == server.files


def test_fetch_replaces_a_file_with_another_checksum(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / SECOND).write_bytes(b"damaged")
    assert contents(fetch("mnist", tmp_path, mirrors=[server.address])) == server.files


def test_interrupted_download_is_resumed(server: Server, tmp_path: Path) -> None:
    server.cut = 2_000
    with pytest.raises(FetchError, match=r"closed after 2000 of 5000 bytes.*run this again to continue"):
        fetch("mnist", tmp_path, mirrors=[server.address])
    assert contents(tmp_path / "mnist") == {f"{FIRST}.part": server.files[FIRST][:2_000]}
    server.cut = 1_000
    with pytest.raises(FetchError, match="closed after 3000 of 5000 bytes"):
        fetch("mnist", tmp_path, mirrors=[server.address])
    assert contents(fetch("mnist", tmp_path, mirrors=[server.address])) == server.files
    assert [asked for name, asked in server.requests if name == FIRST] == [None, "bytes=2000-", "bytes=3000-"]


def test_second_mirror_resumes_the_download_of_the_first(
    server: Server, start: Callable[[], Server], tmp_path: Path
) -> None:
    server.cut = 2_000
    second = start()
    second.files = server.files
    assert contents(fetch("mnist", tmp_path, mirrors=[server.address, second.address])) == server.files
    assert second.requests == [(FIRST, "bytes=2000-")]


def test_server_without_ranges_restarts_the_download(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / f"{FIRST}.part").write_bytes(server.files[FIRST][:2_000])
    assert contents(fetch("mnist", tmp_path, mirrors=[server.address])) == server.files
    assert server.requests == [(FIRST, "bytes=2000-"), (SECOND, None)]


@pytest.mark.parametrize("size", [10, 5_000, 6_000], ids=["short", "whole", "too long"])
def test_damaged_partial_download_is_discarded(server: Server, tmp_path: Path, size: int) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / f"{FIRST}.part").write_bytes(bytes(size))
    assert contents(fetch("mnist", tmp_path, mirrors=[server.address])) == server.files


def test_wrong_checksum_leaves_no_file(server: Server, tmp_path: Path) -> None:
    server.files[FIRST] = b"x" * 5_000
    with pytest.raises(FetchError, match=f"{server.address}{FIRST} \\(SHA-256 is .* instead of .*\\)"):
        fetch("mnist", tmp_path, mirrors=[server.address])
    assert contents(tmp_path) == {}


def test_wrong_checksum_keeps_the_existing_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / FIRST).write_bytes(b"by hand")
    server.files[FIRST] = b"x" * 5_000
    with pytest.raises(FetchError):
        fetch("mnist", tmp_path, mirrors=[server.address])
    assert contents(tmp_path / "mnist") == {FIRST: b"by hand"}


@pytest.mark.parametrize("fault", ["missing", "wrong", "closed"])
def test_second_mirror_is_used_where_the_first_fails(
    server: Server, start: Callable[[], Server], tmp_path: Path, fault: str
) -> None:
    first = start()
    first.files = dict.fromkeys(server.files, b"wrong") if fault == "wrong" else {}
    address = closed_address() if fault == "closed" else first.address
    assert contents(fetch("mnist", tmp_path, mirrors=[address, server.address])) == server.files


def test_failure_names_every_address_cause_and_remedy(server: Server, tmp_path: Path) -> None:
    server.files = {}
    closed = closed_address()
    with pytest.raises(FetchError) as caught:
        fetch("mnist", tmp_path, mirrors=[server.address, closed])
    assert str(caught.value) == (
        f"cannot fetch 'mnist': {server.address}{FIRST} (HTTP 404 Not Found); "
        f"{closed}{FIRST} ([Errno {errno.ECONNREFUSED}] {os.strerror(errno.ECONNREFUSED)}); "
        f"check the network, or put the files by hand in {tmp_path / 'mnist'}"
    )
    assert contents(tmp_path) == {}


def test_disk_error_is_raised_as_itself(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mnist" / f"{FIRST}.part").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        fetch("mnist", tmp_path, mirrors=[server.address])


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_archive_is_unpacked_to_the_expected_files_only(
    start: Callable[[], Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: name.encode() for name in data.DATA_SETS["cifar10"].layouts[0]}
    packed = archive(
        (member("../outside"), b"evil"),
        (member("cifar-10-batches-bin/readme.html"), b"not needed"),
        *((member(name), content) for name, content in expected.items()),
    )
    server = start()
    server.files = {"cifar-10-binary.tar.gz": packed}
    publish(monkeypatch, "cifar10", server.files)
    folder = fetch("cifar10", tmp_path, mirrors=[server.address])
    assert contents(tmp_path) == {f"cifar10/{name}": content for name, content in expected.items()}
    fetch("cifar10", tmp_path, mirrors=[server.address])
    assert len(server.requests) == 1
    (folder / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    fetch("cifar10", tmp_path, mirrors=[server.address])
    assert len(server.requests) == 2
    assert len(contents(folder)) == 6


def test_link_in_an_archive_is_ignored(
    start: Callable[[], Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    link = member("cifar-10-batches-bin/test_batch.bin", tarfile.SYMTYPE, link="/etc/hostname")
    server.files = {"cifar-10-binary.tar.gz": archive((link, b""))}
    publish(monkeypatch, "cifar10", server.files)
    with pytest.raises(FetchError, match=r"lacks .*test_batch\.bin"):
        fetch("cifar10", tmp_path, mirrors=[server.address])
    assert list(contents(tmp_path / "cifar10")) == ["cifar-10-binary.tar.gz"]


class TestCommand:
    """``learned-optim data fetch``."""

    @pytest.fixture(autouse=True)
    def _signals(self) -> Iterator[None]:
        previous = signal.getsignal(signal.SIGTERM)
        yield
        signal.signal(signal.SIGTERM, previous)

    def fetch(self, server: Server, folder: Path, *names: str) -> int:
        return cli.main(["data", "fetch", *names, "--output", str(folder), "--mirror", server.address])

    def error(self, capsys: pytest.CaptureFixture[str]) -> str:
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("learned-optim: error: ")
        return line

    def test_command_prints_the_folder_of_each_data_set(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        characters = {name: name.encode() for name in data.DATA_SETS["omniglot"].downloads}
        publish(monkeypatch, "omniglot", characters)
        server.files |= characters
        assert self.fetch(server, tmp_path, "mnist", "omniglot") == 0
        assert capsys.readouterr() == (f"{tmp_path / 'mnist'}\n{tmp_path / 'omniglot'}\n", "")
        assert contents(tmp_path / "omniglot") == characters  # zip archives stay as they are
        assert data.find("omniglot", tmp_path) == tmp_path / "omniglot"

    def test_command_refuses_a_misspelt_name_before_downloading(
        self, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.fetch(server, tmp_path, "mnist", "omniglott") == 1
        assert "unknown data set 'omniglott' (did you mean 'omniglot'?)" in self.error(capsys)
        assert server.requests == []

    def test_command_resumes_after_a_cut(
        self, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server.cut = 2_000
        assert self.fetch(server, tmp_path, "mnist") == 1
        assert "closed after 2000 of 5000 bytes" in self.error(capsys)
        assert self.fetch(server, tmp_path, "mnist") == 0
        assert server.requests[1] == (FIRST, "bytes=2000-")

    def test_command_resumes_after_ctrl_c(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(response: BinaryIO) -> Iterator[bytes]:
            yield response.read(1_000)
            signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr("learned_optim.meta_train.data.fetch._chunks", interrupted)
            assert self.fetch(server, tmp_path, "mnist") == 130
        assert capsys.readouterr().err == "learned-optim: interrupted\n"
        assert contents(tmp_path / "mnist") == {f"{FIRST}.part": server.files[FIRST][:1_000]}
        assert self.fetch(server, tmp_path, "mnist") == 0
        assert contents(tmp_path / "mnist") == server.files

    def test_command_refuses_a_wrong_checksum(
        self, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server.files[FIRST] = b"x" * 5_000
        assert self.fetch(server, tmp_path, "mnist") == 1
        assert f"SHA-256 is {hashlib.sha256(b'x' * 5_000).hexdigest()} instead of " in self.error(capsys)
        assert contents(tmp_path) == {}

    def test_command_without_network_says_what_to_do(
        self, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["data", "fetch", "mnist", "--output", str(tmp_path)]) == 1  # at its own, dead address
        assert "check the network, or put the files by hand in " in self.error(capsys)
        assert cli.main(["data", "fetch", "mnist", "--output", str(tmp_path), "--mirror", "nonsense"]) == 1
        assert "nonsense" in self.error(capsys)


@pytest.mark.parametrize("name", [name for name, data_set in data.DATA_SETS.items() if data_set.downloads])
def test_official_addresses_and_checksums_are_well_formed(name: str) -> None:
    data_set = data.DATA_SETS[name]
    assert data_set.mirrors
    assert all(re.fullmatch(r"https?://[^?#]+/", mirror) for mirror in data_set.mirrors)
    assert all(re.fullmatch(r"[0-9a-f]{64}", checksum) for checksum in data_set.downloads.values())
    assert not data_set.by_hand
