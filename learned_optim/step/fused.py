"""The fused step: a rule is applied by its kernel, one launch for all tensors of a device and their dtypes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.kernels.cache import CompilationError
from learned_optim.kernels.cpu.kernel import warn_once
from learned_optim.kernels.launch import Plan, launch, launch_op
from learned_optim.kernels.slots import Columns, Slot, StepSettings


def apply_fused(plan: Plan, slots: Sequence[Slot], settings: StepSettings, block_size: int | None = None) -> None:
    """Step every slot in place by the rule's kernel.

    Dense tensors in one memory order are stepped where they are, others in copies.

    Args:
        plan: the plan of the rule, on the slots' device.
        slots: all parameters of one dtype that the kernel supports; see
            :func:`~learned_optim.step.programs.unsupported_reason`.
        settings: the settings of the parameter group for this step.
        block_size: coordinates of a program, a power of two; None chooses.

    Raises:
        RuntimeError: a gradient or state is not of its parameter's shape and device; or the entries of a state are not
            dense and in one memory order.
        CompilationError: on a CPU, gradients or states are of dtypes for which the C compiler makes no kernel; nothing
            has changed then.
    """
    if slots:
        apply_fused_to_columns(plan, Columns.of(slots), settings, block_size)


def apply_fused_to_columns(plan: Plan, columns: Columns, settings: StepSettings, block_size: int | None = None) -> None:
    """Step all columns in place by the rule's kernel, as :func:`apply_fused` does, without making a slot of each.

    Args:
        plan: the plan of the rule, on the device of the columns.
        columns: parameters of one dtype that the kernel supports.
        settings: the settings of the parameter group for this step.
        block_size: coordinates of a program, a power of two; None chooses.
    """
    columns = columns._replace(states={entry: columns.states[entry] for entry in plan.entries})
    if not torch.compiler.is_compiling():
        launch(plan, columns, settings, block_size)
        return
    # Products with a tensor, since a graph of torch.compile would hold for one value of a number only.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    lr = settings.lr if isinstance(settings.lr, Tensor) else one * settings.lr
    progress = settings.progress if isinstance(settings.progress, Tensor) else one * settings.progress
    launch_op(
        list(columns.parameters),
        list(columns.grads),
        [tensor for column in columns.states.values() for tensor in column],
        list(columns.steps),
        [scale for scale in columns.scales if scale is not None],
        plan.weights,
        plan.key,
        list(columns.sees_parameter),
        lr,
        one * settings.weight_decay,
        settings.maximize,
        settings.skip_nonfinite,
        settings.grad_scale,
        settings.found_inf,
        progress,
        settings.averaging,
    )


def apply_fused_if_possible(plan: Plan, columns: Columns, settings: StepSettings) -> bool:
    """Step all columns by the rule's kernel, if it can be compiled.

    Returns:
        False, after a warning and with nothing changed, if it cannot.
    """
    try:
        apply_fused_to_columns(plan, columns, settings)
    except CompilationError as error:
        warn_once(error)
        return False
    return True
