"""The command ``learned-optim demo``."""

import argparse
from pathlib import Path

from learned_optim.cli.common import Commands, add_command, check_folder, require


def add_to(commands: Commands) -> None:
    """Add the command with its options."""
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
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    require("demo", "pydantic", "tqdm", "tensorboard", "sklearn", "matplotlib")
    from learned_optim.meta_train.demo import run_demo

    check_folder("--output", options.output)
    run_demo(options.output)
