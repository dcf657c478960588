"""The command ``learned-optim benchmark``."""

import argparse
import sys
from pathlib import Path

from learned_optim.cli.common import (
    Commands,
    add_command,
    check_device,
    check_folder,
    import_from_here,
    print_json,
    require,
)
from learned_optim.terminal import say


def add_to(commands: Commands) -> None:
    """Add the command with its options."""
    benchmark = add_command(
        commands,
        "benchmark",
        "compare rules with tuned Adam, SGD and others, on a suite of problems or your own model",
        description="Baselines are tuned on seeds of their own; every run is stored, so that an interrupted "
        "benchmark continues where it stopped, and another rule costs only its own runs.",
        examples=[
            "benchmark --list",
            "benchmark quick --rules default,runs/mine/best.safetensors",
            "benchmark quick --rivals untuned",
            "benchmark --model my_model.py:MyTask --steps 500",
        ],
    )
    benchmark.add_argument("suite", nargs="?", help="name (see --list), a TOML file, or FILE.py:CLASS")
    benchmark.add_argument("--list", action="store_true", help="list the suites and their problems")
    benchmark.add_argument(
        "--rules", type=_names, metavar="A,B", help="names or .safetensors files (those that the suite names)"
    )
    benchmark.add_argument(
        "--baselines",
        type=_names,
        metavar="A,B",
        help="names, tuned, or NAME@RATE, as it is; Adam is always among them (the suite's choice)",
    )
    benchmark.add_argument(
        "--rivals",
        choices=("untuned", "tuned", "all"),
        help="Schedule-Free, Prodigy, D-Adaptation, Muon, SOAP and AdEMAMix too: as they come, at their best rate with "
        "AdamW at its best rate and decay, or both (the suite's choice)",
    )
    benchmark.add_argument("--problems", type=_names, metavar="A,B", help="some of the suite's problems (all)")
    benchmark.add_argument("--seeds", type=int, help="training runs of each optimizer (the suite's choice)")
    benchmark.add_argument(
        "--model",
        metavar="FILE.py:CLASS",
        help="a task, family or module of your own, or a function that returns a module, for a suite",
    )
    benchmark.add_argument("--steps", type=int, help="length of the training of --model (1000)")
    benchmark.add_argument("--out", type=Path, help="folder for results (benchmark/SUITE)")
    benchmark.add_argument("--cache", type=Path, help="folder where runs are stored (in the user's cache)")
    benchmark.add_argument("--device", default="cpu", help="where trainings run (%(default)s)")
    benchmark.add_argument(
        "--seconds",
        action=argparse.BooleanOptionalAction,
        help="measure seconds too, on a quiet machine (the suite's choice)",
    )
    benchmark.add_argument("--json", action="store_true", help="print one JSON document instead of tables or a list")
    benchmark.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    require("bench", "pydantic", "sklearn", "matplotlib", "tqdm")
    from learned_optim.meta_train.benchmark.cache import Cache, default_folder
    from learned_optim.meta_train.benchmark.suites import chosen_suite, listing, load_suite, shipped_suites
    from learned_optim.meta_train.reports.comparison import compare

    if options.list:
        if options.json:
            suites = {name: load_suite(name) for name in shipped_suites()}
            print_json({name: {problem.name: problem.label for problem in suites[name].problems} for name in suites})
        else:
            say(listing())
        return
    import_from_here()
    check_device(options.device)
    if options.out is not None:
        check_folder("--out", options.out)
    suite = chosen_suite(
        options.suite, options.model, problems=options.problems or (), seeds=options.seeds, steps=options.steps
    )
    try:
        compare(
            suite,
            options.rules,
            options.baselines,
            options.rivals,
            out=options.out or Path("benchmark") / suite.name,
            cache=Cache(options.cache or default_folder()),
            settings={"command": "learned-optim benchmark"},
            device=options.device,
            seconds=options.seconds,
            json=options.json,
        )
    except KeyboardInterrupt:
        print("\nfinished runs are stored; the same command continues from there", file=sys.stderr)
        raise


def _names(text: str) -> list[str]:
    """``A,B`` as a list."""
    return [name for name in text.split(",") if name]
