"""What the commands of ``learned-optim`` share."""

import argparse
import os
import sys
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What ``add_subparsers`` returns."""


class CommandError(Exception):
    """Something the user can put right; shown on one line."""


def need(extra: str, *modules: str) -> None:
    """Say which extra is missing before anything is done."""
    import importlib.util

    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"this needs {', '.join(missing)}: pip install 'learned-optim[{extra}]'")


def import_from_here() -> None:
    """Let task families of the user's own be imported from the current folder, as with ``python -m``."""
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)


def usable_device(device: str) -> None:
    """Say that ``--device`` cannot be used before anything is done."""
    import torch

    try:
        # Of several processes by torchrun each has a GPU of its own: none should take memory of the first.
        index = os.environ.get("LOCAL_RANK") if device == "cuda" else None
        torch.zeros((), device=device if index is None else f"cuda:{index}")
    except (AssertionError, RuntimeError) as error:  # torch asserts where it was built without CUDA
        raise CommandError(f"--device {device}: {error}") from error
