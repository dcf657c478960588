"""The experiments of Andrychowicz et al. 2016: run, drawn in the paper's layout, and as a table.

    python -m benchmarks.suites.l2l_2016 run                          # suite l2l-2016; goes on where it stopped
    python -m benchmarks.suites.l2l_2016 run --problems mnist,mnist-relu  # the rows of the others stay
    python -m benchmarks.suites.l2l_2016 figure                       # drawn again from the rows in results/paper
    python -m benchmarks.tables                         # tables of README.md and docs/reproduction.md

The rows are those of figures 4 to 6 and of the neural art experiment. `run` takes what ``learned-optim benchmark``
writes into results/paper; ``figure.png`` is of this script.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.colours import colour
from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import Curves, merge, read_suite
from learned_optim import cli
from learned_optim.meta_train.reports.plots import STYLE, legend_above, save_figure

RESULTS = ALL_RESULTS / "paper"


class Experiment(NamedTuple):
    """A row of the table and a panel of the figure."""

    title: str
    rule: str
    """Shipped rule that was meta-trained on it, or on the problem that it varies."""
    paper: str
    """Ratio of the final losses of the paper's rule and its best tuned baseline, read off the paper's figures."""
    first_step: int = 0
    """The step at which the panel begins: the paper shows the second hundred steps alone."""


EXPERIMENTS: Mapping[str, Experiment] = {
    "quadratic": Experiment("10-d quadratic, 100 steps", "lstm-l2l-quadratic", "0.79"),
    "mnist": Experiment("MNIST 784-20-10 sigmoid, 100 steps", "lstm-l2l-mnist", "0.76"),
    "mnist-200": Experiment("the same, 200 steps", "lstm-l2l-mnist", "0.81", first_step=100),
    "mnist-40-units": Experiment("MNIST, 40 units", "lstm-l2l-mnist", "0.65"),
    "mnist-2-layers": Experiment("MNIST, 2 layers of 20 units", "lstm-l2l-mnist", "0.46"),
    "mnist-relu": Experiment("MNIST, ReLU", "lstm-l2l-mnist", "7.0"),
    "cifar-10": Experiment("CIFAR-10, convolutional", "lstm-l2l-cifar", "below 1"),
    "cifar-5": Experiment("CIFAR-5", "lstm-l2l-cifar", "below 1"),
    "cifar-2": Experiment("CIFAR-2", "lstm-l2l-cifar", "below 1"),
    "neural-art": Experiment("neural art 64x64, unseen photographs", "lstm-l2l-neural-art", "below 1"),
    "neural-art-new-style": Experiment("128x128, and an unseen style", "lstm-l2l-neural-art", "below 1"),
}
"""The paper's experiments, in its order.

For CIFAR and neural art it prints no figures, but curves that end below the baselines'.
"""


def run(problems: str) -> int:
    """Run the suite, or some of its problems, and draw the figure; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = ["--problems", problems] if problems else []
        status = cli.main(["benchmark", "l2l-2016", *chosen, "--out", folder])
        if status == 0:
            merge(Path(folder), RESULTS, list(EXPERIMENTS))
            save_figure(figure(read_suite(RESULTS).curves), RESULTS / "figure.png")
    return status


def figure(curves: Curves) -> Figure:
    """Three columns as in the paper: basic problems, other architectures, convolutional networks, neural art."""
    shown = [problem for problem in EXPERIMENTS if problem in curves]
    rows = -(-len(shown) // 3)
    with mpl.rc_context(STYLE):
        picture = Figure(figsize=(11, 3.0 * rows), layout="constrained")
        panels = list(picture.subplots(rows, 3, squeeze=False).flat)
        for panel, problem in zip(panels, shown, strict=False):
            draw(panel, EXPERIMENTS[problem], curves[problem])
        for panel in panels[len(shown) :]:
            panel.set_visible(False)
        legend_above(picture)
    return picture


def draw(panel: Axes, experiment: Experiment, curves: Mapping[str, np.ndarray]) -> None:
    """Loss against step, logarithmic; the paper's rule on top."""
    shown = []
    for optimizer, curve in curves.items():
        steps, mean, low, high = curve[curve[:, 0] >= experiment.first_step].T
        learned = optimizer == experiment.rule
        name = "LSTM" if learned else "default rule" if optimizer == "default" else optimizer
        panel.plot(
            steps,
            mean,
            color=colour(optimizer),
            label=name,
            linewidth=2.0 if learned else 1.2,
            zorder=3 if learned else 2,
        )
        panel.fill_between(steps, low, high, color=colour(optimizer), alpha=0.2, linewidth=0)
        shown.append(mean)
    start = max(mean[0] for mean in shown)
    panel.set(title=experiment.title, yscale="log", xlabel="step", ylabel="loss")
    panel.set_xlim(experiment.first_step, steps[-1])
    panel.set_ylim(0.8 * min(mean.min() for mean in shown), start * (1.1 if experiment.first_step else 2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "figure"])
    parser.add_argument("--problems", default="", help="comma-separated; all by default")
    given = parser.parse_args(arguments)
    if given.part == "run":
        return run(given.problems)
    save_figure(figure(read_suite(RESULTS).curves), RESULTS / "figure.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
