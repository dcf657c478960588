"""Whether a fused kernel can run, asked without importing triton."""

import importlib.util

import torch

FUSED_RULES: frozenset[str] = frozenset()
"""Architectures that have a fused kernel. None yet: every rule runs on its plain path."""


def why_not_fused(architecture: str, device: torch.device) -> str | None:
    """The reason why no fused kernel serves this architecture on this device, or None if one does."""
    if architecture not in FUSED_RULES:
        return f"there is no fused kernel for the rule {architecture!r} yet"
    if device.type not in ("cuda", "xpu"):
        return f"fused kernels need a GPU, the parameters are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install learned-optim[gpu])"
    return None
