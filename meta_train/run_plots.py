"""Figures of runs: what happened against meta-steps, one panel a quantity."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learned_optim.files import write_atomically
from learned_optim.meta_train.plots import STYLE
from learned_optim.meta_train.runs import Run

COLUMNS = 3
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
PLAIN = ("meta_optimizer/", "unroll/", "curriculum/horizon")  # known exactly at every step: nothing to smooth
Metrics = Mapping[str, Sequence[float]]


def plot_run(run: Run, path: Path) -> None:
    """Draw everything that was logged of a run, apart from what never changed, into ``path``.

    Raises:
        FileNotFoundError: the run has no metrics.
    """
    metrics = run.metrics()
    names = [*LABELS, *(name for name in metrics if "/" in name)]
    drawn = [name for name in names if name in LABELS or len(set(known(metrics, name)[1])) > 1]
    _draw([Panel(name, titles(name), {run.folder.name: metrics}) for name in drawn], path)


def plot_comparison_of_runs(runs: Sequence[Run], path: Path) -> None:
    """Draw meta-loss, validation and norm of the meta-gradient of several runs into ``path``.

    Runs share a panel of validation if they were validated on the same tasks over as many steps.
    """
    names = short_names([run.folder for run in runs])
    metrics = {name: run.metrics() for name, run in zip(names, runs, strict=True)}
    validated: dict[str, dict[str, Metrics]] = {}
    for name, run in zip(names, runs, strict=True):
        validated.setdefault(run.validated_on(), {})[name] = metrics[name]
    panels = [Panel("meta_loss", titles("meta_loss"), metrics)]
    panels += [Panel("validation", f"{titles('validation')}, {on}", group) for on, group in validated.items()]
    _draw([*panels, Panel("grad_norm", titles("grad_norm"), metrics)], path)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Names of folders without the parents that all have in common."""
    parts = [folder.resolve().parts for folder in folders]
    common = 0
    while len(parts) > 1 and all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return ["/".join(part[common:]) if len(parts) > 1 else part[-1] for part in parts]


class Panel(NamedTuple):
    """What is drawn into one pair of axes."""

    metric: str
    title: str
    runs: Mapping[str, Metrics]
    """By the names that the legend gives them."""


def _draw(panels: Sequence[Panel], path: Path) -> None:
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        colours = {name: f"C{place}" for place, name in enumerate(panels[0].runs)}
        for place, panel in zip(axes, panels, strict=False):
            for run, metrics in panel.runs.items():
                draw_curve(place, metrics, panel.metric, run, color=colours[run])
            set_scale(place, [known(metrics, panel.metric)[1] for metrics in panel.runs.values()])
            place.set(title=panel.title, xlabel="meta-step")
            if len(colours) > 1:
                place.legend(fontsize=7.5)
        for place in axes[len(panels) :]:
            place.set_visible(False)
        image = io.BytesIO()
        figure.savefig(image, dpi=150, format="png")
    write_atomically(path, image.getvalue())


def set_scale(panel: Axes, curves: Sequence[np.ndarray]) -> None:
    """A logarithmic axis where values of different size are all positive; others would not be seen on it."""
    values = np.concatenate(curves) if curves else np.empty(0)
    if len(values) > 0 and values.min() > 0 and values.max() > 20 * values.min():
        panel.set_yscale("log")


def draw_curve(panel: Axes, metrics: Metrics, name: str, label: str, color: str | None = None) -> None:
    """One column of a run; one that is noisy from step to step as quartiles over fiftieths of the run."""
    steps, values = known(metrics, name)
    if len(values) == 0:
        return
    dense = len(values) > len(metrics["meta_step"]) / 2 and not name.startswith(PLAIN)
    width = max(1, len(values) // 50)
    if not dense or width == 1:
        panel.plot(steps, values, label=label, color=color, marker="." if len(values) < 40 else None)
        return
    pieces = [slice(begin, begin + width) for begin in range(0, len(values), width)]
    middles = [steps[piece].mean() for piece in pieces]
    low, median, high = np.array([np.quantile(values[piece], [0.25, 0.5, 0.75]) for piece in pieces]).T
    (line,) = panel.plot(middles, median, label=label, color=color, zorder=3)
    panel.fill_between(middles, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def titles(name: str) -> str:
    """What a metric is called where it is drawn."""
    return TITLES.get(name, name)


def known(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Meta-steps and values of a column, where it is a finite number."""
    steps, values = np.asarray(metrics["meta_step"]), np.asarray(metrics.get(name, ()), dtype=float)
    finite = np.isfinite(values)
    return steps[: len(values)][finite], values[finite]
