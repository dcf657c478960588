"""The command ``learned-optim``: one file a sub-command, which parses options, calls the package and prints."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

# Whatever loads torch is imported by the function that needs it, so that --help answers at once.
from learned_optim import __version__
from learned_optim.cli import benchmark, data, demo, doctor, few_shot, meta_train, neural_art, rules, runs, specialise
from learned_optim.cli.common import CommandError, Parser, add_group
from learned_optim.terminal import printable, settle_streams

COMMANDS = (demo, meta_train, specialise, runs, rules, benchmark, few_shot, neural_art, data, doctor)
"""The files of the sub-commands, in the order of the help."""
FAILED = 1
INTERRUPTED = 130  # what shells report after Ctrl-C
EXPECTED = (CommandError, ValueError, OSError, RuntimeError, ImportError)
"""Errors whose message says what to do; any other is a mistake of ours."""

EXAMPLES = (
    "doctor",
    "demo",
    "data fetch mnist",
    "meta-train default --output runs/mine",
    "meta-train --resume runs/mine",
    "specialise my_tasks.py:MyFamily",
    "runs plot runs/mine",
    "rules show runs/mine/best.safetensors --plot rule.png",
    "benchmark quick --rules default,runs/mine/best.safetensors",
    "few-shot runs/maml --episodes 600",
    "neural-art --content photo.jpg --style painting.jpg --out art.png",
)
EXIT_STATUS = "\nexit status: 0 done, 1 error (one line says what to do), 2 wrong usage, 130 interrupted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 error, 2 wrong usage, 130 interrupted)."""
    settle_streams()
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
        sys.stdout.flush()  # a full disk shows here, not when the interpreter ends
    except KeyboardInterrupt:
        print("learned-optim: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if "debug" in options:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, EXPECTED):
            message = f"unexpected {type(error).__name__}: {message}; please report what --debug shows"
        print(f"learned-optim: error: {printable(message)}", file=sys.stderr)
        return FAILED
    return 0


def _parser() -> Parser:
    """The command line."""
    root = Parser(
        prog="learned-optim",
        description="Optimizers that are learned, not hand-designed. COMMAND --help says more.",
        examples=EXAMPLES,
        epilog=EXIT_STATUS,
    )
    root.add_argument("--version", action="version", version=f"learned-optim {__version__}")
    commands = add_group(root, "COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return root


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
