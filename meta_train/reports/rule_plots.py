"""Figures of what a rule does: its responses to made-up gradients beside Adam's."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learned_optim.files import write_atomically
from learned_optim.meta_train.reports.plots import COLOURS, STYLE
from learned_optim.meta_train.reports.responses import (
    ADAM_RATE,
    MAGNITUDES,
    MEAN_OF_NOISE,
    PAST,
    PRESENT,
    STOP,
    Portrait,
    Responses,
    portrait,
)
from learned_optim.rules import UpdateRule

FORMATS = (".png", ".svg", ".pdf")
PANELS_IN_A_ROW = 4
BINS = 60  # of a logarithmic axis of steps
RULE, ADAM = COLOURS["default"], COLOURS["Adam"]


class PortraitPanel(NamedTuple):
    """One picture of a portrait."""

    title: str
    caption: str
    """A sentence about the panel."""
    draw: Callable[[Axes, Portrait], None]


def plot_rule(rule: UpdateRule | str | Path, path: Path, *, steps: int = 1000, scale: float = 1.0) -> None:
    """Draw what a rule does into ``path``, whole or not at all.

    Args:
        rule: a rule, or what :func:`~learned_optim.load_rule` takes.
        path: file to write; its name ends in one of ``FORMATS``.
        steps: length of the responses.
        scale: factor on all gradients.

    Raises:
        ValueError: another ending; and as :func:`~learned_optim.meta_train.reports.responses.portrait` does.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"the picture's name must end in {', '.join(FORMATS)}, got {path}")
    responses = portrait(rule, steps=steps, scale=scale)
    rows = -(-len(PANELS) // PANELS_IN_A_ROW)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.7 * PANELS_IN_A_ROW, 3.0 * rows), layout="constrained")
        for axes, panel in zip(figure.subplots(rows, PANELS_IN_A_ROW).flat, PANELS, strict=True):
            panel.draw(axes, responses)
            axes.set_title(panel.title)
        of_size = "" if scale == 1 else f"; gradients times {scale:g}"
        figure.suptitle(f"{responses.name} beside Adam at {ADAM_RATE:g}{of_size}")
        image = io.BytesIO()
        figure.savefig(image, dpi=110, format=path.suffix[1:])
    write_atomically(path, image.getvalue())


def binned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps, at even distances on a logarithmic axis, and quartiles around them: ``(bins,)`` and ``(3, bins)``.

    Args:
        values: a value for each step, ``(steps,)`` or ``(steps, samples)``.
    """
    rows = values.reshape(len(values), -1)
    edges = np.unique(np.geomspace(1, len(rows) + 1, BINS + 1).round().astype(int)) - 1
    bins = [slice(begin, end) for begin, end in itertools.pairwise(edges)]
    middles = np.array([(piece.start + 1 + piece.stop) / 2 for piece in bins])
    return middles, np.array([np.quantile(rows[piece], [0.25, 0.5, 0.75]) for piece in bins]).T


def _response(kind: str, label: str) -> Callable[[Axes, Portrait], None]:
    def draw(axes: Axes, responses: Portrait) -> None:
        _length_axis(axes)
        for curves, colour, name in _both(responses):
            steps, (low, median, high) = binned(getattr(curves, kind))
            axes.plot(steps, median, color=colour, label=name)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="step", ylabel=label, xscale="log")
        axes.legend(fontsize=7.5)

    return draw


def _stopped(axes: Axes, responses: Portrait) -> None:
    _length_axis(axes)
    for curves, colour, name in _both(responses):
        values = curves.stopped[STOP // 2 :]
        axes.plot(np.arange(STOP // 2 - STOP, STOP), values, color=colour, label=name)
    axes.axvline(0, color=mpl.rcParams["grid.color"], zorder=1)
    axes.set(xlabel="steps since the last gradient", ylabel="step")
    axes.legend(fontsize=7.5)


def _length_axis(axes: Axes) -> None:
    """Lengths of steps differ by orders of magnitude, and some are negative."""
    axes.set_yscale("symlog", linthresh=ADAM_RATE / 10)
    axes.axhline(0, color=mpl.rcParams["grid.color"], zorder=1)


def _effective_rates(axes: Axes, responses: Portrait) -> None:
    for (kind, rates), style in zip(responses.effective_rates().items(), ("-", ":", "--"), strict=True):
        steps, (_, median, _) = binned(rates)
        axes.plot(steps, median, style, color=RULE, label=kind)
    axes.axhline(ADAM_RATE, color=ADAM, label="Adam")
    axes.set(xlabel="step", ylabel="effective rate", xscale="log", yscale="log")
    axes.legend(fontsize=7.5)


def _magnitudes(axes: Axes, responses: Portrait) -> None:
    for curves, colour, label in _both(responses):
        axes.plot(responses.scale * MAGNITUDES, curves.magnitudes, color=colour, marker=".", label=label)
    axes.set(xlabel="size of the gradients", ylabel="length of late steps", xscale="log", yscale="log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 3, high * 3)  # else a line that is flat has no even ticks
    axes.legend(fontsize=7.5)


def _map(curves_of: Callable[[Portrait], Responses]) -> Callable[[Axes, Portrait], None]:
    def draw(axes: Axes, responses: Portrait) -> None:
        steps = curves_of(responses).map
        largest = float(np.abs(steps).max()) or 1.0
        extent = (float(PRESENT[0]), float(PRESENT[-1]), float(PAST[0]), float(PAST[-1]))
        image = axes.imshow(
            steps,
            origin="lower",
            extent=extent,
            aspect="auto",
            cmap="RdBu_r",
            vmin=-largest,
            vmax=largest,
            interpolation="bilinear",
        )
        if steps.min() < 0 < steps.max():
            axes.contour(PRESENT, PAST, steps, levels=[0], colors="#333333", linewidths=0.8)
        axes.figure.colorbar(image, ax=axes)
        axes.set(xlabel="present gradient", ylabel="mean of past gradients")
        axes.grid(visible=False)

    return draw


def _both(responses: Portrait) -> list[tuple[Responses, str, str]]:
    """Steps with colour and label, the rule's on top."""
    return [(responses.adam, ADAM, "Adam"), (responses.rule, RULE, responses.name)]


PANELS = (
    PortraitPanel(
        "constant gradient", "The step, against the gradient, where that never changes.", _response("constant", "step")
    ),
    PortraitPanel(
        "sign-flipping gradient",
        "The part of the step against the present gradient, where the sign changes at each step.",
        _response("flipping", "step against the gradient"),
    ),
    PortraitPanel(
        "noisy gradient",
        f"The step against the mean of a gradient of mean {MEAN_OF_NOISE:g} and deviation 1: median and quartiles.",
        _response("noisy", "step against the mean"),
    ),
    PortraitPanel(
        "gradient that stops", f"A constant gradient, zero after {STOP} steps: how long it is remembered.", _stopped
    ),
    PortraitPanel(
        "effective rate",
        "The rate at which Adam's step would be as long as the rule's, on the three kinds of gradient.",
        _effective_rates,
    ),
    PortraitPanel(
        "size of the gradient",
        "Root mean square of late steps on noise of many sizes: flat where a rule is scale-free.",
        _magnitudes,
    ),
    PortraitPanel(
        "map of the step",
        "The step (red: against a positive gradient) as a function of the present gradient and of the mean of noisy "
        "past ones; zero on the line. In deviations of the noise.",
        _map(lambda responses: responses.rule),
    ),
    PortraitPanel("map of Adam's step", "The same of Adam.", _map(lambda responses: responses.adam)),
)
