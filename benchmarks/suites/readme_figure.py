"""The figure at the top of the README: loss over steps on four kinds of network, from the rows of ``generalization``.

``python -m benchmarks.suites.figures readme`` draws ``benchmarks/results/readme.png``.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.colours import colour
from benchmarks.results import RESULTS, Curves, read_suite
from benchmarks.suites.wide import SCHEDULED, UNTUNED
from learned_optim.meta_train.reports.plots import STYLE, legend_above

PATH = RESULTS / "readme.png"
ROWS = "Rows"  # entry of the picture's metadata
PANELS = {
    "fashion-mnist": "perceptron, images",
    "conv-net": "convolutional network, images",
    "residual": "residual network, images",
    "transformer": "transformer, text",
}
"""Problem of the suite -> title."""
SHOWN = {
    "default": "learned_optim, nothing set",
    SCHEDULED: "AdamW, tuned rate and cosine",
    "Adam": "Adam, tuned rate",
    UNTUNED: "Adam, 0.001",
}
"""Optimizer -> its name in the legend, best first."""
POINTS = 4  # of the rows, 5 steps each, that are averaged for one that is drawn
FIRST = 60  # step whose loss is the highest that is shown
TICKS = (0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0)


def figure(curves: Curves) -> Figure:
    """Two times two panels: mean training loss of 20 steps, logarithmic, with bootstrap 95% bands over seeds."""
    with mpl.rc_context(STYLE | {"font.size": 10}):
        picture = Figure(figsize=(9.0, 6.2), layout="constrained")  # 900 pixels wide at README size
        for panel, (problem, title) in zip(picture.subplots(2, 2).flat, PANELS.items(), strict=True):
            draw(panel, curves[problem])
            panel.set_title(title)
        legend_above(picture)
    return picture


def draw(panel: Axes, curves: Mapping[str, np.ndarray]) -> None:
    """The curves of one problem; the learned rule on top."""
    lowest, highest = np.inf, 0.0
    for optimizer, name in reversed(SHOWN.items()):
        steps, mean, low, high = coarser(curves[optimizer]).T
        shade, width = colour(optimizer), 2.4 if optimizer == "default" else 1.6
        line = ":" if optimizer == UNTUNED else "-"  # dots on top are seen where the tuned rate is the same
        order = {"default": 3, UNTUNED: 2.5}.get(optimizer, 2)
        panel.plot(steps, mean, line, label=name, linewidth=width, zorder=order, color=shade)
        panel.fill_between(steps, low, high, alpha=0.2, linewidth=0, color=shade)
        lowest, highest = min(lowest, float(low.min())), max(highest, float(mean[steps >= FIRST][0]))
    ticks = [tick for tick in TICKS if lowest <= tick <= highest]
    panel.set(xlabel="step", ylabel="training loss", yscale="log", xlim=(0, steps[-1]), ylim=(0.97 * lowest, highest))
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()


def coarser(curve: np.ndarray, points: int = POINTS) -> np.ndarray:
    """The curve at its first step and, after it, means of so many points at the last of their steps."""
    rest = curve[1:]
    rest = rest[: len(rest) // points * points].reshape(-1, points, curve.shape[1])
    means = rest.mean(1)
    means[:, 0] = rest[:, -1, 0]
    return np.concatenate([curve[:1], means])


def digest(curves: Curves) -> str:
    """A hash of the rows that are drawn, which the picture carries: a test compares it with the committed ones."""
    shown = [curves[problem][optimizer].tolist() for problem in PANELS for optimizer in SHOWN]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def save(path: Path = PATH) -> None:
    """Draw it from the committed rows."""
    curves = read_suite(RESULTS / "generalization").curves
    figure(curves).savefig(path, dpi=150, metadata={ROWS: digest(curves)})
