"""Whether fused kernels can run on a device, found out without importing triton."""

import importlib.util

import torch

from learned_optim.kernels.cpu.kernel import compiler_unavailable_reason
from learned_optim.kernels.devices import uses_c


def unavailable_reason(device: torch.device) -> str | None:
    """The reason why no kernel can run on this device, or None if one can."""
    if uses_c(device):
        return compiler_unavailable_reason()
    if device.type not in ("cuda", "xpu", "cpu"):
        return f"fused kernels need a GPU or a CPU, the parameters are on {device}"
    if importlib.util.find_spec("triton") is None:  # takes a while: ask once, not in each step
        return "triton is not installed (pip install learned-optim[gpu])"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return (
            f"triton serves NVIDIA GPUs of compute capability 7.0 and later, not {torch.cuda.get_device_name(device)}"
        )
    return None
