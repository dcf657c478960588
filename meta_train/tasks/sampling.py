"""Draws that several task families share."""

import math

import numpy as np


def log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A number in ``[low, high]``, its logarithm uniform."""
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def log_uniform_integer(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    """An integer in ``[low, high]``, its logarithm uniform."""
    low, high = bounds
    return min(high, int(log_uniform(rng, (low, high + 1))))


def check_range(name: str, bounds: tuple[float, float], lowest: float, *, included: bool = True) -> None:
    """Raise ``ValueError`` unless ``lowest <= low <= high`` (or ``lowest < low``) for an option ``(low, high)``."""
    low, high = bounds
    if not lowest <= low <= high < math.inf or (low == lowest and not included):
        sign = "<=" if included else "<"
        raise ValueError(f"{name} must be a range [low, high] with {lowest:g} {sign} low <= high, got {list(bounds)}")
