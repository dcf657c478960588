"""Pictures painted in equally many steps: photograph, painting, Adam at its best rate, L-BFGS and the learned rules.

    python -m benchmarks.suites.neural_art          # writes results/neural_art/pictures.png and losses.csv

No rule was meta-trained on these photographs and paintings, but for the first painting; all start from the same noise.
The loss is that of the family ``neural-art``. Adam has the best of its rates on each picture, which takes trying.
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import save_rows
from learned_optim.meta_train.reports.plots import STYLE, save_figure
from learned_optim.meta_train.style_transfer.command import Painting, paint
from learned_optim.meta_train.style_transfer.style import find_neural_art_file
from learned_optim.meta_train.tasks import NeuralArtFamily

RESULTS = ALL_RESULTS / "neural_art"
PICTURES = (("chelsea", "starry_night"), ("coffee", "the_scream"), ("chelsea", "water_lilies"))
"""Photographs (both CC0) and paintings (public domain)."""
PICTURE_SIZE, STEPS = 128, 128
ADAM_RATES = (0.03, 0.1, 0.3, 1.0)
OPTIMIZERS = {"adam": "Adam", "lbfgs": "L-BFGS", "default": "default rule", "lstm-l2l-neural-art": "lstm-l2l"}


class Painted(NamedTuple):
    """A picture and how it came about."""

    loss: float
    rate: float | None
    picture: Image.Image


def painted(content: str, style: str, optimizer: str, rate: float | None) -> Painted:
    """Paint one picture with the settings of the task family."""
    family = NeuralArtFamily()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "picture.png"
        loss = paint(
            Painting(
                find_neural_art_file(f"content/{content}.jpg"),
                find_neural_art_file(f"style/{style}.jpg"),
                out,
                size=PICTURE_SIZE,
                steps=STEPS,
                optimizer=optimizer,
                lr=rate,
                network=family.network,
                style_weight=family.style_weight,
                initial="noise",
            )
        )
        return Painted(loss, rate, Image.open(out).convert("RGB"))


def best(content: str, style: str, optimizer: str) -> Painted:
    """The run with the best rate for Adam; L-BFGS searches its own, the learned rules have none."""
    rates = ADAM_RATES if optimizer == "adam" else (None,)
    return min((painted(content, style, optimizer, rate) for rate in rates), key=lambda result: result.loss)


def square(path: Path) -> Image.Image:
    """A picture's middle, as large as the painted ones show it."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize(
        (PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS
    )


def main() -> None:
    """Paint, draw and write."""
    torch.set_num_threads(1)
    rows: list[tuple[object, ...]] = [("content", "style", "optimizer", "rate", "steps", "loss")]
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(9.6, 1.9 * len(PICTURES)), layout="constrained")
        panels = figure.subplots(len(PICTURES), 2 + len(OPTIMIZERS), squeeze=False)
        for panel in panels.flat:
            panel.set_axis_off()
        for line, (content, style) in zip(panels, PICTURES, strict=True):
            for panel, name in zip(line, (f"content/{content}", f"style/{style}"), strict=False):
                panel.imshow(square(find_neural_art_file(f"{name}.jpg")))
                panel.set_title(name.partition("/")[2].replace("_", " "), fontsize=7.5)
            for panel, (optimizer, title) in zip(line[2:], OPTIMIZERS.items(), strict=True):
                result = best(content, style, optimizer)
                print(content, style, optimizer, result.rate, f"{result.loss:.4f}", flush=True)
                rows.append((content, style, optimizer, result.rate or "", STEPS, f"{result.loss:.6g}"))
                panel.imshow(result.picture.crop(middle(result.picture)))
                panel.set_title(f"{title}: {result.loss:.3f}", fontsize=7.5)
        save_figure(figure, RESULTS / "pictures.png")
    save_rows(RESULTS, "losses", rows, {"size": PICTURE_SIZE, "adam_rates": ADAM_RATES})


def middle(picture: Image.Image) -> tuple[int, int, int, int]:
    """The square in the middle."""
    left, top = (picture.width - PICTURE_SIZE) // 2, (picture.height - PICTURE_SIZE) // 2
    return left, top, left + PICTURE_SIZE, top + PICTURE_SIZE


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
