"""The choice between the paths of a step: the fused kernel, blocks of tensors, or one tensor at a time."""

from learned_optim.kernels.launch import Plan
from learned_optim.kernels.slots import Columns, StepSettings
from learned_optim.rules import UpdateRule
from learned_optim.step.checks import refuse_other_features
from learned_optim.step.fused import apply_fused_if_possible, apply_fused_to_columns
from learned_optim.step.modes import fake_mode_of, without_autocast
from learned_optim.step.plain import apply_in_blocks, apply_per_tensor


def step_columns(
    rule: UpdateRule,
    plan: Plan | None,
    columns: Columns,
    settings: StepSettings,
    *,
    fused: bool | None,
    differentiable: bool,
) -> None:
    """Step parameters in place, by the fastest path that can serve them.

    Args:
        rule: the rule, on the parameters' device and in the dtype of the arithmetic.
        plan: the plan of the rule's fused kernel; None where there is none.
        columns: parameters of one device and dtype, with one step count or with counts on the device.
        settings: the settings of the parameter group for this step.
        fused: True demands the fused kernel, as in :class:`~learned_optim.optimizer.LearnedOptimizer`.
        differentiable: autograd records the step.

    Raises:
        RuntimeError: a gradient or an entry of the state does not fit its parameter.
        CompilationError: the fused kernel is demanded and cannot be compiled; nothing has changed then.
    """
    parameter = columns.parameters[0]
    with without_autocast(parameter.device):
        mode = fake_mode_of(parameter)
        if mode is not None:
            with mode:
                apply_per_tensor(rule, columns.slots(), settings)
        elif differentiable:
            apply_per_tensor(rule, columns.slots(), settings)
        elif plan is not None and fused:
            apply_fused_to_columns(plan, columns, settings)
        elif plan is None or not apply_fused_if_possible(plan, columns, settings):
            refuse_other_features(rule, columns)
            apply_in_blocks(rule, columns.slots(), settings)
