"""The command ``learned-optim few-shot``."""

import argparse
from pathlib import Path

from learned_optim.cli.common import Commands, add_command, check_device, print_json, require
from learned_optim.terminal import say


def add_to(commands: Commands) -> None:
    """Add the command with its options."""
    few_shot = add_command(
        commands,
        "few-shot",
        "evaluate a few-shot learner on new tasks",
        examples=[
            "few-shot runs/maml --episodes 600",
            "few-shot runs/maml/best.safetensors --steps 10 --one-by-one --json",
        ],
    )
    few_shot.add_argument("source", help="run folder, .safetensors file, or the configuration of an untrained baseline")
    few_shot.add_argument("--episodes", type=int, default=600, help="tasks (%(default)s)")
    few_shot.add_argument("--steps", type=int, help="inner steps (as in the run's validation)")
    few_shot.add_argument("--split", choices=["train", "validation", "test"], default="test", help="(%(default)s)")
    few_shot.add_argument("--seed", type=int, default=0, help="of the tasks (%(default)s)")
    few_shot.add_argument(
        "--one-by-one", action="store_true", help="batch norm sees one query at a time: not transductive"
    )
    few_shot.add_argument("--device", default="cpu", help="where learners are adapted (%(default)s)")
    few_shot.add_argument("--json", action="store_true", help="print JSON")
    few_shot.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    require("few-shot", "pydantic", "tqdm", "PIL")
    from learned_optim.meta_train.config.load import load_tables
    from learned_optim.meta_train.few_shot.evaluation import evaluate
    from learned_optim.meta_train.few_shot.model import FewShotModel
    from learned_optim.meta_train.few_shot.settings import few_shot_config, shipped_few_shot_configs

    check_device(options.device)
    path = Path(options.source)
    path = path / "best.safetensors" if path.is_dir() else path
    if path.suffix == ".safetensors":
        model = FewShotModel.load(path)
    else:
        tables = load_tables(options.source, shipped=shipped_few_shot_configs())
        model = FewShotModel.of(few_shot_config(tables, options.source))
    model.to(options.device)
    steps = model.config.validation_steps if options.steps is None else options.steps
    evaluation = evaluate(
        model.algorithm,
        model.learner,
        options.episodes,
        steps,
        seed=options.seed,
        split=options.split,
        transductive=not options.one_by_one,
    )
    summary = evaluation.summary()
    if options.json:
        print_json({"source": str(path), "split": options.split, **summary})
        return
    say(f"{options.source}: {options.episodes} {options.split} tasks, {evaluation.statistics}")
    for row in summary["steps"]:
        accuracy = "" if "accuracy" not in row else "  accuracy {accuracy:.2%} ± {accuracy_95:.2%}".format(**row)
        say("step {step:3}  loss {loss:.4f} ± {loss_95:.4f}".format(**row) + accuracy)
