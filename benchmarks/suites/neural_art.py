"""Pictures painted in equally many steps: photograph, painting, Adam at its best rate, L-BFGS and the learned rules.

    python -m benchmarks.suites.neural_art          # writes results/neural_art/pictures.png and losses.csv

From noise the loss is that of the family ``neural-art``, from the photograph that of ``learned-optim neural-art``, but
for the features' network, which is the family's. No rule was meta-trained on these photographs and paintings, but for
the first painting. "Adam" has the best of its rates on each picture, which takes trying; "Adam, 0.1" is what the
command takes. Pictures are shown as they come out of noise.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import Row, read, save_rows
from learned_optim.meta_train.reports.plots import STYLE, save_figure
from learned_optim.meta_train.style_transfer.command import DEFAULT_RATES, Painting, paint
from learned_optim.meta_train.style_transfer.style import find_neural_art_file
from learned_optim.meta_train.tasks import NeuralArtFamily

RESULTS = ALL_RESULTS / "neural_art"
PICTURES = (("chelsea", "starry_night"), ("coffee", "the_scream"), ("chelsea", "water_lilies"))
"""Photographs (both CC0) and paintings (public domain)."""
PICTURE_SIZE, STEPS = 128, 128
ADAM_RATES = (0.03, 0.1, 0.3, 1.0)
STARTS = {
    "noise": {"initial": "noise", "style_weight": NeuralArtFamily().style_weight},
    "content": {"initial": "content", "style_weight": Painting.style_weight},
}
"""The first picture -> how it is painted."""
TUNED, USUAL = "Adam, tuned", "Adam, 0.1"
OPTIMIZERS = {
    TUNED: ("adam", ADAM_RATES),
    USUAL: ("adam", (DEFAULT_RATES["adam"],)),
    "L-BFGS": ("lbfgs", (None,)),
    "default": ("default", (None,)),
    "lstm-l2l": ("lstm-l2l-neural-art", (None,)),
    "specialised": ("specialised-neural-art", (None,)),
}
"""Name in tables -> name for the command, and its rates; L-BFGS searches its own, the learned rules have none."""
COLUMNS = ("start", "content", "style", "optimizer", "rate", "steps", "loss", "to_tuned", "to_usual", "seconds")


class Picture(NamedTuple):
    """A picture and how it came about."""

    losses: list[float]
    seconds: float
    rate: float | None
    picture: Image.Image


def painted(start: str, content: str, style: str, optimizer: str, rate: float | None) -> Picture:
    """Paint one picture."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "picture.png"
        losses, seconds = paint(
            Painting(
                find_neural_art_file(f"content/{content}.jpg"),
                find_neural_art_file(f"style/{style}.jpg"),
                out,
                size=PICTURE_SIZE,
                steps=STEPS,
                optimizer=optimizer,
                lr=rate,
                network=NeuralArtFamily().network,
                **STARTS[start],  # type: ignore[arg-type]  # of different types
            )
        )
        return Picture(losses, seconds, rate, Image.open(out).convert("RGB"))


def best(start: str, content: str, style: str, name: str) -> Picture:
    """The run of an optimizer with the best of its rates."""
    optimizer, rates = OPTIMIZERS[name]
    runs = (painted(start, content, style, optimizer, rate) for rate in rates)
    return min(runs, key=lambda run: run.losses[-1])


def steps_to(losses: Sequence[float], loss: float) -> int | None:
    """Steps after which a loss is reached; None if it never is."""
    return next((step for step, each in enumerate(losses) if each <= loss), None)


def table() -> str:
    """From each start: losses over tuned Adam's, and the steps to the losses where Adam ends."""
    rows = read(RESULTS / "losses.csv")
    header = [""]
    for start in ("noise", "photograph"):
        header += [f"from {start}: loss", f"steps to that of {TUNED}", f"of {USUAL}"]
    lines = [header, ["---"] * len(header)]
    for name in OPTIMIZERS:
        line = [name]
        for start in STARTS:
            own = [row for row in rows if (row["start"], row["optimizer"]) == (start, name)]
            tuned = [row for row in rows if (row["start"], row["optimizer"]) == (start, TUNED)]
            line += [mean_ratio(own, tuned, "loss"), *(span(own, to) for to in ("to_tuned", "to_usual"))]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_ratio(rows: Iterable[Row], others: Iterable[Row], column: str) -> str:
    """The geometric mean over pictures of a column over the same of another optimizer, as a table shows it."""
    pairs = zip(rows, others, strict=True)
    return f"{statistics.geometric_mean(float(row[column]) / float(other[column]) for row, other in pairs):.2f}"


def span(rows: Iterable[Row], column: str) -> str:
    """The fewest and the most steps over pictures; a picture whose loss was not reached counts as more than all."""
    steps = sorted(int(row[column]) if row[column] else STEPS + 1 for row in rows)
    fewest, most = (str(each) if each <= STEPS else f"over {STEPS}" for each in (steps[0], steps[-1]))
    return fewest if fewest == most else f"{fewest} to {most}"


def square(path: Path) -> Image.Image:
    """A picture's middle, as large as the painted ones show it."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize(
        (PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS
    )


def paint_all(start: str, content: str, style: str) -> tuple[dict[str, Picture], list[tuple[object, ...]]]:
    """One picture by every optimizer, and the rows about it."""
    runs = {name: best(start, content, style, name) for name in OPTIMIZERS}
    rows: list[tuple[object, ...]] = []
    for name, run in runs.items():
        reached = (steps_to(run.losses, runs[other].losses[-1]) for other in (TUNED, USUAL))
        row = (start, content, style, name, run.rate, STEPS, f"{run.losses[-1]:.6g}", *reached, f"{run.seconds:.2f}")
        rows.append(row)
        print(*row, flush=True)
    return runs, rows


def draw(pictures: Sequence[tuple[str, str, dict[str, Picture]]]) -> None:
    """A row of pictures for each photograph and painting."""
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        shown = [name for name in OPTIMIZERS if name != USUAL]
        figure = Figure(figsize=(11.2, 1.9 * len(pictures)), layout="constrained")
        panels = figure.subplots(len(pictures), 2 + len(shown), squeeze=False)
        for panel in panels.flat:
            panel.set_axis_off()
        for line, (content, style, runs) in zip(panels, pictures, strict=True):
            for panel, name in zip(line, (f"content/{content}", f"style/{style}"), strict=False):
                panel.imshow(square(find_neural_art_file(f"{name}.jpg")))
                panel.set_title(name.partition("/")[2].replace("_", " "), fontsize=7.5)
            for panel, name in zip(line[2:], shown, strict=True):
                panel.imshow(runs[name].picture.crop(middle(runs[name].picture)))
                panel.set_title(f"{name}: {runs[name].losses[-1]:.3f}", fontsize=7.5)
        save_figure(figure, RESULTS / "pictures.png")


def main() -> None:
    """Paint, draw and write."""
    torch.set_num_threads(1)
    rows: list[tuple[object, ...]] = [COLUMNS]
    for start in STARTS:
        found = []
        for content, style in PICTURES:
            runs, lines = paint_all(start, content, style)
            found.append((content, style, runs))
            rows += [tuple("" if value is None else value for value in line) for line in lines]
        if start == "noise":
            draw(found)
    save_rows(RESULTS, "losses", rows, {"size": PICTURE_SIZE, "adam_rates": ADAM_RATES})


def middle(picture: Image.Image) -> tuple[int, int, int, int]:
    """The square in the middle."""
    left, top = (picture.width - PICTURE_SIZE) // 2, (picture.height - PICTURE_SIZE) // 2
    return left, top, left + PICTURE_SIZE, top + PICTURE_SIZE


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
