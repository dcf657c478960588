"""Figures of runs: what happened against meta-steps, one panel a quantity."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learned_optim.files import write_atomically
from learned_optim.meta_train.reports.plots import STYLE, legend_above
from learned_optim.meta_train.reports.runs import Run
from learned_optim.terminal import printable

PANELS_IN_A_ROW = 3
LABELS = {"meta_loss": "meta-loss", "validation": "validation score", "grad_norm": "norm of the meta-gradient"}
TITLES = {
    **LABELS,
    "inner_loss": "inner loss at the end of the windows",
    "skipped": "meta-steps skipped",
    "meta_optimizer/lr": "rate of the meta-optimizer",
    "unroll/truncation": "length of the windows",
    "estimator/variance": "variance of the meta-gradient",
    "estimator/es_weight": "weight of ES",
    "estimator/es_variance": "variance of ES",
    "estimator/rp_variance": "variance of reparameterization",
}
UNSMOOTHED = ("meta_optimizer/", "unroll/", "curriculum/horizon")  # known exactly at every step: nothing to smooth
WIDE = 20  # times as large as another: seen together on a logarithmic axis only
Metrics = Mapping[str, Sequence[float]]


def plot_run(run: Run, path: Path) -> None:
    """Draw everything that was logged of a run, apart from what never changed, into ``path``.

    Raises:
        FileNotFoundError: the run has no metrics.
    """
    metrics = run.metrics()
    names = [*LABELS, *(name for name in metrics if "/" in name)]
    drawn = [name for name in names if name in LABELS or len(set(known(metrics, name)[1])) > 1]
    baselines = {"validation": run.baselines}
    _draw(
        [MetricPanel(name, titles(name), {run.folder.name: metrics}, baselines.get(name, {})) for name in drawn], path
    )


def plot_comparison_of_runs(runs: Sequence[Run], path: Path) -> None:
    """Draw meta-loss, validation and norm of the meta-gradient of several runs into ``path``.

    Runs share a panel of the meta-loss if it is of one kind, and one of validation if they were validated on the same
    tasks over as many steps.
    """
    _draw(_panels(runs), path)


class MetricPanel(NamedTuple):
    """The curves in one pair of axes."""

    metric: str
    title: str
    runs: dict[str, Metrics]
    """By the names that the legend gives them."""
    baselines: Mapping[str, float] = {}
    """Scores to compare with, by name."""


def _panels(runs: Sequence[Run]) -> list[MetricPanel]:
    panels: dict[tuple[str, str], MetricPanel] = {}
    for label, run in zip(short_names([run.folder for run in runs]), runs, strict=True):
        metrics = run.metrics()
        kinds = {
            "meta_loss": f" ({run.meta_loss})",
            "validation": f", {run.validated_on()}",
        }
        for name in LABELS:
            title = titles(name) + kinds.get(name, "")
            panels.setdefault((name, title), MetricPanel(name, title, {})).runs[label] = metrics
    return sorted(panels.values(), key=lambda panel: list(LABELS).index(panel.metric))


def short_names(folders: Sequence[Path]) -> list[str]:
    """Names of folders without the parents that all have in common."""
    parts = [folder.resolve().parts for folder in folders]
    common = 0
    while len(parts) > 1 and all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return ["/".join(part[common:]) if len(parts) > 1 else part[-1] for part in parts]


def _draw(panels: Sequence[MetricPanel], path: Path) -> None:
    columns = min(PANELS_IN_A_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.runs))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for place, panel in zip(axes, panels, strict=False):
            curves = [known(metrics, panel.metric)[1] for metrics in panel.runs.values()]
            set_scale(place, [*curves, np.array(list(panel.baselines.values()))])
            for label, metrics in panel.runs.items():
                draw_curve(place, metrics, panel.metric, label, f"C{labels.index(label)}")
            draw_baselines(place, panel.baselines)
            place.set(title=_literal(panel.title), xlabel="meta-step")
        for place in axes[len(panels) :]:
            place.set_visible(False)
        if len(labels) > 1:
            legend_above(figure)
        image = io.BytesIO()
        figure.savefig(image, dpi=150, format="png")
    write_atomically(path, image.getvalue())


def set_scale(panel: Axes, curves: Iterable[np.ndarray]) -> None:
    """A vertical axis on which all these values can be seen: logarithmic where they are of different magnitudes.

    Where some are not positive, it is linear around zero, up to the median magnitude.
    """
    values = np.concatenate([*curves, np.empty(0)])
    magnitudes = np.abs(values[values != 0])
    if len(magnitudes) == 0:
        return
    if (values > 0).all():
        if values.max() > WIDE * values.min():
            panel.set_yscale("log")
    elif magnitudes.max() > WIDE * np.median(magnitudes):
        panel.set_yscale("symlog", linthresh=float(np.median(magnitudes)))


def draw_curve(panel: Axes, metrics: Metrics, name: str, label: str, colour: str | None = None) -> None:
    """One column of a run; one that is noisy from step to step as quartiles over fiftieths of the run."""
    label = _literal(label)
    steps, values = known(metrics, name)
    if len(values) == 0:
        return
    dense = len(values) > len(metrics["meta_step"]) / 2 and not name.startswith(UNSMOOTHED)
    width = max(1, len(values) // 50)
    if not dense or width == 1:
        panel.plot(steps, values, label=label, color=colour, marker="." if len(values) < 40 else None)
        return
    pieces = [slice(begin, begin + width) for begin in range(0, len(values), width)]
    middles = [steps[piece].mean() for piece in pieces]
    low, median, high = np.array([np.quantile(values[piece], [0.25, 0.5, 0.75]) for piece in pieces]).T
    (line,) = panel.plot(middles, median, label=label, color=colour, zorder=3)
    panel.fill_between(middles, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _literal(text: str) -> str:
    """``text`` as matplotlib draws it letter by letter: no formula, and no name that a legend leaves out."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def draw_baselines(panel: Axes, baselines: Mapping[str, float]) -> np.ndarray:
    """Scores that the curve should get below, as broken lines with their names; returns their values."""
    names: dict[float, list[str]] = {}
    for name, score in baselines.items():
        names.setdefault(score, []).append(name)
    for score, alike in names.items():
        line = panel.axhline(score, linestyle="--", linewidth=0.8, color=mpl.rcParams["text.color"])
        line.set_label("_nolegend_")
        panel.annotate(
            ", ".join(alike), (0.99, score), xycoords=panel.get_yaxis_transform(), ha="right", va="bottom", fontsize=7
        )
    return np.array(list(names))


def titles(name: str) -> str:
    """The title of a metric where it is drawn."""
    return TITLES.get(name, name)


def known(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Meta-steps and values of a column, where it is a finite number."""
    steps, values = np.asarray(metrics["meta_step"]), np.asarray(metrics.get(name, ()), dtype=float)
    finite = np.isfinite(values)
    return steps[: len(values)][finite], values[finite]
