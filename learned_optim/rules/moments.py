"""Running moments of gradients, shared by the rules that normalise with them."""

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


def clamped_grad_and_step(grad: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, clamped so that its square is finite, and the step count in its dtype and with as many axes."""
    largest = largest_with_finite_square(grad.dtype)
    grad = grad.clamp(-largest, largest)
    step = step.to(grad.dtype)
    return grad, step.reshape((1,) * (grad.dim() - step.dim()) + step.shape)


def largest_with_finite_square(dtype: torch.dtype) -> float:
    """The magnitude at which gradients are clamped, so that second moments do not overflow."""
    return math.sqrt(torch.finfo(dtype).max) / 2
