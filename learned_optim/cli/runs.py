"""The command ``learned-optim runs``: meta-training runs as things to look at."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learned_optim.cli.common import CommandError, Commands, add_command, add_group, print_json, print_table, require
from learned_optim.terminal import printable, say

RUN_COLUMNS = ("run", "families", "estimator", "meta-steps", "best", "over", "time", "state")
DEFAULT = Path("runs")
VALUE_WIDTH = 60  # of settings in a table; longer values are cut


def add_to(commands: Commands) -> None:
    """Add the command with its actions."""
    runs = add_command(
        commands,
        "runs",
        "list, show, plot and compare meta-training runs",
        examples=["runs list", "runs show runs/mine", "runs plot runs/mine", "runs compare runs/mine runs/other"],
    )
    actions = add_group(runs, "ACTION")
    listing = add_command(actions, "list", "one line a run", examples=["runs list", "runs list runs/mine other --json"])
    listing.add_argument("folder", nargs="*", type=Path, default=[DEFAULT], help="runs, or folders of runs (runs)")
    listing.set_defaults(run=_list)
    show = add_command(
        actions,
        "show",
        "settings that are not the defaults, outcome, and how the run came about",
        examples=["runs show runs/mine", "runs show runs/mine --json"],
    )
    show.add_argument("folder", type=Path, help="of a run")
    show.set_defaults(run=_show)
    plot = add_command(
        actions,
        "plot",
        "draw what was logged and what the rule does: a page for each run",
        description="Write a page that needs no network and no other file: curves, what the estimator reports, how the "
        "rule responds to gradients, settings and sessions. Or, as PNG, the curves alone.",
        examples=["runs plot runs/mine", "runs plot runs/mine --output curves.png", "runs plot runs/* --png"],
    )
    plot.add_argument("folder", nargs="+", type=Path, help="of runs, or that hold runs")
    plot.add_argument("--output", type=Path, metavar="FILE", help=".html or .png, for one run (FOLDER/report.html)")
    plot.add_argument("--png", action="store_true", help="write FOLDER/metrics.png instead of a page")
    plot.set_defaults(run=_plot)
    compare = add_command(
        actions,
        "compare",
        "settings in which runs differ, and their curves in one figure",
        examples=["runs compare runs/mine runs/other", "runs compare runs --output comparison.png"],
    )
    compare.add_argument("folder", nargs="+", type=Path, help="of runs, or that hold runs")
    compare.add_argument("--output", type=Path, default=Path("runs.png"), metavar="FILE", help="PNG (%(default)s)")
    compare.set_defaults(run=_compare)
    for action in (listing, show, compare):
        action.add_argument("--json", action="store_true", help="print JSON")


def _list(options: argparse.Namespace) -> None:
    require("train", "pydantic")
    from learned_optim.meta_train.kinds import KINDS
    from learned_optim.meta_train.reports.runs import find_run_folders, read_run

    none_yet = options.folder == [DEFAULT] and not any(DEFAULT.glob("*/checkpoint.safetensors"))
    if none_yet and not options.json:
        say(f"no runs yet in {DEFAULT}; learned-optim meta-train CONFIG begins one")
        return
    summaries, damaged = [], []
    for folder in [] if none_yet else find_run_folders(options.folder):
        try:
            summaries.append(read_run(folder, KINDS).summary())
        except ValueError as error:
            damaged.append(error)  # the other runs can be listed all the same
    if options.json:
        print_json(summaries)
    elif summaries:
        print_table([RUN_COLUMNS, *map(_row, summaries)])
    if damaged:
        raise CommandError("; ".join(map(str, damaged)))


def _row(summary: Mapping[str, Any]) -> list[str]:
    from learned_optim.meta_train.reports.runs import duration

    families = (name if count == 1 else f"{count} {name}" for name, count in summary["families"].items())
    steps = f"{summary['meta_steps']}/{summary['of']}"
    best, seconds = _number(summary["best_validation"]), duration(summary["seconds"])
    over = summary["validated_on"]
    return [summary["run"], ", ".join(families), summary["estimator"], steps, best, over, seconds, summary["state"]]


def _show(options: argparse.Namespace) -> None:
    require("train", "pydantic")
    from learned_optim.meta_train.kinds import KINDS
    from learned_optim.meta_train.reports.runs import read_run

    run = read_run(options.folder, KINDS)
    summary, settings = run.summary(), run.changed_settings()
    metrics = {name: values[-1] for name, values in run.metrics().items() if values}
    latest = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if options.json:
        print_json({**summary, "settings": settings, "latest": latest, "sessions": run.sessions})
        return
    parts = {"": summary, "settings that are not the defaults": settings, "latest metrics": latest}
    parts |= {f"session from meta-step {session['meta_step']}": session for session in run.sessions}
    width = max(len(printable(name)) for part in parts.values() for name in part)
    for title, part in parts.items():
        say(f"\n{title}" if title else options.folder)
        for name, value in part.items():
            say(f"  {printable(name):{width}}  {_text(value)}")


def _plot(options: argparse.Namespace) -> None:
    require("demo", "pydantic", "matplotlib")
    from learned_optim.meta_train.kinds import KINDS
    from learned_optim.meta_train.reports.run_plots import plot_run
    from learned_optim.meta_train.reports.run_report import write_report
    from learned_optim.meta_train.reports.runs import find_runs

    if options.output is not None and options.output.suffix not in (".html", ".png"):
        raise CommandError(f"--output must end in .html or .png, got {options.output}")
    if options.png and options.output is not None and options.output.suffix != ".png":
        raise CommandError(f"--png writes a .png, --output is {options.output}")
    runs = find_runs(options.folder, KINDS)
    if options.output is not None and len(runs) > 1:
        raise CommandError(f"--output takes a single run, got {len(runs)}; see also: learned-optim runs compare")
    for run in runs:
        path = options.output or run.folder / ("metrics.png" if options.png else "report.html")
        write = plot_run if path.suffix == ".png" else write_report
        write(run, path)
        say(f"written: {path}")


def _compare(options: argparse.Namespace) -> None:
    require("demo", "pydantic", "matplotlib")
    from learned_optim.meta_train.kinds import KINDS
    from learned_optim.meta_train.reports.run_plots import plot_comparison_of_runs, short_names
    from learned_optim.meta_train.reports.runs import different_settings, find_runs

    runs = find_runs(options.folder, KINDS)
    if len(runs) < 2:
        raise CommandError("name two runs or more, or a folder that holds them")
    settings = different_settings(runs)
    plot_comparison_of_runs(runs, options.output)
    if options.json:
        summaries = [run.summary() for run in runs]
        print_json({"runs": summaries, "settings": settings, "figure": str(options.output)})
        return
    names = short_names([run.folder for run in runs])
    outcomes = {
        name: [run.summary()[name] for run in runs]
        for name in ("meta_steps", "best_validation", "validated_on", "seconds")
    }
    table = {"": names, **settings, **outcomes}
    width = max(14, *(len(name) for name in names))
    print_table([[name, *(_text(value, width).ljust(width) for value in values)] for name, values in table.items()])
    say(f"\nwritten: {options.output}")


def _text(value: Any, width: int = VALUE_WIDTH) -> str:
    text = _number(value) if isinstance(value, float | None) else value if isinstance(value, str) else json.dumps(value)
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
