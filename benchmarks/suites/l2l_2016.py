"""The experiments of Andrychowicz et al. 2016: run, drawn in the paper's layout, and as a table.

    python -m benchmarks.suites.l2l_2016 run                          # suite l2l-2016; goes on where it stopped
    python -m benchmarks.suites.l2l_2016 run --problems mnist,mnist-relu  # the rows of the others stay
    python -m benchmarks.suites.rerun paper specialised-cifar --problems cifar-10,cifar-5,cifar-2  # of a new rule
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


DEFAULT = "default"
PAPER_RULE = "LSTM"
"""The name of the paper's rule in its figures."""


def published(rule: float, adam: float, rmsprop: float, nag: float, sgd: float) -> Mapping[str, float]:
    """Losses of one of the paper's panels, by the names that optimizers have here."""
    return {PAPER_RULE: rule, "Adam": adam, "RMSprop": rmsprop, "NAG": nag, "SGD": sgd}


class Experiment(NamedTuple):
    """A row of the tables and a panel of the figure."""

    title: str
    kind: str
    """What its rules were meta-trained on: this experiment, or the one that it varies."""
    published: Mapping[str, float] = {}
    """Losses at the last steps, read off the paper's figures to 5 or 10 percent. Empty where no figures were read: the
    paper shows curves that end below those of the baselines."""
    first_step: int = 0
    """The step at which the panel begins: the paper shows the second hundred steps alone."""

    @property
    def rule(self) -> str:
        """The shipped rule of the paper's architecture."""
        return f"lstm-l2l-{self.kind}"

    @property
    def specialised(self) -> str:
        """The rule of the default's architecture that was meta-trained on the same tasks."""
        return f"specialised-{self.kind}"

    @property
    def learned(self) -> Mapping[str, str]:
        """Name of a rule in the rows -> what legends call it."""
        return {
            self.rule: "lstm-l2l (the paper's architecture)",
            self.specialised: "specialised (the default's architecture)",
            DEFAULT: "default rule",
        }


FITTED = "-fitted"
"""The end of the names of problems that start where the paper's networks seem to have started."""
NETWORKS: Mapping[str, Experiment] = {
    "mnist": Experiment("MNIST 784-20-10 sigmoid, 100 steps", "mnist", published(0.26, 0.37, 0.36, 0.34, 0.47)),
    "mnist-200": Experiment("the same, 200 steps", "mnist", published(0.21, 0.31, 0.29, 0.26, 0.33), first_step=100),
    "mnist-40-units": Experiment("MNIST, 40 units", "mnist", published(0.20, 0.33, 0.32, 0.31, 0.45)),
    "mnist-2-layers": Experiment("MNIST, 2 layers of 20 units", "mnist", published(0.33, 0.72, 0.75, 0.77, 1.78)),
    "mnist-relu": Experiment("MNIST, ReLU", "mnist", published(2.6, 0.37, 0.40, 0.37, 0.45)),
}
"""Those on perceptrons, which are run from two starts."""
EXPERIMENTS: Mapping[str, Experiment] = {
    "quadratic": Experiment("10-d quadratic, 100 steps", "quadratic", published(0.041, 0.052, 0.061, 0.082, 0.22)),
    **NETWORKS,
    **{f"{name}{FITTED}": each._replace(title=f"{each.title}, fitted start") for name, each in NETWORKS.items()},
    "cifar-10": Experiment("CIFAR-10, convolutional", "cifar"),
    "cifar-5": Experiment("CIFAR-5", "cifar"),
    "cifar-2": Experiment("CIFAR-2", "cifar"),
    "neural-art": Experiment("neural art 64x64, unseen photographs", "neural-art"),
    "neural-art-new-style": Experiment("128x128, and an unseen style", "neural-art"),
}
"""The paper's experiments, in its order."""


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
    """Loss against step, logarithmic; learned rules on top, and above the panel the names of those of its kind."""
    shown, own = [], experiment.learned
    for optimizer, curve in curves.items():
        steps, mean, low, high = curve[curve[:, 0] >= experiment.first_step].T
        panel.plot(
            steps,
            mean,
            color=colour(optimizer),
            label=own.get(optimizer, optimizer),
            linewidth=2.0 if optimizer in own else 1.2,
            zorder=3 if optimizer in own else 2,
        )
        panel.fill_between(steps, low, high, color=colour(optimizer), alpha=0.2, linewidth=0)
        shown.append(mean)
    start = max(mean[0] for mean in shown)
    names = ", ".join(optimizer for optimizer in curves if optimizer in own and optimizer != DEFAULT)
    above = panel.annotate(names, (0.5, 1.0), (0, 3), xycoords="axes fraction", textcoords="offset points")
    above.set(ha="center", va="bottom", fontsize=7, color="#666666")
    panel.set(yscale="log", xlabel="step", ylabel="loss")
    panel.set_title(experiment.title, pad=15)  # above that line
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
