"""Figures and tables of what benchmarks/few_shot.py has measured."""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.few_shot_runs import SHOTS, SINUSOID
from learned_optim.files import write_atomically
from learned_optim.meta_train.reports.plots import STYLE, save_figure

COLOURS = {
    "maml": "#c44e52",
    "fomaml": "#dd8452",
    "meta-sgd": "#8172b3",
    "reptile": "#55a868",
    "leap": "#64b5cd",
    "meta-lstm": "#937860",
    "maml, rule trained too": "#da8bc3",
    "maml, default rule": "#ccb974",
    "pre-training": "#8c8c8c",
    "scratch": "#333333",
}
SHOWN_ERRORS = (0.03, 8.0)  # steps that a start was not trained for can diverge, beyond every scale
DIVERGED = 100.0  # the mean over 600 waves: ten times that of predicting zero, and more
SHOWN_WAVES = ("maml", "meta-sgd", "reptile", "pre-training")
FITS = {"step 0": (":", "#b8b8b8"), "step 1": ("--", "#dd8452"), "step 10": ("-", "#c44e52")}

PAGE = Path(__file__).parents[1] / "docs" / "few-shot.md"
BEGIN, END = "<!-- table of {}, written by benchmarks.few_shot figures -->\n", "<!-- end of the table -->"

Rows = Sequence[Mapping[str, str]]


def draw(folder: Path) -> None:
    """Write every figure and table that there are rows for."""
    with mpl.rc_context(STYLE):
        if rows := read(folder, "sinusoid-*.csv"):
            save_figure(errors(rows), folder / "sinusoid.png")
            save_figure(fitted(folder), folder / "waves.png")
            put_into_page("sine waves", sinusoid_table(rows))
        if rows := read(folder, "combination-*.csv"):
            save_figure(combinations(rows), folder / "combinations.png")
    if any(folder.glob("omniglot-*.csv")):
        put_into_page("Omniglot", omniglot_table(folder))
    if rows := read(folder, "cost.csv"):
        put_into_page("cost", cost_table(rows))


def read(folder: Path, pattern: str) -> list[dict[str, str]]:
    rows = []
    for path in sorted(folder.glob(pattern)):
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


def put_into_page(name: str, table: str) -> None:
    """Replace what lies between the markers in docs/few-shot.md."""
    begin = BEGIN.format(name)
    before, marker, rest = PAGE.read_text().partition(begin)
    if not marker:
        raise ValueError(f"{PAGE} has no line {begin.strip()}")
    write_atomically(PAGE, before + begin + table + END + rest.partition(END)[2])


def errors(rows: Rows) -> Figure:
    """Squared error against gradient steps, a panel for each number of shots."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(SHOTS), sharey=True)
    for panel, shots in zip(panels, SHOTS, strict=True):
        for name in SINUSOID:
            own = [row for row in rows if row["algorithm"] == name and int(row["shots"]) == shots]
            if own:
                curve(panel, own, name)
        panel.set(title=f"{shots} points to learn from", xlabel="gradient steps", yscale="log", ylim=SHOWN_ERRORS)
    panels[0].set_ylabel("mean squared error on new waves")
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=7.5)
    return figure


def curve(panel: Axes, rows: Rows, name: str) -> None:
    steps = [int(row["step"]) for row in rows]
    mean, interval = (np.array([float(row[column]) for row in rows]) for column in ("mse", "interval_95"))
    known = (mean < DIVERGED) & (interval < mean)
    panel.plot(np.array(steps)[known], mean[known], ".-", color=COLOURS[name], label=name)
    low, high = np.where(known, mean - interval, np.nan), np.where(known, mean + interval, np.nan)
    panel.fill_between(steps, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)


def fitted(folder: Path, shots: int = 10) -> Figure:
    """One wave and the curves that are fitted to ten of its points, before and after."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    panels = figure.subplots(1, len(SHOWN_WAVES), sharey=True)
    for panel, name in zip(panels, SHOWN_WAVES, strict=True):
        rows = read(folder, f"waves-{name}-{shots}.csv")
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            if row["wave"] == "0":
                points[row["kind"]].append((float(row["x"]), float(row["y"])))
        if not points:
            panel.set_visible(False)
            continue
        panel.plot(*zip(*points["truth"], strict=True), color="#4c72b0", linewidth=2.5, alpha=0.5, label="wave")
        for kind, (line, colour) in FITS.items():
            label = {"step 0": "before", "step 1": "after 1 step", "step 10": "after 10 steps"}[kind]
            panel.plot(*zip(*points[kind], strict=True), line, color=colour, label=label)
        panel.plot(*zip(*points["support"], strict=True), "k^", markersize=4, label="learned from")
        panel.set(title=name, xlabel="x")
    panels[0].set_ylabel("y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7.5)
    return figure


def sinusoid_table(rows: Rows) -> str:
    """Error after 1 and 10 steps."""
    head = "| | " + " | ".join(f"{shots} points, 1 step | 10 steps" for shots in SHOTS) + " |"
    lines = [head, "| --- |" + " --- |" * (2 * len(SHOTS))]
    cells = {(row["algorithm"], int(row["shots"]), int(row["step"])): float(row["mse"]) for row in rows}
    for name in SINUSOID:
        keys = [(name, shots, step) for shots in SHOTS for step in (1, 10)]
        values = [written(cells.get(key)) for key in keys]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def written(error: float | None) -> str:
    if error is None:
        return "not yet measured"
    return f"{error:.3g}" if error < DIVERGED else "diverges"


def omniglot_table(folder: Path) -> str:
    """Accuracy after 1 and 10 steps, batch norm transductive and not: a line for each training."""
    head = ["", "ways, shots", "meta-steps", "inner steps", "queries", "step 1", "step 10"]
    lines = [f"| {' | '.join([*head, 'step 1, not transductive', 'step 10'])} |", "| --- " * 9 + "|"]
    for path in sorted(folder.glob("omniglot-*.csv"), key=in_order):
        rows = read(folder, path.name)
        details = json.loads(path.with_suffix(".json").read_text())
        config = details["config"]
        trained = "-" if details["meta_step"] is None else f"{config['steps']:,}"
        cells = [rows[0]["algorithm"], f"{rows[0]['ways']}, {rows[0]['shots']}", trained, *setting(config)]
        for batch_norm in ("transductive", "not transductive"):
            steps = {row["step"]: percent(row) for row in rows if row["batch_norm"] == batch_norm}
            if len(steps) == 1:  # features, and nothing to adapt
                steps = {"1": steps["0"]}
            cells += [steps.get(step, "-") for step in ("1", "10")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def setting(config: Mapping[str, Any]) -> tuple[str, str]:
    """Inner steps in meta-training and queries of each class, where the algorithm has them."""
    name = config["algorithm"]["name"]
    return (
        str(config["algorithm"]["steps"]) if name in ("maml", "fomaml", "meta-sgd", "reptile") else "-",
        str(config["task"]["options"].get("queries", 1)) if name in ("maml", "fomaml", "meta-sgd") else "-",
    )


def in_order(path: Path) -> tuple[int, int, str]:
    """Ways, shots and algorithm of ``omniglot-ALGORITHM-WAYS-SHOTS.csv``."""
    algorithm, ways, shots = path.stem.rsplit("-", 2)
    return int(ways), int(shots), algorithm


def percent(row: Mapping[str, str]) -> str:
    return f"{100 * float(row['accuracy']):.1f} ± {100 * float(row['interval_95']):.1f}"


def cost_table(rows: Rows) -> str:
    """Time relative to FOMAML's of the same network and number of steps, and memory."""
    lines = ["| | inner steps | algorithm | time / fomaml | megabytes |", "| --- | --- | --- | --- | --- |"]
    times = {(row["network"], row["inner_steps"], row["algorithm"]): float(row["milliseconds"]) for row in rows}
    for row in rows:
        network, steps, name = row["network"], row["inner_steps"], row["algorithm"]
        ratio = times[network, steps, name] / times[network, steps, "fomaml"]
        lines.append(f"| {network} | {steps} | {name} | {ratio:.2f} | {float(row['megabytes']):.0f} |")
    return "\n".join(lines) + "\n"


def combinations(rows: Rows) -> Figure:
    """Accuracy during meta-training for each combination of inner gradients."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    for name in dict.fromkeys(row["combination"] for row in rows):
        own = [row for row in rows if row["combination"] == name]
        steps, values = ([float(row[column]) for row in own] for column in ("meta_step", "accuracy"))
        panel.plot(steps, [100 * value for value in values], "-" if "+" in name else "--", label=name)
    panel.set(
        xlabel="meta-step", ylabel="validation accuracy, %", title="Omniglot 5-way: inner gradients that move the start"
    )
    panel.legend(fontsize=7.5)
    return figure
