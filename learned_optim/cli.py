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
from learned_optim.cli_common import CommandError, import_from_here, need, usable_device

INTERRUPTED = 130  # what shells report after Ctrl-C

EXAMPLES = """examples:
  learned-optim demo
  learned-optim meta-train default --output runs/mine --set meta_optimizer.lr=1e-3
  learned-optim meta-train --resume runs/mine
  learned-optim benchmark quick --rules default,runs/mine/best.safetensors
  learned-optim benchmark --model my_model.py:MyTask
  learned-optim data fetch mnist
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

    meta_train = commands.add_parser("meta-train", help="meta-train a rule from a configuration, or go on with a run")
    meta_train.add_argument("config", nargs="?", help="TOML file, or name of a shipped configuration")
    meta_train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    meta_train.add_argument("--output", type=Path, help="run folder (runs/CONFIG)")
    meta_train.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="continue the run in this folder")
    meta_train.add_argument("--device", default="cpu", help="where inner training runs (%(default)s)")
    meta_train.add_argument("--threads", type=int, help="CPU threads")
    meta_train.set_defaults(run=_meta_train)

    add_benchmark(commands)

    art = commands.add_parser("neural-art", help="paint a photograph in the style of a painting")
    art.add_argument("--content", type=Path, required=True, metavar="PICTURE", help="the photograph")
    art.add_argument("--style", type=Path, required=True, metavar="PICTURE", help="the painting")
    art.add_argument("--out", type=Path, required=True, metavar="PICTURE", help="what to write, .png or .jpg")
    art.add_argument("--size", type=int, default=256, help="pixels of the shorter side (%(default)s)")
    art.add_argument("--steps", type=int, default=200, help="steps of the optimizer (%(default)s)")
    art.add_argument("--optimizer", default="default", help="a rule's name or path, adam or lbfgs (%(default)s)")
    art.add_argument("--lr", type=float, help="learning rate (0.1 for adam; else 1)")
    art.add_argument("--style-weight", type=float, default=100.0, help="relative to the content's (%(default)s)")
    art.add_argument("--initial", choices=["content", "noise"], default="content", help="first picture (%(default)s)")
    art.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    art.add_argument(
        "--network", default="vgg19-distilled", help="features: vgg19, vgg19-distilled or squeezenet (%(default)s)"
    )
    art.add_argument("--device", default="cpu", help="where it is computed (%(default)s)")
    art.set_defaults(run=_neural_art)

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


def _meta_train(options: argparse.Namespace) -> None:
    need("train", "pydantic", "tqdm", "tensorboard")
    import torch

    from learned_optim.meta_train.config import differences, load_config
    from learned_optim.meta_train.progress import run_with_progress
    from learned_optim.meta_train.trainer import Trainer

    import_from_here()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    usable_device(options.device)
    if options.resume is None:
        if options.config is None:
            raise CommandError("name a configuration, or a run to go on with: --resume RUN")
        folder = options.output or Path("runs") / Path(options.config).stem
        if (folder / "checkpoint.safetensors").exists():
            raise CommandError(f"{folder} holds a run already; continue it with --resume {folder}, or choose --output")
        trainer = Trainer(load_config(options.config, options.set), folder, options.device)
    else:
        folder = _run_to_resume(options)
        trainer = Trainer.resume(folder, options.device)
        if options.config is not None:
            given = load_config(options.config, options.set, resuming=True)
            if different := differences(trainer.config, given):
                raise CommandError(
                    f"{options.config} is not the configuration of the run in {folder}: {'; '.join(different)}; "
                    f"continue that as it began with --resume {folder}, or start a new run with --output"
                )
        print(f"continuing {folder} at meta-step {trainer.meta_step} of {trainer.config.steps}")
    try:
        run_with_progress(trainer)
    except KeyboardInterrupt:
        if (folder / "checkpoint.safetensors").exists():
            print(f"\nsaved; continue with: learned-optim meta-train --resume {folder}", file=sys.stderr)
        raise
    if (folder / "best.safetensors").exists():
        print(f"best validation {trainer.best_validation:.4g}; weights: {folder / 'best.safetensors'}")
    else:
        print(f"no validation score was a number; the latest weights: {folder / 'latest.safetensors'}")


def _run_to_resume(options: argparse.Namespace) -> Path:
    if options.set and options.config is None:
        raise CommandError("--set cannot change a run that has begun; start a new one")
    if options.resume is not True:
        if options.output is not None:
            raise CommandError("a run is continued in its own folder: leave out --output")
        return Path(options.resume)
    if options.output is None and options.config is None:
        raise CommandError("which run? --resume RUN")
    return Path(options.output or Path("runs") / Path(options.config).stem)


def _neural_art(options: argparse.Namespace) -> None:
    need("art", "PIL", "tqdm")
    import dataclasses

    from learned_optim.meta_train.neural_art_command import Painting, paint

    usable_device(options.device)
    settings = {field.name: getattr(options, field.name) for field in dataclasses.fields(Painting)}
    loss = paint(Painting(**settings))
    print(f"written: {options.out} (loss {loss:.4g})")


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
