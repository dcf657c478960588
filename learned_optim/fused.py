"""How a rule is applied by its fused kernel: one launch for all tensors of a device and their dtypes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from learned_optim.execution import Columns, Settings, Slot
from learned_optim.kernels import cpu, launch, training
from learned_optim.kernels.availability import why_not_fused
from learned_optim.kernels.compiler import CompilationError
from learned_optim.kernels.launch import Plan
from learned_optim.kernels.program import Program
from learned_optim.kernels.sources import Sources, register
from learned_optim.kernels.trace import NotCoordinatewiseError, trace
from learned_optim.rules import Conditions, RuleState, UpdateRule
from learned_optim.surroundings import without_autocast

ALONE = Conditions()
MOST_MULTIPLY_ADDS = 1 << 14
"""Of a coordinate on a GPU: larger networks do not fit the instruction cache, nor their state the registers."""


def why_not(rule: UpdateRule, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why parameters of this device and dtype cannot be stepped by a kernel, None if they can.

    Every rule that is coordinatewise has a kernel: it is made from its ``forward``.
    """
    dtypes = launch.dtypes_of(device)
    if dtype not in dtypes:
        return f"fused kernels on {device.type} serve parameters of {', '.join(map(str, dtypes))}, not of {dtype}"
    reason = why_not_fused(device)
    if reason is not None:
        return reason
    found = sources_of(rule, _arithmetic(dtype))
    if isinstance(found, str):
        return f"no fused kernel can be made of the rule {rule.name!r} ({type(rule).__name__}): {found}"
    if not launch.in_c(device) and found.multiply_adds > MOST_MULTIPLY_ADDS:
        return (
            f"fused kernels on a GPU serve networks of up to {MOST_MULTIPLY_ADDS:,} multiply-adds a coordinate; the "
            f"rule {rule.name!r} has {found.multiply_adds:,}"
        )
    return None


def is_worth_it(device: torch.device) -> bool:
    """Whether a kernel is the fastest way on this device. Triton's interpreter is not: only tests want it."""
    return not (device.type == "cpu" and launch.interpreting())


def plan_if_wanted(
    rule: UpdateRule, device: torch.device, dtype: torch.dtype, recurrent: torch.dtype, fused: bool | None
) -> Plan | None:
    """The rule's plan; None where its kernel is not wanted, or cannot run.

    Args:
        rule: on the device.
        device: where the parameters are.
        dtype: of parameters and gradients.
        recurrent: of hidden state and cell.
        fused: as in :class:`LearnedOptimizer`.

    Raises:
        CompilationError: the kernel is demanded, but the C compiler does not make it; otherwise the user is warned.
    """
    wanted = is_worth_it(device) if fused is None else fused
    if not wanted or why_not(rule, device, dtype) is not None:
        return None
    plan = plan_of(rule)
    if launch.in_c(device):
        try:
            of_state = [recurrent if entry in rule.recurrent_state else _arithmetic(dtype) for entry in plan.entries]
            cpu.kernel(plan.key, (dtype, dtype, *of_state))
        except CompilationError as error:
            if fused:
                raise
            cpu.warn_once(error)
            return None
    return plan


def apply_fused(plan: Plan, slots: Sequence[Slot], settings: Settings, block_size: int | None = None) -> None:
    """Like :func:`~learned_optim.execution.apply_in_blocks`, by the rule's kernel.

    Dense tensors in one memory order are stepped where they are, others in copies.

    Args:
        plan: of the rule, on the slots' device.
        slots: all parameters of one dtype that :func:`why_not` has no objection to.
        settings: of the parameter group.
        block_size: coordinates of a program, a power of two; None chooses.

    Raises:
        RuntimeError: a gradient or state is not of its parameter's shape and device; or the entries of a state are not
            dense and in one memory order.
        CompilationError: on a CPU, gradients or states are of dtypes for which the C compiler makes no kernel; nothing
            has changed then.
    """
    if slots:
        apply_fused_to_columns(plan, Columns.of(slots), settings, block_size)


def apply_fused_to_columns(plan: Plan, columns: Columns, settings: Settings, block_size: int | None = None) -> None:
    """:func:`apply_fused` for slots that were never made: with thousands of small tensors they would take the time."""
    parameters, grads, _, steps, scales, are_given = columns
    entries = [columns.states[entry] for entry in plan.entries]
    if not torch.compiler.is_compiling():
        step = launch.Step(*settings)
        launch.step_in_place(plan, parameters, grads, entries, steps, scales, are_given, step, block_size)
        return
    # Products with a tensor, since a graph of torch.compile would hold for one value of a number only.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    lr = settings.lr if isinstance(settings.lr, Tensor) else one * settings.lr
    progress = settings.progress if isinstance(settings.progress, Tensor) else one * settings.progress
    launch.traced_step_in_place(
        list(parameters),
        list(grads),
        [tensor for column in entries for tensor in column],
        list(steps),
        [scale for scale in scales if scale is not None],
        plan.weights,
        plan.key,
        list(plan.features),
        list(are_given),
        lr,
        one * settings.weight_decay,
        settings.maximize,
        settings.skip_nonfinite,
        settings.grad_scale,
        settings.found_inf,
        progress,
        settings.averaging,
    )


def apply_fused_if_possible(plan: Plan, columns: Columns, settings: Settings) -> bool:
    """Like :func:`apply_fused`; False, with a warning and with nothing changed, where a kernel cannot be compiled."""
    try:
        apply_fused_to_columns(plan, columns, settings)
    except CompilationError as error:
        cpu.warn_once(error)
        return False
    return True


@torch.no_grad()
def plan_of(rule: UpdateRule) -> Plan:
    """The rule as its kernel takes it, a snapshot of its weights; see :func:`why_not`."""
    parameters = _tensors_of(rule)
    like = parameters[0]
    sources = sources_of(rule, like.dtype)
    assert isinstance(sources, Sources), sources
    source = sources.c if launch.in_c(like.device) else sources.triton
    order = torch.tensor(source.weights, dtype=torch.int64, device=like.device)
    entries, features = zip(*rule.state_features.items(), strict=True)
    with without_autocast(like.device):
        weights = _flat(sources.program, parameters)[order]
    return Plan(sources.key, weights, entries, features)


def _tensors_of(rule: UpdateRule) -> list[Tensor]:
    """Meta-parameters, and buffers if a rule has them, in the order of the arguments of its program's prologue."""
    return [*rule.parameters(), *rule.buffers()]


def _flat(program: Program, parameters: Sequence[Tensor]) -> Tensor:
    """All that a program reads of meta-parameters, one after the other."""
    return torch.cat([parameters[0].new_empty(0), *(result.reshape(-1) for result in program.prologue(*parameters))])


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sources_of(rule: UpdateRule, dtype: torch.dtype) -> Sources | str:
    """The sources of a rule's kernels, or why none can be made; they follow from its class and settings.

    Args:
        rule: any.
        dtype: of the arithmetic, float32 or float64.
    """
    settings = tuple(rule.settings.items())
    try:
        hash(settings)
    except TypeError:
        return f"its settings are not all numbers, strings and tuples of these: {dict(settings)}"
    return _sources(type(rule), settings, dtype)


@functools.cache
@torch.no_grad()
def _sources(
    architecture: type[UpdateRule], settings: tuple[tuple[str, Any], ...], dtype: torch.dtype
) -> Sources | str:
    """The sources of a rule's program, or why it has none."""
    # Whatever surrounds the first step that needs them: a fake mode, a default device, autocast, inference.
    modes = unset_fake_temporarily(), torch.device("cpu"), torch.autocast("cpu", enabled=False)
    with modes[0], modes[1], modes[2], torch.inference_mode(False):
        try:
            rule = architecture(**dict(settings)).to("cpu", dtype)
            if not _tensors_of(rule):
                return "it has no meta-parameters"
            conditions = rule.uses_conditions
            program = trace(_told(rule), _tensors_of(rule), rule.state_features, conditions=conditions)
        except NotCoordinatewiseError as error:
            return str(error)
        except Exception as error:  # of a class that someone else wrote; its plain path may well work
            return (
                f"its settings do not build it again, or its forward fails in a trace: {type(error).__name__}: {error}"
            )
        return register(program, dtype, rule.name, conditions=conditions)


def _told(rule: UpdateRule) -> Callable[..., tuple[Tensor, RuleState]]:
    """The rule as a function of gradient, state, step, and each of the conditions if it uses them."""
    return lambda grad, state, step, *told: rule(grad, state, step, *([Conditions(*told)] if told else []))


def training_step(rule: UpdateRule) -> training.Step:
    """The rule's step as a differentiable function; see :func:`why_not`."""
    sources = sources_of(rule, torch.float32)
    assert isinstance(sources, Sources), sources
    return training.step_of(sources.key)


class ParticleStep:
    """A step in place of P rules of one architecture, on a CPU, by compiled C: each steps coordinates of its own.

    Args:
        rule: gives the architecture; see :func:`why_not`.
        meta_parameters: ``(P, M)``, float32.

    Raises:
        CompilationError: the C compiler failed.
    """

    def __init__(self, rule: UpdateRule, meta_parameters: Tensor) -> None:
        sources = sources_of(rule, torch.float32)
        assert isinstance(sources, Sources), sources
        shapes = [parameter.shape for parameter in rule.parameters()]
        order = torch.tensor(sources.c.weights, dtype=torch.int64)

        def weights_of(row: Tensor) -> Tensor:
            parts = row.split([shape.numel() for shape in shapes])
            parameters = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            return _flat(sources.program, [*parameters, *rule.buffers()])[order]

        self.entries = tuple(rule.state_features)
        with without_autocast(meta_parameters.device):
            self.weights = torch.func.vmap(weights_of)(meta_parameters.detach()).contiguous()
        self.kernel = cpu.kernel(sources.key, (torch.float32,) * (2 + len(self.entries)))

    def __call__(
        self, parameters: Tensor, grad: Tensor, state: RuleState, step: Tensor, conditions: Conditions = ALONE
    ) -> None:
        """Overwrite ``parameters`` and ``state``.

        Args:
            parameters: ``(P, *coordinates)``, float32 and contiguous.
            grad: as ``parameters``; any strides.
            state: entries of shape ``(P, features, *coordinates)``, float32 and contiguous.
            step: 0-d.
            conditions: as the rule is told them. In place of the parameter stands whether it is: 0-d, or for each of a
                particle's coordinates.
        """
        grad, step = grad.contiguous(), step.to(torch.float32)
        given = torch.as_tensor(conditions.parameter, dtype=torch.float32)
        given = given.expand(parameters.shape[1:]).contiguous() if given.dim() else given
        tensors = [self.weights, step, parameters, grad, *[state[entry] for entry in self.entries]]
        addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        apart = np.array([tensor.stride(0) * tensor.element_size() if tensor.dim() else 0 for tensor in tensors])
        unused = (
            0 if self.entries else 1
        )  # C knows no array of length 0: a rule without state has a column that is not read
        table = np.zeros((len(grad), 5 + len(tensors) + unused), np.int64)
        table[:, :2] = grad[0].numel()
        table[:, 2:5] = cpu.ONE, given.data_ptr(), int(given.dim() > 0)
        table[:, 5 : 5 + len(tensors)] = addresses + np.arange(len(grad))[:, None] * apart
        told = [float(number) for number in conditions[1:]]
        self.kernel(table, cpu.Settings(0.0, *told, 1.0, 0.0, 1.0, False, False))
