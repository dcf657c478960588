"""Calling a C compiler that fails, hangs or is named wrongly; shell scripts stand in for most compilers."""

import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from learned_optim.kernels.cache import CompilationError
from learned_optim.kernels.cpu import compiler
from learned_optim.kernels.cpu import kernel as cpu_kernel
from learned_optim.kernels.cpu.compiler import Compiler

SOURCE = "int two(void) { return 2; }\n"


@pytest.fixture(autouse=True)
def found_anew() -> Iterator[None]:
    cpu_kernel.compiler.cache_clear()
    yield
    cpu_kernel.compiler.cache_clear()


class Script:
    """A compiler that is a shell script, and notes the arguments of its calls."""

    def __init__(self, folder: Path, text: str, *, source: bool = True) -> None:
        self.notes = folder / "notes"
        self.path = folder / "a compiler"
        read = "source=$(cat)\n" if source else ""
        self.path.write_text(f'#!/bin/sh\necho "$@" >> "{self.notes}"\n{read}{text}\n')
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)
        self.compiler = Compiler([str(self.path)])

    @property
    def calls(self) -> list[str]:
        return self.notes.read_text().splitlines()


WRITES = 'for argument in "$@"; do last=$output; output=$argument; [ "$last" = -o ] && echo made > "$output"; done; :'
"""Write whatever is the output."""


def complaint(tried: Compiler, folder: Path) -> str:
    folder.mkdir()
    with pytest.raises(CompilationError) as raised:
        tried.shared_library(SOURCE, (), folder)
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("echo 'out of ink' >&2; exit 1", "a compiler' failed: out of ink"),
        ("printf 'caf\\351' >&2; exit 1", "a compiler' failed: caf\N{REPLACEMENT CHARACTER}"),
        ("exit 3", "a compiler' failed: exit status 3"),
        ("kill -9 $$", "a compiler' failed: ended by signal 9"),
    ],
    ids=["fails", "not UTF-8", "says nothing", "is killed"],
)
def test_failing_compiler_is_called_once_and_reported(text: str, cause: str, tmp_path: Path) -> None:
    script = Script(tmp_path, text)
    for work in ("one", "two"):
        assert complaint(script.compiler, tmp_path / work).endswith(cause)
    assert len(script.calls) == 1


def test_compiler_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    assert "wrote nothing" in complaint(Script(tmp_path, "exit 0").compiler, tmp_path / "work")


def test_compiler_that_ignores_its_input_is_waited_for(tmp_path: Path) -> None:
    script = Script(tmp_path, "exit 1", source=False)
    assert "exit status 1" in complaint(script.compiler, tmp_path / "work")


def test_hanging_compiler_is_killed_with_its_children_and_called_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "TIMEOUT", 0.2)
    script = Script(tmp_path, f"(sleep 0.6; touch '{tmp_path}/survived') & wait")
    for work in ("one", "two"):
        assert complaint(script.compiler, tmp_path / work).endswith("took longer than 0.2 seconds")
    assert len(script.calls) == 1
    time.sleep(0.6)
    assert not (tmp_path / "survived").exists()


def test_kernel_failure_is_retried_once_without_native_instructions(
    tmp_path: Path,
) -> None:
    script = Script(tmp_path, f'case $source in *two*) echo "too hard" >&2; exit 1;; esac; {WRITES}')
    assert complaint(script.compiler, tmp_path / "work").endswith("too hard")
    assert [("-march=native" in call) for call in script.calls] == [False, True, True, False]


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [
        ("nothing", "-march=native -mprefer-vector-width=512"),
        ("-mprefer-vector-width=512", "-march=native"),
        ("-march=native", "-mcpu=native"),
        ("native", ""),
    ],
)
def test_instructions_of_the_processor_are_used_where_supported(unknown: str, expected: str, tmp_path: Path) -> None:
    script = Script(tmp_path, f'case "$*" in *{unknown}*) exit 1;; esac; {WRITES}')
    assert script.compiler.shared_library(SOURCE, ("-fopenmp",), tmp_path) == b"made\n"
    *_, compiling, linking = script.calls
    assert f"-fopenmp {expected}".strip() + " -I" in compiling
    assert "-fopenmp" not in linking


def test_old_assembler_gets_plain_instructions(tmp_path: Path) -> None:
    script = Script(tmp_path, f'case "$* $source" in *-march=native*two*) exit 1;; esac; {WRITES}')
    assert script.compiler.shared_library(SOURCE, (), tmp_path) == b"made\n"
    assert "native" not in script.calls[-2]


@pytest.mark.parametrize(
    ("option", "native"), [("-march=x86-64", False), ("-mcpu=generic", False), ("-mtune=generic", True)]
)
def test_processor_option_of_the_user_is_kept(option: str, native: bool, tmp_path: Path) -> None:
    script = Script(tmp_path, WRITES)
    Compiler([str(script.path), option]).shared_library(SOURCE, (), tmp_path)
    assert all(option in call for call in script.calls)
    assert ("-march=native" in script.calls[-2]) is native


def test_compiler_writes_temporary_files_into_the_work_folder(tmp_path: Path) -> None:
    script = Script(tmp_path, 'echo "$TMPDIR" >&2; exit 1')
    assert complaint(script.compiler, tmp_path / "work").endswith(f"{tmp_path}/work")


def test_error_message_is_the_same_in_every_folder(tmp_path: Path) -> None:
    script = Script(tmp_path, f'case $source in *two*) echo "$TMPDIR/compiled.o: odd" >&2; exit 1;; esac; {WRITES}')
    assert len({complaint(script.compiler, tmp_path / work) for work in ("one", "two")}) == 1


@pytest.mark.skipif(cpu_kernel.compiler() is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    "text",
    ["{command}", "{command} -O1 -DNAME='two words'", "'{wrapper}' {command}"],
    ids=["bare", "options", "wrapped"],
)
def test_cc_with_options_or_wrapper_is_used(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    found = cpu_kernel.compiler()
    assert found is not None
    wrapper = Script(tmp_path, 'echo "beware" >&2; exec "$@"', source=False)
    cpu_kernel.compiler.cache_clear()
    monkeypatch.setenv("CC", text.format(command=found.command[0], wrapper=wrapper.path))
    named = cpu_kernel.compiler()
    assert named is not None
    assert b"two" in named.shared_library(SOURCE, (), tmp_path)


@pytest.mark.parametrize(
    ("named", "cause"),
    [
        ('gcc "', """'gcc "' cannot be run: No such file or directory"""),
        ("no-such-compiler -O2", "no-such-compiler -O2 cannot be run: No such file or directory"),
        ("{folder}", "cannot be run: Permission denied"),
        ("{folder}/file", "cannot be run: Permission denied"),
        ("{folder}/script", "cannot be run: Exec format error"),
    ],
    ids=["odd quoting", "missing", "folder", "not executable", "not a program"],
)
def test_unusable_cc_is_reported(named: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "script").write_text("no program")
    (tmp_path / "script").chmod(0o700)
    monkeypatch.setenv("CC", named.format(folder=tmp_path))
    found = cpu_kernel.compiler()
    assert found is not None
    assert complaint(found, tmp_path / "work").endswith(cause)


def test_blank_cc_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "  ")
    monkeypatch.setenv("PATH", "/nowhere")
    assert cpu_kernel.compiler() is None


@pytest.mark.parametrize("hidden", [PermissionError, FileNotFoundError])
def test_unreadable_processor_is_identified_by_the_host_name(
    hidden: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **options: object) -> str:
        raise hidden(str(path))

    monkeypatch.setattr(Path, "read_text", read)
    names = []
    for name in ("one", "two"):
        monkeypatch.setattr("platform.node", lambda name=name: name)
        names.append(compiler.processor())
    assert names[0] != names[1]


def test_unknown_processor_is_identified_by_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path, **options: "isa: rv64imafdc\n")
    monkeypatch.setattr("platform.node", lambda: "a machine")
    assert "a machine" in compiler.processor()


def test_identity_differs_by_processor_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    identities = set()
    for kind in ("one", "two"):
        monkeypatch.setattr(compiler, "processor", lambda kind=kind: kind)
        identities |= {Compiler(["gcc"]).identity(), Compiler(["gcc", "-O1"]).identity()}
    assert len(identities) == 4
