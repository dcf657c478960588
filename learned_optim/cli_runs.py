"""The command ``learned-optim runs``: meta-training runs as things to look at."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learned_optim.cli_common import CommandError, Commands, need

COLUMNS = ("run", "families", "estimator", "meta-steps", "best", "time", "state")
VALUE_WIDTH = 60  # of settings in a table; longer values are cut


def add_runs(commands: Commands) -> None:
    """Add the sub-command with its actions."""
    runs = commands.add_parser("runs", help="list, show, plot and compare meta-training runs")
    actions = runs.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="one line a run")
    listing.add_argument("folder", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of runs (runs)")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="settings that are not the defaults, outcome, and how the run came about")
    show.add_argument("folder", type=Path, help="of a run")
    show.set_defaults(run=_show)
    plot = actions.add_parser("plot", help="draw everything that was logged, a figure for each run")
    plot.add_argument("folder", nargs="+", type=Path, help="of runs")
    plot.add_argument("--output", type=Path, help="PNG file, for a single run (FOLDER/metrics.png)")
    plot.set_defaults(run=_plot)
    compare = actions.add_parser("compare", help="settings in which runs differ, and their curves in one figure")
    compare.add_argument("folder", nargs="+", type=Path, help="of runs")
    compare.add_argument("--output", type=Path, default=Path("runs.png"), help="PNG file (%(default)s)")
    compare.set_defaults(run=_compare)
    for action in (listing, show, compare):
        action.add_argument("--json", action="store_true", help="print JSON")


def _list(options: argparse.Namespace) -> None:
    need("train", "pydantic")
    from learned_optim.meta_train.runs import find_runs

    summaries = [run.summary() for run in find_runs(options.folder)]
    if options.json:
        print(json.dumps(summaries, indent=2))
        return
    rows = [COLUMNS, *(tuple(_row(summary)) for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(summary: Mapping[str, Any]) -> list[str]:
    families = (name if count == 1 else f"{count} {name}" for name, count in summary["families"].items())
    steps = f"{summary['meta_steps']}/{summary['of']}"
    best, seconds = _number(summary["best_validation"]), _duration(summary["seconds"])
    return [summary["run"], ", ".join(families), summary["estimator"], steps, best, seconds, summary["state"]]


def _show(options: argparse.Namespace) -> None:
    need("train", "pydantic")
    from learned_optim.meta_train.runs import read_run

    run = read_run(options.folder)
    summary, settings = run.summary(), run.changed_settings()
    metrics = {name: values[-1] for name, values in run.metrics().items() if values}
    latest = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if options.json:
        print(json.dumps({**summary, "settings": settings, "latest": latest, "sessions": run.sessions}, indent=2))
        return
    parts = {"": summary, "settings that are not the defaults": settings, "latest metrics": latest}
    parts |= {f"session from meta-step {session['meta_step']}": session for session in run.sessions}
    width = max(len(name) for part in parts.values() for name in part)
    for title, part in parts.items():
        print(f"\n{title}" if title else str(options.folder))
        for name, value in part.items():
            print(f"  {name:{width}}  {_text(value)}")


def _plot(options: argparse.Namespace) -> None:
    need("demo", "pydantic", "matplotlib")
    from learned_optim.meta_train.run_plots import plot_run
    from learned_optim.meta_train.runs import find_runs

    runs = find_runs(options.folder)
    if options.output is not None and len(runs) > 1:
        raise CommandError(f"--output takes a single run, got {len(runs)}; see also: learned-optim runs compare")
    for run in runs:
        path = options.output or run.folder / "metrics.png"
        plot_run(run, path)
        print(f"written: {path}")


def _compare(options: argparse.Namespace) -> None:
    need("demo", "pydantic", "matplotlib")
    from learned_optim.meta_train.run_plots import plot_comparison_of_runs, short_names
    from learned_optim.meta_train.runs import different_settings, find_runs

    runs = find_runs(options.folder)
    if len(runs) < 2:
        raise CommandError("name two runs or more, or a folder that holds them")
    settings = different_settings(runs)
    plot_comparison_of_runs(runs, options.output)
    if options.json:
        summaries = [run.summary() for run in runs]
        print(json.dumps({"runs": summaries, "settings": settings, "figure": str(options.output)}, indent=2))
        return
    names = short_names([run.folder for run in runs])
    outcomes = {name: [run.summary()[name] for run in runs] for name in ("meta_steps", "best_validation", "seconds")}
    table = {"": names, **settings, **outcomes}
    width = max(map(len, table))
    for name, values in table.items():
        print(f"{name:{width}}  {_columns(values, names)}".rstrip())
    print(f"\nwritten: {options.output}")


def _columns(values: Sequence[Any], names: Sequence[str]) -> str:
    width = max(14, *(len(name) for name in names))
    return "  ".join(_text(value, width).ljust(width) for value in values)


def _text(value: Any, width: int = VALUE_WIDTH) -> str:
    text = _number(value) if isinstance(value, float | None) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
