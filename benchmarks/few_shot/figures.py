"""Figures of what benchmarks/few_shot/run.py has measured, drawn from its rows alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.colours import colour
from benchmarks.few_shot.tables import DIVERGED
from benchmarks.few_shot.trainings import SHOTS, SINUSOID
from benchmarks.results import read
from learned_optim.meta_train.reports.plots import STYLE, save_figure

SHOWN_ERRORS = (0.03, 8.0)  # steps that a start was not trained for can diverge, beyond every scale
SHOWN_SHOTS = 10
SHOWN_WAVES = ("maml", "meta-sgd", "reptile", "pre-training")
FITS = {"step 0": (":", "#b8b8b8"), "step 1": ("--", "#dd8452"), "step 10": ("-", "#c44e52")}

Rows = Sequence[Mapping[str, str]]


def draw(folder: Path) -> None:
    """Write every figure that there are rows for."""
    with mpl.rc_context(STYLE):
        if rows := read(folder / "sinusoid.csv"):
            save_figure(errors(rows), folder / "sinusoid.png")
            save_figure(fitted(read(folder / "waves.csv")), folder / "waves.png")
        if rows := read(folder / "combinations.csv"):
            save_figure(combinations(rows), folder / "combinations.png")


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
    panel.plot(np.array(steps)[known], mean[known], ".-", color=colour(name), label=name)
    low, high = np.where(known, mean - interval, np.nan), np.where(known, mean + interval, np.nan)
    panel.fill_between(steps, low, high, color=colour(name), alpha=0.2, linewidth=0)


def fitted(rows: Rows) -> Figure:
    """One wave and the curves that are fitted to ten of its points, before and after."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    panels = figure.subplots(1, len(SHOWN_WAVES), sharey=True)
    for panel, name in zip(panels, SHOWN_WAVES, strict=True):
        own = [row for row in rows if row["algorithm"] == name]
        if not own:
            panel.set_visible(False)
            continue
        panel.plot(*points(own, "truth"), color="#4c72b0", linewidth=2.5, alpha=0.5, label="wave")
        for kind, (line, shade) in FITS.items():
            label = {"step 0": "before", "step 1": "after 1 step", "step 10": "after 10 steps"}[kind]
            panel.plot(*points(own, kind), line, color=shade, label=label)
        panel.plot(*points(own, "support"), "k^", markersize=4, label="learned from")
        panel.set(title=name, xlabel="x")
    panels[0].set_ylabel("y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7.5)
    return figure


def points(rows: Rows, kind: str) -> tuple[list[float], list[float]]:
    """Coordinates of those rows that have the column."""
    own = [row for row in rows if row[kind]]
    return [float(row["x"]) for row in own], [float(row[kind]) for row in own]


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
