"""The command ``learned-optim neural-art``."""

import argparse
from pathlib import Path

from learned_optim.cli.common import Commands, add_command, check_device, require
from learned_optim.terminal import say


def add_to(commands: Commands) -> None:
    """Add the command with its options."""
    art = add_command(
        commands,
        "neural-art",
        "paint a photograph in the style of a painting",
        examples=[
            "neural-art --content photo.jpg --style painting.jpg --out art.png",
            "neural-art --content photo.jpg --style painting.jpg --out art.png --size 512 --optimizer lbfgs",
        ],
    )
    art.add_argument("--content", type=Path, required=True, metavar="PICTURE", help="the photograph")
    art.add_argument("--style", type=Path, required=True, metavar="PICTURE", help="the painting")
    art.add_argument("--out", type=Path, required=True, metavar="PICTURE", help="what to write, .png or .jpg")
    art.add_argument("--size", type=int, default=256, help="pixels of the shorter side (%(default)s)")
    art.add_argument("--steps", type=int, default=150, help="steps of the optimizer (%(default)s)")
    art.add_argument(
        "--optimizer", default="specialised-neural-art", help="a rule's name or path, adam or lbfgs (%(default)s)"
    )
    art.add_argument("--lr", type=float, help="learning rate (0.1 for adam; else 1)")
    art.add_argument("--style-weight", type=float, default=100.0, help="relative to the content's (%(default)s)")
    art.add_argument("--initial", choices=["content", "noise"], default="content", help="first picture (%(default)s)")
    art.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    art.add_argument("--network", default="vgg19", help="features: vgg19, vgg19-distilled or squeezenet (%(default)s)")
    art.add_argument("--device", default="cpu", help="where it is computed (%(default)s)")
    art.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    require("art", "PIL", "tqdm")
    import dataclasses

    from learned_optim.meta_train.style_transfer.command import Painting, paint

    check_device(options.device)
    settings = {field.name: getattr(options, field.name) for field in dataclasses.fields(Painting)}
    painted = paint(Painting(**settings))
    say(f"written: {options.out} (loss {painted.losses[-1]:.4g})")
