"""The command ``learned-optim meta-train``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learned_optim.cli.common import (
    CommandError,
    Commands,
    add_command,
    check_device,
    check_folder,
    import_from_here,
    print_table,
    require,
)
from learned_optim.terminal import say


def add_to(commands: Commands) -> None:
    """Add the command with its options."""
    meta_train = add_command(
        commands,
        "meta-train",
        "meta-train a rule from a configuration, or resume a run",
        description="Meta-train a rule. Ctrl-C saves; --resume continues bit-exactly. Many processes: torchrun "
        "--standalone --nproc-per-node 8 -m learned_optim.cli meta-train ...",
        examples=[
            "meta-train --list",
            "meta-train default --output runs/mine --set seed=1 --set meta_optimizer.lr=1e-3",
            "meta-train my_rule.toml --device cuda",
            "meta-train --resume runs/mine",
        ],
    )
    meta_train.add_argument("config", nargs="?", help="TOML file, or name of a shipped configuration (see --list)")
    meta_train.add_argument("--list", action="store_true", help="list the shipped configurations")
    meta_train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    meta_train.add_argument("--output", type=Path, help="run folder (runs/CONFIG)")
    meta_train.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="continue the run in this folder")
    meta_train.add_argument("--device", default="cpu", help="where inner training runs (%(default)s)")
    meta_train.add_argument("--threads", type=int, help="CPU threads")
    meta_train.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    require("train", "pydantic", "tqdm", "tensorboard")
    if options.list:
        _list()
        return
    import torch

    from learned_optim.meta_train.inner.distributed import ProcessLostError, joined

    import_from_here()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    check_device(options.device)
    try:
        with joined(options.device) as world:
            _run_in(world, options)
    except ProcessLostError as error:
        raise CommandError(
            f"{error}; its own message gives the cause. Continue from the last checkpoint with the same command and "
            "--resume, or let torchrun do so: --max-restarts"
        ) from error


def _list() -> None:
    import tomllib

    from learned_optim.meta_train.kinds import KINDS

    paths = {name: path for kind in KINDS for name, path in kind.shipped().items()}
    configs = {name: tomllib.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    print_table([[name, config.get("description", "")] for name, config in configs.items()])


def _run_in(world: Any, options: argparse.Namespace) -> None:
    """Meta-train in the processes of a ``World``; its leader says how it goes."""
    from learned_optim.meta_train.trainer.progress import run_with_progress

    tell: Callable[..., None] = say if world.leads else _nothing
    folder, trainer = _trainer(world, options)
    if trainer.meta_step > 0 or options.resume is not None:
        tell(f"continuing {folder} at meta-step {trainer.meta_step} of {trainer.config.steps}")
    try:
        run_with_progress(trainer)
    except KeyboardInterrupt:
        if (folder / "checkpoint.safetensors").exists():
            tell(f"\nsaved; continue with: learned-optim meta-train --resume {folder}", error=True)
        raise
    curriculum = getattr(trainer, "curriculum", None)  # a few-shot run has none
    if curriculum is not None and curriculum.finished:
        horizon = curriculum.horizon
        tell(f"the curriculum ended at meta-step {trainer.meta_step}: horizon {horizon} brings no more improvement")
    if (folder / "best.safetensors").exists():
        tell(f"best validation {trainer.best_validation:.4g}; weights: {folder / 'best.safetensors'}")
    else:
        tell(f"no validation score was a number; the latest weights: {folder / 'latest.safetensors'}")


def _nothing(*values: object, **options: object) -> None:
    pass


def _trainer(world: Any, options: argparse.Namespace) -> tuple[Path, Any]:
    """The run's folder, and its trainer at the start or, to be resumed, at the checkpoint."""
    from learned_optim.meta_train.config.load import differences
    from learned_optim.meta_train.kinds import KINDS
    from learned_optim.meta_train.trainer.kind import begin_run, load_run_config, resume_run

    if options.resume is None:
        if options.config is None:
            raise CommandError("name a configuration, or a run to resume: --resume RUN")
        folder = options.output or Path("runs") / Path(options.config).stem
        check_folder("--output", folder)
        exists = (folder / "checkpoint.safetensors").exists()
        if exists and not world.restarted:
            raise CommandError(f"{folder} holds a run already; continue it with --resume {folder}, or choose --output")
        if not exists:
            return folder, begin_run(load_run_config(options.config, KINDS, options.set), folder, KINDS, world)
    else:
        folder = _run_to_resume(options)
    given = None
    if options.config is not None:
        given = load_run_config(options.config, KINDS, options.set, resuming=True)
    trainer = resume_run(folder, KINDS, world)
    if given is not None and (different := differences(trainer.config, given)):
        raise CommandError(
            f"{options.config} is not the configuration of the run in {folder}: {'; '.join(different)}; "
            f"continue that as it began with --resume {folder}, or start a new run with --output"
        )
    return folder, trainer


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
