"""The command ``learned-optim``."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from learned_optim import __version__  # whatever loads torch is imported where it is needed: --help answers at once
from learned_optim.cli_common import CommandError, need
from learned_optim.cli_meta_train import add_meta_train
from learned_optim.cli_runs import add_runs

INTERRUPTED = 130  # what shells report after Ctrl-C

EXAMPLES = """examples:
  learned-optim demo
  learned-optim meta-train default --output runs/mine --set meta_optimizer.lr=1e-3
  learned-optim meta-train --resume runs/mine
  learned-optim runs compare runs/mine runs/other
  learned-optim benchmark quadratic mnist --rule default --rule runs/mine/best.safetensors
  learned-optim data fetch mnist
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

    benchmark = commands.add_parser("benchmark", help="compare rules with tuned Adam, RMSprop, SGD and NAG")
    benchmark.add_argument("problem", nargs="*", help="names (see --list); none: all")
    benchmark.add_argument("--list", action="store_true", help="list the problems")
    benchmark.add_argument("--rule", action="append", help="name or path; repeatable (the problem's own choice)")
    benchmark.add_argument("--baseline", action="append", help="Adam, RMSprop, SGD or NAG; repeatable (all of them)")
    benchmark.add_argument("--seeds", type=int, default=20, help="training runs of each optimizer (%(default)s)")
    benchmark.add_argument("--output", type=Path, default=Path("benchmark"), help="folder for results (%(default)s)")
    benchmark.set_defaults(run=_benchmark)

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


def _benchmark(options: argparse.Namespace) -> None:
    need("bench", "pydantic", "sklearn", "matplotlib")
    from learned_optim import available_rules
    from learned_optim.checkpoint import load_rule
    from learned_optim.meta_train.benchmark import COMPARISONS, Curve, compare, save_results, table
    from learned_optim.meta_train.evaluation import BASELINES, HIGHER_RATES, RATES
    from learned_optim.meta_train.plots import plot_comparison

    if options.list:
        for name, comparison in COMPARISONS.items():
            print(f"{name:20}{comparison.title}, {comparison.steps} steps")
        return
    problems = options.problem or list(COMPARISONS)
    unknown = [name for name in problems if name not in COMPARISONS]
    if unknown:
        raise CommandError(f"unknown problem {unknown[0]!r}; known: {', '.join(COMPARISONS)}")
    if options.seeds < 2:
        raise CommandError("--seeds must be at least 2")
    baselines = options.baseline or list(BASELINES)
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise CommandError(f"unknown baseline {unknown[0]!r}; known: {', '.join(BASELINES)}")
    for rule in options.rule or ():
        load_rule(rule)  # fail before hours of tuning, not after
    rules = [rule if rule in available_rules() else Path(rule) for rule in options.rule or ()]
    settings = {
        "command": "learned-optim benchmark",
        "problems": problems,
        "seeds": options.seeds,
        "rates": RATES,
        "rates_tried_above_if_the_highest_is_best": [rate for rate in HIGHER_RATES if rate > max(RATES)],
    }
    results: dict[str, list[Curve]] = {}
    figure = options.output / "comparison.png"
    for name in problems:
        comparison = COMPARISONS[name]
        title = f"{comparison.title}, {comparison.steps} steps"
        results[name] = compare(
            comparison, rules or comparison.rules, options.seeds, baselines=baselines, report=_to_stderr
        )
        print(f"\n{title}, {options.seeds} seeds\n{table(results[name])}\n", flush=True)
        paths = save_results(results, options.output, settings)  # after each problem: an interruption loses little
        titles = {name: f"{COMPARISONS[name].title}, {COMPARISONS[name].steps} steps" for name in results}
        plot_comparison(results, titles, figure)
    print("written: " + ", ".join(str(path) for path in (*paths, figure)))


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


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
