"""The command ``learned-optim``."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from learned_optim import __version__  # whatever loads torch is imported where it is needed: --help answers at once
from learned_optim.cli_benchmark import add_benchmark
from learned_optim.cli_common import CommandError, need
from learned_optim.cli_few_shot import add_few_shot
from learned_optim.cli_meta_train import add_meta_train
from learned_optim.cli_neural_art import add_neural_art
from learned_optim.cli_runs import add_runs

INTERRUPTED = 130  # what shells report after Ctrl-C

EXAMPLES = """examples:
  learned-optim demo
  learned-optim meta-train default --output runs/mine --set meta_optimizer.lr=1e-3
  learned-optim meta-train --resume runs/mine
  torchrun --standalone --nproc-per-node 8 -m learned_optim.cli meta-train default --output runs/mine
  learned-optim runs compare runs/mine runs/other
  learned-optim benchmark quick --rules default,runs/mine/best.safetensors
  learned-optim benchmark --model my_model.py:MyTask
  learned-optim data fetch mnist
  learned-optim few-shot runs/maml-omniglot --episodes 600
  learned-optim neural-art --content photo.jpg --style painting.jpg --out art.png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 error, 2 wrong usage, 130 interrupted)."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
        sys.stdout.flush()  # a closed pipe shows here, not when the interpreter ends
    except KeyboardInterrupt:
        print("learned-optim: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, ValueError, OSError, RuntimeError, ImportError) as error:
        if options.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"learned-optim: error: {message}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="learned-optim",
        description="Optimizers that are learned, not hand-designed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"learned-optim {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="meta-train a small rule and compare it with tuned Adam, in three minutes")
    demo.add_argument(
        "--output", type=Path, default=Path("demo"), help="folder for weights, CSV and plot (%(default)s)"
    )
    demo.set_defaults(run=_demo)

    add_meta_train(commands)
    add_runs(commands)
    add_few_shot(commands)
    add_neural_art(commands)

    add_benchmark(commands)

    rules = commands.add_parser("rules", help="list the shipped rules")
    rules.set_defaults(run=_rules)

    data = commands.add_parser("data", help="list or download data sets")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="data sets and where they were found")
    listing.set_defaults(run=_data_list)
    fetch = actions.add_parser("fetch", help="download a data set from its official address")
    fetch.add_argument("name")
    fetch.add_argument("--output", type=Path, help="folder (the user's cache)")
    fetch.set_defaults(run=_data_fetch)
    return parser


def _demo(options: argparse.Namespace) -> None:
    need("demo", "pydantic", "tqdm", "tensorboard", "sklearn", "matplotlib")
    from learned_optim.meta_train.demo import run_demo

    run_demo(options.output)


def _rules(options: argparse.Namespace) -> None:
    from learned_optim.checkpoint import available_rules, load_rule, read_provenance

    for name in available_rules():
        rule = load_rule(name)
        parameters = sum(parameter.numel() for parameter in rule.parameters())
        description = read_provenance(name).get("config", {}).get("description", "")
        print(f"{name:22}{rule.name}, {parameters:,} meta-parameters. {description}")


def _data_list(options: argparse.Namespace) -> None:
    from learned_optim.meta_train.data import DATA_SETS, DataNotFoundError, find

    for name, data_set in DATA_SETS.items():
        try:
            place = str(find(name)) if data_set.layouts else "nothing to fetch"
        except DataNotFoundError:
            place = f"not here: learned-optim data fetch {name}"
        print(f"{name:15}{data_set.description}\n{'':15}{place}")


def _data_fetch(options: argparse.Namespace) -> None:
    from learned_optim.meta_train.fetch import fetch

    print(fetch(options.name, options.output))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
