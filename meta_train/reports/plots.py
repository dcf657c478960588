"""Figures of a benchmark: loss curves with bands, speed-ups problem by problem, performance profile."""

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learned_optim.meta_train.benchmark.contenders import REFERENCE
from learned_optim.meta_train.benchmark.report import Results, is_timed, reference_of
from learned_optim.meta_train.benchmark.scores import Result, problem_speedups
from learned_optim.meta_train.inner.speedups import FASTEST, SLOWEST

COLOURS = {
    "Adam": "#4c72b0",
    "AdamW": "#8172b3",
    "AdamW-cosine": "#ccb974",
    "RMSprop": "#8c8c8c",
    "SGD": "#b8b8b8",
    "Momentum": "#55a868",
    "NAG": "#64b5cd",
    "Schedule-Free": "#1b7837",
    "Schedule-Free@0.0025": "#1b7837",
    "Schedule-Free@0.01": "#7fbf7b",
    "Prodigy": "#542788",
    "Prodigy@1": "#542788",
    "D-Adaptation": "#b2abd2",
    "D-Adaptation@1": "#b2abd2",
    "Muon": "#01665e",
    "Muon@0.003": "#35978f",
    "Muon@0.01": "#01665e",
    "SOAP": "#2166ac",
    "SOAP@0.003": "#2166ac",
    "AdEMAMix": "#92c5de",
    "AdEMAMix@0.001": "#92c5de",
    "AdamW-cosine+decay": "#8c7a2f",
    "AdamW-linear+decay": "#5c5020",
    "default": "#c44e52",
    "lstm-l2l": "#dd8452",
    "specialised": "#b5179e",
}
"""Contender -> its colour in every figure, of a rival as it comes by its rate; learned rules have the warm ones."""
OTHER_COLOUR = "#333333"  # of a baseline at a given rate
TITLE_WIDTH, RATES_WIDTH = 38, 64  # letters that fit over a panel
RATES_HEIGHT = 9  # points of a line of rates
LEGEND_WIDTH = 1.4  # inches of an entry
LEARNED_COLOURS = ("#937860", "#da8bc3", "#8c564b")  # of rules that have none of their own, in turn
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}


Shown = Literal["steps", "seconds", "held out"]
"""What a loss curve shows: training loss against steps or seconds, or loss on data held out against steps."""


def plot_all(results: Results, folder: Path) -> list[Path]:
    """Draw ``comparison``, ``speedup`` and ``profile`` as PNG files; ``held_out`` and ``seconds`` where measured."""
    speeds = speeds_of(results)
    figures: dict[str, Callable[[], Figure]] = {
        "comparison": lambda: comparison_figure(results),
        "speedup": lambda: speedup_figure(speeds),
        "profile": lambda: profile_figure(speeds),
    }
    holding = {name: group for name, group in results.items() if any(each.held_out is not None for each in group)}
    if holding:
        figures["held_out"] = lambda: comparison_figure(holding, "held out")
    if is_timed(results):
        figures["seconds"] = lambda: comparison_figure(results, "seconds")
    with mpl.rc_context(STYLE):
        for name, draw in figures.items():
            save_figure(draw(), folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def comparison_figure(results: Results, shown: Shown = "steps") -> Figure:
    """Every problem as a panel of loss curves with bootstrap 95% bands."""
    columns = 2 if len(results) == 4 else min(3, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, group in zip(panels, results.values(), strict=False):
        draw_curves(panel, group, shown)
    for panel in panels[len(results) :]:
        panel.set_visible(False)
    legend_above(figure)
    return figure


def legend_above(figure: Figure) -> None:
    """One legend for all panels, where it covers no curve."""
    lines: dict[str, Artist] = {}
    for panel in figure.axes:
        lines |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    columns = max(1, min(len(lines), int(figure.get_figwidth() / LEGEND_WIDTH)))
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=columns)


def draw_curves(panel: Axes, group: Sequence[Result], shown: Shown = "steps") -> None:
    """Loss of every optimizer of one problem; learned rules in warm colours, on top. Tuned rates stand above.

    A dot marks the lowest loss on data held out.
    """
    colours = _colours(group)
    floor, start, end = math.inf, 0.0, 0.0
    for result in group:
        if shown == "seconds" and result.timing is None:
            continue
        steps, mean, low, high = result.held_out_curve if shown == "held out" else result.curve
        cost = result.timing.step if shown == "seconds" and result.timing is not None else 1.0
        width, order = (2.0, 3) if result.is_rule else (1.2, 2)
        colour = colours[result.optimizer]
        panel.plot(steps * cost, mean, color=colour, linewidth=width, zorder=order, label=result.optimizer)
        panel.fill_between(steps * cost, low, high, color=colour, alpha=0.2, linewidth=0, zorder=order)
        if shown == "held out":
            panel.plot(steps[mean.argmin()], mean.min(), "o", color=colour, markersize=4, zorder=order)
        finite = mean[np.isfinite(mean) & (mean > 0)]
        floor, start = min([floor, *finite]), max([start, *finite[:1]])
        end = max(end, steps[-1] * cost) if shown != "seconds" or result.optimizer == REFERENCE else end
    if math.isfinite(floor):  # else nothing can be drawn on a logarithmic axis
        panel.set(yscale="log", ylim=(floor * 0.8, start * 2))
    title = textwrap.fill(group[0].problem.label, TITLE_WIDTH)
    rates = ", ".join(f"{result.optimizer} {result.rate:g}" for result in group if result.is_tuned)
    if rates:
        rates = textwrap.fill(f"lr: {rates}", RATES_WIDTH)
        above = panel.annotate(rates, (0.5, 1.0), (0, 3), xycoords="axes fraction", textcoords="offset points")
        above.set(ha="center", va="bottom", fontsize=7, color="#666666")
    panel.set_title(title, pad=6 + RATES_HEIGHT * (1 + rates.count("\n")) if rates else None)
    panel.set(ylabel="held-out loss" if shown == "held out" else "training loss")
    panel.set(xlabel="seconds" if shown == "seconds" else "step")
    panel.set_xlim(0, end)


class Speed(NamedTuple):
    """A speed-up over tuned Adam on one problem, with the edges of its bootstrap 95% band."""

    optimizer: str
    is_rule: bool
    factor: float
    low: float
    high: float


Speeds = Mapping[str, Sequence[Speed]]
"""Label of a problem -> what its optimizers did, tuned Adam among them."""


def speeds_of(results: Results) -> dict[str, list[Speed]]:
    """Speed-ups of all results."""
    speeds: dict[str, list[Speed]] = {}
    for group in results.values():
        reference = reference_of(group)
        for result in group:
            factor, *resampled = problem_speedups(result, reference)
            low, high = np.quantile(resampled, [0.025, 0.975])
            speed = Speed(result.optimizer, result.is_rule, float(factor), float(low), float(high))
            speeds.setdefault(result.problem.label, []).append(speed)
    return speeds


def speedup_figure(speeds: Speeds) -> Figure:
    """Speed-up over tuned Adam on each problem, with bands."""
    figure = Figure(figsize=(9.0, 1.2 + 0.45 * len(speeds)), layout="constrained")
    panel = figure.subplots()
    colours = _colours(itertools.chain(*speeds.values()))
    shown = [name for name in colours if name != REFERENCE]
    offsets = dict(zip(shown, np.linspace(-0.3, 0.3, len(shown)) if len(shown) > 1 else [0.0], strict=True))
    labels: set[str] = set()
    for row, group in enumerate(speeds.values()):
        if row % 2:
            panel.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", linewidth=0, zorder=0)
        for speed in group:
            if speed.optimizer == REFERENCE:
                continue
            place = row + offsets[speed.optimizer]
            colour = colours[speed.optimizer]
            label = speed.optimizer if speed.optimizer not in labels else None
            labels.add(speed.optimizer)
            panel.plot([speed.low, speed.high], [place, place], color=colour, alpha=0.5)
            panel.plot(speed.factor, place, "o" if speed.is_rule else ".", color=colour, label=label, zorder=3)
    panel.axvline(1, color=COLOURS[REFERENCE], linewidth=1)
    name = panel.annotate(f"tuned {REFERENCE}", (1, 1), (0, 2), ("data", "axes fraction"), "offset points")
    name.set(ha="center", va="bottom", fontsize=7.5, color=COLOURS[REFERENCE])
    panel.set_yticks(range(len(speeds)), list(speeds))
    panel.set_ylim(len(speeds) - 0.5, -0.5)
    panel.grid(axis="y", visible=False)
    _speed_axis(panel)
    figure.legend(loc="outside right upper", fontsize=7.5)
    return figure


def profile_figure(speeds: Speeds) -> Figure:
    """Share of the problems on which an optimizer is at least so many times as fast as tuned Adam."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    panel = figure.subplots()
    reached: dict[str, list[float]] = {}
    learned = set()
    for speed in itertools.chain(*speeds.values()):
        reached.setdefault(speed.optimizer, []).append(speed.factor)
        learned |= {speed.optimizer} if speed.is_rule else set()
    factors = np.geomspace(SLOWEST, FASTEST, 400)
    for name, colour in _colours(itertools.chain(*speeds.values())).items():
        shares = [np.mean(np.array(reached[name]) >= factor * (1 - 1e-9)) for factor in factors]
        panel.plot(factors, shares, color=colour, linewidth=2.0 if name in learned else 1.2, label=name)
    panel.set(ylabel="share of problems", ylim=(-0.02, 1.05))
    _speed_axis(panel, "at least this many times as fast as tuned Adam (steps)")
    panel.legend(fontsize=7.5)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=150, format=path.suffix.lstrip("."))
    temporary.replace(path)


def _speed_axis(panel: Axes, label: str = "speed-up over tuned Adam (steps)") -> None:
    panel.set(xscale="log", xlim=(SLOWEST * 0.95, FASTEST * 1.05), xlabel=label)
    ticks = [0.25, 0.5, 1, 2, 4, 10]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()


def colour_of(optimizer: str) -> str | None:
    """The colour that an optimizer has in every figure; None if it has none of its own."""
    family = next((kind for kind in ("lstm-l2l", "specialised") if optimizer.startswith(kind)), optimizer)
    return COLOURS.get(family)


def _colours(results: Iterable[Result] | Iterable[Speed]) -> dict[str, str]:
    """Optimizer -> colour, in the order of the results."""
    learned = itertools.cycle(LEARNED_COLOURS)
    colours: dict[str, str] = {}
    for result in results:
        name = result.optimizer
        if name not in colours:
            colours[name] = colour_of(name) or (next(learned) if result.is_rule else OTHER_COLOUR)
    return colours
