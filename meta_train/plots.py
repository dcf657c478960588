"""Figures: loss against step with bands, one panel a problem."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learned_optim.meta_train.benchmark import Curve

COLOURS = {"Adam": "#4c72b0", "RMSprop": "#8c8c8c", "SGD": "#b8b8b8", "NAG": "#64b5cd"}
LEARNED_COLOURS = ("#c44e52", "#dd8452", "#937860")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}


def plot_comparison(results: Mapping[str, Sequence[Curve]], titles: Mapping[str, str], path: Path) -> None:
    """Draw every problem as a panel of loss curves with bootstrap 95% bands into ``path``, whole or not at all."""
    with mpl.rc_context(STYLE):
        _save(comparison_figure(results, titles), path)


def comparison_figure(results: Mapping[str, Sequence[Curve]], titles: Mapping[str, str]) -> Figure:
    """The figure of :func:`plot_comparison`."""
    columns = 2 if len(results) == 4 else min(3, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (problem, curves) in zip(panels, results.items(), strict=False):
        draw_curves(panel, curves, titles[problem])
    for panel in panels[len(results) :]:
        panel.set_visible(False)
    return figure


def draw_curves(panel: Axes, curves: Sequence[Curve], title: str) -> None:
    """Loss against step for every optimizer of one problem; learned rules in warm colours, on top."""
    learned = iter(LEARNED_COLOURS * len(curves))
    floor = min(float(curve.mean.min()) for curve in curves)
    for curve in curves:
        colour = COLOURS[curve.optimizer] if curve.is_baseline else next(learned)
        steps = range(len(curve.mean))
        width, order = (1.2, 2) if curve.is_baseline else (2.0, 3)
        panel.plot(steps, curve.mean, color=colour, linewidth=width, zorder=order, label=curve.label)
        panel.fill_between(steps, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0, zorder=order)
    start = float(curves[0].mean[0])
    panel.set(title=title, xlabel="step", ylabel="training loss", yscale="log", ylim=(floor * 0.8, start * 2))
    panel.set_xlim(0, len(curves[0].mean) - 1)
    panel.legend(fontsize=7.5)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=150, format=path.suffix.lstrip("."))
    temporary.replace(path)
