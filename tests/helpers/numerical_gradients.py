"""Gradients in NumPy float64: by central differences, and of Gaussian expectations by quadrature."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from helpers.reference import Array, float64


def central_difference(function: Callable[[Array], float], point: ArrayLike, epsilon: float) -> Array:
    """Gradient of a scalar function by (f(x + e) - f(x - e)) / (2 e) in each coordinate, error O(epsilon^2)."""
    point = float64(point)
    gradient = np.empty_like(point)
    for index in np.ndindex(point.shape):
        above, below = point.copy(), point.copy()
        above[index] += epsilon
        below[index] -= epsilon
        gradient[index] = (function(above) - function(below)) / (2.0 * epsilon)
    return gradient


def gaussian_gradient(function: Callable[[Array], Array], point: ArrayLike, sigma: float, nodes: int) -> Array:
    """Gradient at ``point`` ``(n,)`` of E f(point + e), e ~ N(0, sigma^2 I): E f(point + e) e / sigma^2.

    By Gauss-Hermite quadrature on a grid of ``nodes ** n`` points, exact if f times a coordinate is a polynomial of
    degree below ``2 nodes`` in each coordinate. ``function`` maps ``(n, *grid)`` to ``(*grid)``.
    """
    point = float64(point)
    abscissae, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    axes = [abscissae] * len(point)
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    density = functools.reduce(np.multiply.outer, [weights] * len(point))
    values = function(point.reshape(-1, *[1] * len(point)) + sigma * grid)
    return np.array([(density * values * coordinate).sum() / sigma for coordinate in grid])
