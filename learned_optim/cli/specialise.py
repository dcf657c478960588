"""The command ``learned-optim specialise``."""

import argparse
from pathlib import Path

from learned_optim.cli.common import CommandError, Commands, add_command, check_device, import_from_here, require
from learned_optim.terminal import say


def add_to(commands: Commands) -> None:
    """Add the command with its options."""
    specialise = add_command(
        commands,
        "specialise",
        "meta-train a rule for one kind of task, and see what it gains there",
        description="Meta-train a rule for a task of your own or a shipped family, then compare it on new draws with "
        "the default rule and with tuned Adam and AdamW-cosine. Ctrl-C saves; --resume continues bit-exactly.",
        examples=[
            "specialise my_tasks.py:MyFamily --steps 500",
            "specialise my_model.py",
            "specialise mlp --set dataset=digits --minutes 5",
            "specialise --resume runs/specialise-MyFamily",
        ],
    )
    specialise.add_argument(
        "task",
        nargs="?",
        help="FILE.py:CLASS (a family, task or module), a FILE.py with the functions model(), batch(generator) and "
        "loss(model, batch), or a shipped family's name",
    )
    specialise.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the family")
    specialise.add_argument("--steps", type=int, help="length of the trainings that the rule is for (1000)")
    specialise.add_argument("--minutes", type=float, help="of meta-training (20); the comparison comes on top")
    specialise.add_argument("--rule", help="name or file of the rule to start from (default)")
    specialise.add_argument("--seed", type=int, default=0, help="of the run (%(default)s)")
    specialise.add_argument("--output", type=Path, help="run folder (runs/specialise-TASK)")
    specialise.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    specialise.add_argument("--device", default="cpu", help="where trainings run (%(default)s)")
    specialise.add_argument("--threads", type=int, help="CPU threads")
    specialise.add_argument("--require-gain", action="store_true", help="fail if it is not better than the default")
    specialise.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    require("demo", "pydantic", "tqdm", "tensorboard", "sklearn", "matplotlib")
    import torch

    from learned_optim.meta_train.specialise import MINUTES, STEPS, default_folder, name_of, resume, specialise

    if (options.task is None) == (options.resume is None):
        raise CommandError("name a task, or a run to continue: --resume RUN")
    begun = [name for name in ("set", "steps", "minutes", "rule", "output") if getattr(options, name)]
    if options.resume is not None and begun:
        raise CommandError(f"--{begun[0]} cannot change a run that has begun; start a new one")
    import_from_here()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    check_device(options.device)
    folder = options.resume or options.output or default_folder(name_of(options.task)[0])
    try:
        if options.resume is not None:
            outcome = resume(folder)
        else:
            from learned_optim.meta_train.config.load import tables_of

            outcome = specialise(
                options.task,
                minutes=MINUTES if options.minutes is None else options.minutes,
                steps=STEPS if options.steps is None else options.steps,
                rule=options.rule or "default",
                options=tables_of(options.set),
                folder=folder,
                seed=options.seed,
                device=options.device,
            )
    except KeyboardInterrupt:
        if (folder / "checkpoint.safetensors").exists():
            say(f"\nsaved; continue with: learned-optim specialise --resume {folder}", error=True)
        raise
    if options.require_gain and not outcome.gain.better:
        raise CommandError(f"no gain: {outcome.gain.verdict}")
