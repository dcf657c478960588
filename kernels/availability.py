"""Whether fused kernels can run on a device, asked without importing triton."""

import importlib.util

import torch

from learned_optim.kernels.launch import interpreting


def why_not_fused(device: torch.device) -> str | None:
    """The reason why no kernel can run on this device, or None if one can."""
    on_gpu = device.type in ("cuda", "xpu")
    if not on_gpu and not (device.type == "cpu" and interpreting()):
        return f"fused kernels need a GPU, the parameters are on {device}"
    if importlib.util.find_spec("triton") is None:  # takes a while: ask once, not in each step
        return "triton is not installed (pip install learned-optim[gpu])"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return (
            f"triton serves NVIDIA GPUs of compute capability 7.0 and later, not {torch.cuda.get_device_name(device)}"
        )
    return None
