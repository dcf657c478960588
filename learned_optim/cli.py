"""The command ``learned-optim``."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from learned_optim import __version__  # whatever loads torch is imported where it is needed: --help answers at once
from learned_optim.cli_benchmark import add_benchmark
from learned_optim.cli_common import CommandError, Commands, Parser, add_command, add_group, need
from learned_optim.cli_data import add_data
from learned_optim.cli_doctor import add_doctor
from learned_optim.cli_few_shot import add_few_shot
from learned_optim.cli_meta_train import add_meta_train
from learned_optim.cli_neural_art import add_neural_art
from learned_optim.cli_rules import add_rules
from learned_optim.cli_runs import add_runs
from learned_optim.terminal import printable, settle_streams

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
    _add_demo(commands)
    add_meta_train(commands)
    add_runs(commands)
    add_rules(commands)
    add_benchmark(commands)
    add_few_shot(commands)
    add_neural_art(commands)
    add_data(commands)
    add_doctor(commands)
    return root


def _add_demo(commands: Commands) -> None:
    demo = add_command(
        commands,
        "demo",
        "meta-train a small rule and compare it with tuned Adam, in three minutes",
        description="Meta-train a small rule for a minute on scikit-learn's digits, then compare it and the default "
        "rule with tuned Adam. Nothing is downloaded.",
        examples=["demo", "demo --output results/demo"],
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="FOLDER",
        help="folder for weights, CSV and plot (%(default)s)",
    )
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    need("demo", "pydantic", "tqdm", "tensorboard", "sklearn", "matplotlib")
    from learned_optim.meta_train.demo import run_demo

    run_demo(options.output)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
