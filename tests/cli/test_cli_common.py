"""What all commands share: help that names every option, examples that parse, light imports, wrong usage."""

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from helpers.paths import ROOT
from learned_optim import __version__, cli
from learned_optim.cli.common import Parser

COMMANDS = {
    "": [
        "demo",
        "meta-train",
        "specialise",
        "runs",
        "benchmark",
        "neural-art",
        "few-shot",
        "rules",
        "data",
        "doctor",
        "exit status: 0 done",
    ],
    "demo": ["--output"],
    "few-shot": ["--episodes", "--steps", "--split", "--one-by-one", "--device", "--json"],
    "meta-train": ["--list", "--set", "--output", "--resume", "--device", "--threads"],
    "specialise": [
        "--set",
        "--steps",
        "--minutes",
        "--rule",
        "--seed",
        "--output",
        "--resume",
        "--device",
        "--threads",
        "--require-gain",
    ],
    "neural-art": [
        "--content",
        "--style",
        "--out",
        "--size",
        "--steps",
        "--optimizer",
        "--lr",
        "--network",
        "--device",
    ],
    "benchmark": [
        *("--list", "--rules", "--baselines", "--problems", "--seeds", "--model", "--steps", "--out", "--cache"),
        *("--device", "--seconds", "--json"),
    ],
    "rules": ["list", "show", "export"],
    "rules list": ["--json"],
    "rules show": ["--plot", "--steps", "--scale", "--json"],
    "rules export": ["--force"],
    "runs": ["list", "show", "plot", "compare"],
    "runs list": ["--json"],
    "runs show": ["--json"],
    "runs plot": ["--output", "--png"],
    "runs compare": ["--output", "--json"],
    "data": ["list", "fetch"],
    "data list": ["--json"],
    "data fetch": ["--output", "--mirror"],
    "doctor": ["--json"],
}
"""Commands, and what their help must name."""


def run(*arguments: str) -> int:
    return cli.main(arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*command.split(), "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: learned-optim {command}".rstrip())
    assert all(word in text for word in COMMANDS[command])


def parsers(parser: Parser) -> Iterator[Parser]:
    """A parser and those of the commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def test_every_command_has_examples_that_can_be_parsed() -> None:
    everything = list(parsers(cli._parser()))
    assert {parser.prog.removeprefix("learned-optim").strip() for parser in everything} == set(COMMANDS)
    for parser in everything:
        assert parser.examples, parser.prog
        for example in parser.examples:
            assert f"learned-optim {example}".startswith(parser.prog), "the example of another command"
            assert cli._parser().parse_args(example.split()).run
            assert f"  learned-optim {example}\n" in parser.format_help()


def test_help_loads_no_heavy_dependency() -> None:
    script = (
        "import sys, contextlib, io\n"
        "from learned_optim import cli\n"
        f"for command in {list(COMMANDS)}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "        cli.main([*command.split(), '--help'])\n"
        "    assert text.getvalue().startswith('usage: '), command\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(process.stdout.split())
    assert "learned_optim" in loaded
    assert loaded & {"torch", "numpy", "matplotlib", "pydantic", "safetensors", "huggingface_hub"} == set()


@pytest.mark.parametrize("group", ["", "data", "runs"])
def test_command_without_an_action_shows_its_help(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*group.split())
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert "examples:" in captured.err
    assert captured.out == ""


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"learned-optim {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["data"],
        ["data", "fetch"],
        ["rules", "--verbose"],
        ["benchmark", "--seeds", "many"],
        ["meta-train", "demo", "--threads", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: learned-optim" in capsys.readouterr().err
