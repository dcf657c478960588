"""Checks of pictures that were drawn."""

from pathlib import Path

import numpy as np
from matplotlib import image


def number_of_colours(path: Path | str) -> int:
    """Different pixels of a PNG; fails on a damaged file."""
    pixels = (255 * image.imread(path)).round().astype(np.uint8)  # (height, width, red green blue alpha)
    return len(np.unique(pixels.view(np.uint32)))  # four bytes as one number: rows are slow to compare
