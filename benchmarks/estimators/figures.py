"""Figures of what benchmarks/estimators/bias_variance.py has measured, drawn from its rows alone."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.colours import ESTIMATORS, colour
from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import read
from learned_optim.meta_train.reports.plots import STYLE

RESULTS = ALL_RESULTS / "estimators"


def columns(rows: Sequence[Mapping[str, str]], key: str, value: str, *names: str) -> list[list[float]]:
    chosen = [row for row in rows if row[key] == value]
    return [[float(row[name]) for row in chosen] for name in names]


def draw() -> None:
    """Draw all figures of the estimators."""
    with mpl.rc_context(STYLE):
        draw_influence()
        draw_toy()
        draw_unrolls()


def save(figure: Figure, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.png", dpi=130)


def draw_influence() -> None:
    rows = read(RESULTS / "influence.csv")
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["estimator"] for row in rows):
        steps, weights, losses = columns(rows, "estimator", name, "meta_step", "weight", "loss_after_500_steps")
        style = "--" if name in ("TBPTT, 10 steps", "ES, 1 step") else "-"
        for panel, values in ((left, losses), (right, weights)):
            panel.plot(steps, values, style, color=colour(name), label=name)
    left.set(xlabel="meta-step", ylabel="loss after 500 steps", yscale="log", title="Influence balancing")
    right.axhline(-1 / 6, color="black", linewidth=0.8, linestyle=":")
    right.annotate("optimum", (2400, -1 / 6), xytext=(0, 4), textcoords="offset points", fontsize=8)
    right.set(xlabel="meta-step", ylabel="meta-parameter", ylim=(-0.5, 3))
    right.legend(*left.get_legend_handles_labels(), fontsize=7.5, loc="lower right", bbox_to_anchor=(1.0, 0.17))
    save(figure, "influence")


def draw_toy() -> None:
    rows, surface = read(RESULTS / "toy.csv"), read(RESULTS / "toy-surface.csv")
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lasts_of_grid = [float(column) for column in list(surface[0])[1:]]
    grid = np.array([[float(value) for value in row.values()] for row in surface])
    firsts_of_grid, sums = grid[:, 0], grid[:, 1:]
    first, last = np.meshgrid(firsts_of_grid, lasts_of_grid, indexing="ij")
    image = left.pcolormesh(first, last, sums, cmap="Greys", vmin=float(sums.min()), vmax=3000, rasterized=True)
    left.grid(visible=False)
    figure.colorbar(image, ax=left, label="sum of losses", extend="max")
    for name in dict.fromkeys(row["estimator"] for row in rows):
        names = ("meta_step", "log_first_rate", "log_last_rate", "sum_of_losses")
        steps, firsts, lasts, losses = columns(rows, "estimator", name, *names)
        left.plot(firsts, lasts, color=colour(name), linewidth=1.6, label=name)
        left.plot(firsts[-1:], lasts[-1:], "o", color=colour(name), markersize=4)
        right.plot(steps, losses, color=colour(name), label=name)
    left.set(xlabel="log of the first rate", ylabel="log of the last rate", title="Rate schedule on a rugged plane")
    right.set(xlabel="meta-step", ylabel="sum of losses over 100 steps")
    right.legend(fontsize=7.5, loc="center right", bbox_to_anchor=(1.0, 0.25))
    save(figure, "toy")


def draw_unrolls() -> None:
    rows = sorted(read(RESULTS / "unrolls.csv"), key=lambda row: int(row["unroll"]))
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name in ESTIMATORS:
        names = ("unroll", "variance_of_a_pair", "relative_bias", "relative_standard_error")
        lengths, variances, biases, errors = columns(rows, "estimator", name, *names)
        if name != "TBPTT":
            left.plot(lengths, variances, "o-", markersize=3, color=colour(name), label=name)
        if name != "combined, paper's weights":
            middle.plot(lengths, biases, "o-", markersize=3, color=colour(name), label=name)
            middle.plot(lengths, errors, ":", linewidth=1.2, color=colour(name))
    left.set(xscale="log", yscale="log", ylim=(1e-3, 1e7), xlabel="unroll length", title="Variance of one pair")
    left.set_ylabel("over the squared norm of the gradient")
    left.legend(fontsize=7)
    middle.set(
        xscale="log",
        yscale="log",
        ylim=(0.08, 30),
        xlabel="unroll length",
        title="Distance of the mean (dotted: its noise)",
    )
    middle.set_ylabel("from the reference, over its norm")
    middle.legend(fontsize=7, loc="upper right", ncols=2)
    for name, estimator in (("with covariance", "combined"), ("paper's", "combined, paper's weights")):
        lengths, means, lows, highs = columns(
            rows, "estimator", estimator, "unroll", "es_weight_mean", "es_weight_low", "es_weight_high"
        )
        right.plot(lengths, means, "o-", markersize=3, color=colour(estimator), label=name)
        right.fill_between(lengths, lows, highs, alpha=0.2, linewidth=0, color=colour(estimator))
    right.set(xscale="log", xlabel="unroll length", ylabel="weight of ES (mean, 10-90%)", title="Combination")
    right.legend(fontsize=7)
    save(figure, "unrolls")
