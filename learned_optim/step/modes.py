"""The modes of torch that a step runs under: autocast, fake tensors, torch.compile and the capture of CUDA graphs."""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from learned_optim.rules import UpdateRule


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which the arithmetic of a step keeps its dtype, even inside an autocast block."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # such as "meta"


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def fake_mode_of(tensor: Tensor) -> FakeTensorMode | None:
    """The mode of a fake tensor, which has a shape and a device but no values; None for a usual tensor."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


def is_known_to_host(value: bool | Tensor) -> bool:
    """Whether the host can read a value without waiting for a device and outside of graphs."""
    return not isinstance(value, Tensor) or (
        value.device.type == "cpu" and not torch.compiler.is_compiling() and fake_mode_of(value) is None
    )


def without_idle_parts(rule: UpdateRule) -> UpdateRule:
    """The rule without what has no effect, whatever fake mode or default device it is made in."""
    with unset_fake_temporarily(), torch.device("cpu"):
        return rule.pruned()


def rule_on(rule: UpdateRule, parameter: Tensor, device: torch.device, dtype: torch.dtype) -> UpdateRule:
    """A copy of the rule on a device and in a dtype; its weights are fake tensors if the parameter is one."""
    mode = fake_mode_of(parameter)
    if mode is None:
        return copy.deepcopy(rule).to(device, dtype)
    with unset_fake_temporarily():
        copied = copy.deepcopy(rule).requires_grad_(False)
        weights = [
            (module, name, parameter.detach())
            for module in copied.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
    with mode:
        for module, name, values in weights:
            fake = mode.from_tensor(values).to(device, dtype)
            module.register_parameter(name, torch.nn.Parameter(fake, requires_grad=False))
    return copied
