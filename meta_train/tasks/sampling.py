"""Draws that several task families share."""

import math
from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


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


def check_choices(name: str, chosen: Sequence[str], known: Collection[str]) -> None:
    """Raise ``ValueError`` unless an option names some of the known values, and nothing else."""
    if not chosen or any(value not in known for value in chosen):
        raise ValueError(f"{name} must be some of {', '.join(known)}, got {list(chosen)}")


def check_not_negative(**options: float) -> None:
    """Raise ``ValueError`` if an option is negative or not a number."""
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def check_probability(**options: float) -> None:
    """Raise ``ValueError`` unless each option lies in 0..1."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a probability, got {value}")


def choose(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One of several values, each with the same probability."""
    return values[int(rng.integers(len(values)))]
