"""The kind of kernel that serves a device: compiled C, Triton, or Triton in its interpreter."""

import os

import torch

GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of parameters, gradients and state that kernels in Triton read and write."""
CPU_DTYPES = (*GPU_DTYPES, torch.float64)
"""Dtypes that kernels in C read and write."""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_c(device: torch.device) -> bool:
    """Whether the kernels of a device are written in C, not in Triton."""
    return device.type == "cpu" and not interpreting()


def supported_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that the kernels of a device read and write."""
    return CPU_DTYPES if uses_c(device) else GPU_DTYPES
