"""The command line as tests call it."""

import pytest

from learned_optim import cli


def run(*arguments: str) -> int:
    return cli.main(arguments)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a failing command prints to standard error."""
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("learned-optim: error: ")
    return lines[0]
