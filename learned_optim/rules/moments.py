"""Running moments of gradients, shared by the rules that normalise with them."""

import functools
import math

import torch
from torch import Tensor

EPSILON = 1e-12
"""Gradients below this count as zero; its square is still a normal float32."""


def moving_averages(values: Tensor, averages: Tensor, decays: tuple[float, ...], step: Tensor) -> tuple[Tensor, Tensor]:
    """Exponential averages of ``values`` at each of the K ``decays``, and the same without the bias of the zero start.

    ``a <- decay a + (1 - decay) values`` and ``a / (1 - decay ** step)`` (Kingma & Ba 2015, section 3); written so
    that no digits cancel for decays near 1. ``averages`` and both results have the shape ``(K, *coordinates)``.
    """
    new = [average.to(values.dtype).lerp(values, 1 - decay) for average, decay in zip(averages, decays, strict=True)]
    corrected = [
        average / -torch.expm1(step * math.log(decay)) if decay > 0 else average
        for average, decay in zip(new, decays, strict=True)
    ]
    return torch.stack(new), torch.stack(corrected)


def bias_corrections(decays: tuple[float, ...], step: float) -> tuple[float, ...]:
    """Factors that take the bias of the zero start out of averages."""
    return tuple(1 / -math.expm1(step * math.log(decay)) if decay > 0 else 1.0 for decay in decays)


def column(values: tuple[float, ...], like: Tensor) -> Tensor:
    """``values`` as a tensor ``(values, 1)`` of the dtype and device of ``like``; not to be written to."""
    return _kept_column(values, like.dtype, like.device)


@functools.lru_cache(maxsize=64)  # the constants, and those of a step for all of its blocks
def _kept_column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)[:, None]


def largest_with_finite_square(dtype: torch.dtype) -> float:
    """Gradients are cut at this magnitude, so that second moments do not overflow."""
    return math.sqrt(torch.finfo(dtype).max) / 2
