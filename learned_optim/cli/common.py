"""The parser, the tables and the checks that the commands of ``learned-optim`` share."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from learned_optim.terminal import printable

USAGE = 2
"""Exit status of a command line that cannot be understood."""


class CommandError(Exception):
    """Something the user can put right; shown on one line."""


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with examples, and that takes ``--debug`` in every place.

    Args:
        examples: command lines, without the program's name.
        epilog: text after the examples.
        **settings: arguments of ``ArgumentParser``.
    """

    def __init__(self, examples: Sequence[str] = (), epilog: str = "", **settings: Any) -> None:
        lines = ["examples:", *(f"  learned-optim {example}" for example in examples)]
        epilog = "\n".join([*lines, *([epilog] if epilog else [])]) if examples else epilog
        super().__init__(**settings, epilog=epilog, formatter_class=_Formatter)
        self.examples = examples
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )


class _Formatter(argparse.HelpFormatter):
    """Breaks the lines of descriptions, but not those of examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 14  # argparse forgets that the names of commands are indented further

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""The commands below a parser: the type that ``add_subparsers`` returns."""


def add_command(
    commands: Commands, name: str, help: str, *, examples: Sequence[str], description: str | None = None
) -> Parser:
    """Add a command; its help is its description too, unless there is a longer one."""
    return commands.add_parser(
        name, help=help, description=description or f"{help[0].upper()}{help[1:]}.", examples=examples
    )


def add_group(parser: Parser, metavar: str, run: Callable[[argparse.Namespace], None] | None = None) -> Commands:
    """Commands below a parser. Without one, ``run`` is called; where that is None, the help is shown: wrong usage."""

    def show_help(options: argparse.Namespace) -> NoReturn:
        parser.print_help(sys.stderr)
        raise SystemExit(USAGE)

    parser.set_defaults(run=run or show_help)
    return parser.add_subparsers(metavar=metavar)


def print_json(value: Any) -> None:
    """Print a value for a script."""
    print(json.dumps(value, indent=2))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with their columns aligned, whatever their cells contain."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def coloured(text: str, colour: int) -> str:
    """``text`` in one of the terminal's colours (31 red, 32 green, 33 yellow, 0 none); see :func:`printable`."""
    text = printable(text)
    if colour == 0 or not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def require(extra: str, *modules: str) -> None:
    """Raise a CommandError that names the extra to install if one of the modules is missing; imports none of them."""
    import importlib.util

    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"this needs {', '.join(missing)}: pip install 'learned-optim[{extra}]'")


def import_from_here() -> None:
    """Let modules in the current folder be imported, as with ``python -m``: task families of the user's own."""
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)


def check_folder(option: str, folder: Path) -> None:
    """Raise a CommandError, before anything is done, if results cannot go into ``folder`` as a file lies there."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise CommandError(f"{option} {folder}: {path} is a file; name a folder")


def check_device(device: str) -> None:
    """Raise a CommandError if ``--device`` cannot be used, before anything is done."""
    import torch

    try:
        # Of several processes by torchrun each has a GPU of its own: none should take memory of the first.
        index = os.environ.get("LOCAL_RANK") if device == "cuda" else None
        torch.zeros((), device=device if index is None else f"cuda:{index}")
    except (AssertionError, RuntimeError) as error:  # torch asserts where it was built without CUDA
        raise CommandError(f"--device {device}: {error}") from error
