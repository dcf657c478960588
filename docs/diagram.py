"""Draw docs/how_it_works.svg: `python docs/diagram.py` (needs matplotlib)."""

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, PALE, RULE, META = "#24292f", "#f6f8fa", "#fff3d6", "#ddf0e3"
PATH = Path(__file__).with_name("how_it_works.svg")


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str = PALE) -> None:
    """A box with its centre at ``(x, y)``; the first line of the text is bold."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec=INK, lw=1.1)
    )
    title, _, rest = text.partition("\n")
    lines = rest.count("\n") + 1 if rest else 0
    axes.text(x, y + 0.13 * lines, title, ha="center", va="center", weight="bold", size=10.5, color=INK)
    if rest:
        axes.text(x, y - 0.17, rest, ha="center", va="center", size=9, color=INK, linespacing=1.3)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str,
    at: tuple[float, float],
    bend: float = 0,
) -> None:
    """An arrow and its label."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, lw=1.3, color=INK, connectionstyle=style)
    )
    axes.text(*at, text, ha="center", va="center", size=9, color=INK, linespacing=1.25)


def draw(axes: Axes) -> None:
    """Training with a rule on the left, meta-training the rule on the right."""
    axes.text(0.2, 4.3, "Training a model", size=13, weight="bold", color=INK)
    box(axes, 1.25, 3.1, 2.1, 1.5, "model\nloss and gradient,\nas always")
    box(axes, 5.0, 3.1, 2.3, 1.5, "rule\na small LSTM, the same\nfor every coordinate", RULE)
    box(axes, 5.0, 0.75, 2.3, 0.9, "state\nof each coordinate")
    arrow(axes, (2.35, 3.4), (3.8, 3.4), "gradient", (3.07, 3.6))
    arrow(axes, (3.8, 2.8), (2.35, 2.8), "update", (3.07, 2.6))
    arrow(axes, (4.7, 2.3), (4.7, 1.25), "", (0, 0))
    arrow(axes, (5.3, 1.25), (5.3, 2.3), "", (0, 0))

    axes.plot([6.75, 6.75], [0.3, 4.4], color="#d0d7de", lw=1)
    axes.text(7.15, 4.3, "Meta-training the rule", size=13, weight="bold", color=INK)
    box(axes, 8.3, 3.1, 2.3, 1.5, "tasks\nmany models at once,\nat all stages of training", META)
    box(axes, 12.3, 3.1, 2.3, 1.5, "meta-loss\nof a window of steps\nthat the rule makes", META)
    box(axes, 10.3, 0.75, 3.3, 0.9, "meta-gradient\nan Adam step for the rule", META)
    arrow(axes, (9.5, 3.1), (11.1, 3.1), "unroll\nthe rule", (10.3, 3.42))
    arrow(axes, (12.3, 2.3), (11.9, 1.25), "", (0, 0))
    arrow(axes, (8.7, 1.25), (8.3, 2.3), "", (0, 0))
    axes.text(12.5, 1.75, "backpropagate\nor perturb", size=9, color=INK, va="center", linespacing=1.25)
    axes.text(8.0, 1.75, "better\nrule", size=9, color=INK, va="center", ha="right", linespacing=1.25)


def main() -> None:
    """Write the figure, the same bytes each time."""
    mpl.rcParams["svg.hashsalt"] = "learned_optim"
    figure = plt.figure(figsize=(10, 3.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 13.7), ylim=(0.1, 4.6))
    axes.axis("off")
    draw(axes)
    figure.savefig(PATH, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
