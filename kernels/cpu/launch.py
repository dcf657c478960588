"""The call of a rule's kernel in C: tensors as a table of addresses, and settings as a structure of C."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from learned_optim.kernels.addresses import FREED_MEMORY
from learned_optim.kernels.cpu.kernel import Arguments, Kernel, kernel
from learned_optim.kernels.slots import Columns, StepSettings
from learned_optim.kernels.sources.registry import registered

_zero_and_one = np.arange(2, dtype=np.float32)
ADDRESS_OF_ZERO = _zero_and_one.ctypes.data
"""Address of the number 0: the rule does not see the parameter."""
ADDRESS_OF_ONE = ADDRESS_OF_ZERO + _zero_and_one.itemsize
"""Address of the number 1: the rule sees the parameter, and the scale of a tensor that has none."""
FIXED_COLUMNS = 7
"""Columns of the table before the addresses of parameter, gradient and state: the fields of ``Tensor`` in ``cpu.c``.
There, and so in the table, a rule without state has one entry, which is not used."""


def launch_c(key: str, weights: Tensor, columns: Columns, settings: StepSettings) -> None:
    """Step contiguous tensors of the CPU in place.

    Args:
        key: the key of a registered program.
        weights: the rule's weights, in the order in which the kernel reads them.
        columns: tensors that :func:`~learned_optim.kernels.addresses.can_be_addressed` accepts.
        settings: the settings of the step, which hold for all tensors.

    Raises:
        RuntimeError: the memory of a tensor has been freed.
        CompilationError: there is no kernel for the dtypes of these tensors.
    """
    if settings.found_inf is not None and settings.found_inf.item() != 0:
        return
    parameters, grads, states, steps, scales, sees_parameter = columns
    addressed = [parameters, grads, *states.values()]
    table = np.empty((len(parameters), FIXED_COLUMNS + 2 + max(1, len(states))), np.int64)
    table[:, 0] = table[:, 1] = list(map(Tensor.numel, parameters))
    table[:, 2] = [ADDRESS_OF_ONE if scale is None else scale.data_ptr() for scale in scales]
    table[:, 3] = ADDRESS_OF_ZERO + (ADDRESS_OF_ONE - ADDRESS_OF_ZERO) * np.array(sees_parameter)
    table[:, 4] = 0
    table[:, 5] = weights.data_ptr()
    table[:, 6] = list(map(Tensor.data_ptr, steps))
    for place, column in enumerate(addressed, FIXED_COLUMNS):
        table[:, place] = list(map(Tensor.data_ptr, column))
    if not table[:, 6 : FIXED_COLUMNS + len(addressed)].all():
        raise RuntimeError(FREED_MEMORY)
    lr = float(settings.lr)
    factor = 1.0 if registered(key).conditions else lr
    grad_scale = 1.0 if settings.grad_scale is None else settings.grad_scale.item()
    step = kernel_for(key, columns)
    step(
        table,
        Arguments(
            0.0,
            lr,
            float(settings.progress),
            settings.averaging,
            factor,
            lr * settings.weight_decay,
            grad_scale,
            settings.maximize,
            settings.skip_nonfinite,
        ),
    )


def launch_particles(
    step_kernel: Kernel,
    weights: Tensor,
    parameters: Tensor,
    grad: Tensor,
    state: Sequence[Tensor],
    step: Tensor,
    sees_parameter: Tensor,
    conditions: Sequence[float],
) -> None:
    """Step P particles in place, each with weights of its own; all tensors are float32, contiguous and on the CPU.

    Args:
        step_kernel: the kernel for tensors of float32.
        weights: ``(P, W)``, in the order in which the kernel reads them.
        parameters: ``(P, *coordinates)``.
        grad: ``(P, *coordinates)``.
        state: entries of shape ``(P, features, *coordinates)``.
        step: count of this step, 0-d.
        sees_parameter: 1 where the rule gets the value of the parameter, 0 where it gets zero; 0-d, or for each of a
            particle's coordinates.
        conditions: lr, progress and averaging.
    """
    tensors = [weights, step, parameters, grad, *state]
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    apart = np.array([tensor.stride(0) * tensor.element_size() if tensor.dim() else 0 for tensor in tensors])
    table = np.empty((len(grad), FIXED_COLUMNS + 2 + max(1, len(state))), np.int64)
    table[:, :2] = grad[0].numel()
    table[:, 2:5] = ADDRESS_OF_ONE, sees_parameter.data_ptr(), int(sees_parameter.dim() > 0)
    table[:, 5 : 5 + len(tensors)] = addresses + np.arange(len(grad))[:, None] * apart
    step_kernel(table, Arguments(0.0, *conditions, 1.0, 0.0, 1.0, False, False))


def kernel_for(key: str, columns: Columns) -> Kernel:
    """The kernel of a program for the dtypes of these tensors; raises a CompilationError if there is none."""
    tensors = columns.parameters, columns.grads, *columns.states.values()
    return kernel(key, tuple(column[0].dtype for column in tensors))
