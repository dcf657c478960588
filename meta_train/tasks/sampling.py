"""Draws that several task families share."""

import numpy as np


def log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A number in ``[low, high]``, its logarithm uniform."""
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def log_uniform_integer(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    """An integer in ``[low, high]``, its logarithm uniform."""
    low, high = bounds
    return min(high, int(log_uniform(rng, (low, high + 1))))
