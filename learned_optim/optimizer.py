"""LearnedOptimizer: a learned update rule as a drop-in ``torch.optim.Optimizer``."""

import copy
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from learned_optim.checkpoint import load_rule
from learned_optim.kernels.launch import Plan
from learned_optim.kernels.slots import Columns, StepSettings
from learned_optim.rules import UpdateRule
from learned_optim.step.batches import batches_of, local_columns
from learned_optim.step.checks import check_gradients, refuse_other_shapes
from learned_optim.step.counts import count_steps, count_training_step, start_training_count
from learned_optim.step.dispatch import step_columns
from learned_optim.step.modes import fake_mode_of, is_capturing, rule_on, without_idle_parts
from learned_optim.step.programs import arithmetic_dtype, plan_if_wanted
from learned_optim.step.settings import DECAY_RATE, check_group, settings_on, step_settings, unless_paused
from learned_optim.step.state import (
    begin_state,
    check_state,
    has_begun,
    recurrent_dtype,
    restore_state,
    state_by_parameter,
)

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIKELY_A_RATE = 0.01  # an lr of at most this was most likely left over from the optimizer that is replaced


class LearnedOptimizer(Optimizer):
    r"""Train a model with an update rule, meta-trained or, as the default, made by hand. No learning rate to tune.

    .. math::
        p \leftarrow p + \mathrm{rule}(\text{gradient history of } p)

    The rule is applied to every coordinate by itself (Andrychowicz et al. 2016). The default rule also reads the
    coordinate's value, the learning rate and, with ``total_steps``, the fraction of the training that is done
    (:class:`~learned_optim.rules.Conditions`). It multiplies the updates of a tensor by a factor that depends on the
    tensor's shape and its values before the first step (:meth:`UpdateRule.tensor_scale`). The arithmetic is float32, or
    float64 for float64 parameters; moments are kept in the same dtype.

    Args:
        params: parameters, named parameters or parameter groups, as for every PyTorch optimizer.
        rule: name of a shipped rule (see :func:`learned_optim.available_rules`), path of a ``.safetensors`` file, or
            an :class:`UpdateRule`, which is copied.
        lr: factor on the rate of the rule; 1.0 is the rule as it is. A number or a tensor of one element.
            Schedulers work: they scale the moves relative to the rule's own (``OneCycleLR`` and ``CyclicLR`` with
            ``cycle_momentum=False``: there is no momentum to cycle). A step with ``lr=0`` is a pause: parameters and
            their states stay as they are.
        weight_decay: None leaves it to the rule: the default shrinks weights in proportion to the rate of each, and
            leaves vectors (biases, gains) and what gets no gradient alone; other rules do not decay. A number is
            decoupled weight decay instead, as :class:`torch.optim.AdamW` at its default rate of 1e-3 means it: a step
            shrinks parameters by ``lr * 1e-3 * weight_decay``.
        total_steps: number of calls of :meth:`step` that the training will have, if it is known. The default rule then
            lets its rate fall to zero over the second half; a scheduler beside it multiplies. After the last of these
            steps nothing moves any more.
        averaging: the default rule's parameters are, in the main, averages over the steps so far (Defazio et al. 2024).
            False makes them the latest iterate: for games such as GANs, for policy gradients, and wherever the target
            moves.
        maximize: ascend instead of descend.
        nonfinite: what to do with a coordinate whose gradient is NaN or infinite. ``"skip"`` leaves it as it is,
            parameter and state, for this step; ``"propagate"`` makes it NaN or stalls it for good, as Adam does; in
            neither case is another coordinate affected, or a GPU waited for. ``"error"`` raises before anything is
            changed, at the cost of waiting for the GPU in each step.
        fused: True demands a fused kernel, which is made of the rule's ``forward`` (on a CPU with a C compiler; on a
            GPU with triton, for parameters of at most 32 bits), False forbids it, None takes one where it can be had.
        capturable: keep step counts on the device. The step may then be captured in a CUDA graph, and a ``GradScaler``
            does not wait for the GPU; outside of graphs it takes a little longer.
        differentiable: let autograd record the step, so that a loss after it can be differentiated through the update;
            slow.
        state_dtype: dtype of the recurrent part of the state (hidden and cell). None: the rule's own choice,
            float64 for float64 parameters. The default rule has no such part.

    Raises:
        ValueError: no parameters, ``lr`` or ``weight_decay`` negative or not a number, unknown rule name, a file that
            holds no rule, ``nonfinite`` not one of the three, ``state_dtype`` not a floating dtype of at most 32 bits,
            ``total_steps`` less than 1; ``total_steps`` or ``averaging=False`` with a rule that has no use for it.
        TypeError: an argument is of a wrong type, or a parameter is complex.
        RuntimeError: ``fused=True`` where no fused kernel can run, or with ``differentiable=True``; in :meth:`step`, a
            kernel that cannot be compiled with ``fused=True``, a sparse gradient, capture in a CUDA graph without
            ``capturable=True``, and a nonfinite gradient with ``nonfinite="error"``.

    When not to use it: for sparse gradients and complex parameters, which it refuses; where AdamW's regularisation
    has been tuned to the last digit; for models far larger than those measured in the documentation.

    Example:
        >>> optimizer = LearnedOptimizer(model.parameters())  # or total_steps=epochs * len(loader), if you know it
        >>> for batch in loader:
        ...     optimizer.zero_grad()
        ...     loss_function(model, batch).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path | UpdateRule = "default",
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float | None = None,
        total_steps: int | None = None,
        averaging: bool = True,
        maximize: bool = False,
        nonfinite: str = "skip",
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if state_dtype is not None and state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {STATE_DTYPES} or None, got {state_dtype}")
        self._rule = without_idle_parts(_private_copy(rule))
        self._placed_rules: dict[tuple[torch.device, torch.dtype], UpdateRule] = {}
        self._plans: dict[tuple[torch.device, torch.dtype, bool | None], Plan | None] = {}
        self._state_dtype = state_dtype
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "total_steps": total_steps,
            "averaging": averaging,
            "decoupled_weight_decay": True,  # AdamW's groups have it too; older ones of ours, in other units, do not
            "maximize": maximize,
            "nonfinite": nonfinite,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)
        if not isinstance(lr, Tensor) and 0 < lr <= LIKELY_A_RATE:
            warnings.warn(
                f"lr={lr:g} makes every learned step {1 / lr:,.0f} times smaller than the rule's own: "
                "LearnedOptimizer has no learning rate to tune; leave lr out",
                stacklevel=2,
            )

    @property
    def rule(self) -> UpdateRule:
        """The rule in use, a copy made at construction, without what has no effect (:meth:`UpdateRule.pruned`)."""
        return self._rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; raises like the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["decoupled_weight_decay"] = True  # even if another optimizer has filled in the group before
        start_training_count(group, self.param_groups[0])
        try:
            check_group(group, self._rule)
            if group["total_steps"] is not None:
                group["total_steps"] = int(group["total_steps"])  # of NumPy, say: a state holds plain numbers
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()  # a refused group leaves no trace
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The result of the closure, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling() and is_capturing() and not self._all_capturable():
            raise RuntimeError("to capture the step in a CUDA graph, use LearnedOptimizer(..., capturable=True)")
        check_gradients(self.param_groups, is_unscaled=not hasattr(self, "found_inf"))
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                self._step_group(group)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a ``GradScaler`` may leave ``grad_scale`` and ``found_inf`` to the step, which then needs no sync."""
        return self._all_capturable()

    def _all_capturable(self) -> bool:
        return all(group["capturable"] for group in self.param_groups)

    def _step_group(self, group: dict[str, Any]) -> None:
        found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # of a GradScaler
        count_training_step(group, self.state, found[1])
        columns = Columns([], [], {entry: [] for entry in self._rule.state_features}, [], [], [])
        parameters, grads, states, steps, scales, sees_parameter = columns
        self._init_group(group, parameters, grads, steps, scales, *states.values())
        settings = unless_paused(step_settings(group, *found))
        if not parameters or settings is None:
            return
        if group["weight_decay"] is None:  # then the rule decays matrices in its own way
            sees_parameter += map((1).__lt__, map(Tensor.dim, parameters))
        else:
            sees_parameter += [False] * len(parameters)
        count_steps(steps, settings.found_inf)
        if any(hasattr(kind, "to_local") for kind in set(map(type, parameters))):
            columns = local_columns(columns)
        for together in batches_of(columns, capturable=group["capturable"]):
            self._step_columns(group, together, settings_on(together.parameters[0].device, settings))

    def _step_columns(self, group: dict[str, Any], columns: Columns, settings: StepSettings) -> None:
        """Step parameters of one device and dtype."""
        device, dtype = columns.parameters[0].device, columns.parameters[0].dtype
        rule = self._placed_rules[device, arithmetic_dtype(dtype)]
        plan = self._plans[device, dtype, group["fused"]]
        step_columns(rule, plan, columns, settings, fused=group["fused"], differentiable=group["differentiable"])

    def _init_group(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        scales: list[Tensor | None],
        *states: list[Tensor],
    ) -> None:
        """Gather parameters with a gradient, and begin the states that are missing.

        torch.compile runs this method by its name, outside the graph.
        """
        entries, uses_tensor_scale = list(self._rule.state_features), self._rule.uses_tensor_scale
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            state = self.state[parameter]
            if not has_begun(state):
                begin_state(state, self._rule, parameter, self._state_dtype, capturable=group["capturable"])
            parameters.append(parameter)
            grads.append(grad)
            steps.append(state["step"])
            try:
                scales.append(state["scale"] if uses_tensor_scale else None)
                for entry, tensors in zip(entries, states, strict=True):
                    tensors.append(state[entry])
            except KeyError as error:
                raise RuntimeError(
                    f"the state of a parameter of shape {tuple(parameter.shape)} has lost its entry {error}; start the "
                    "parameter anew: optimizer.state.pop(parameter)"
                ) from error
        refuse_other_shapes(parameters, grads, states[:1])  # kernels look at the others themselves
        for device, dtype in {(parameter.device, parameter.dtype) for parameter in parameters}:
            arithmetic = arithmetic_dtype(dtype)
            if (device, arithmetic) not in self._placed_rules:
                self._placed_rules[device, arithmetic] = rule_on(self._rule, parameters[0], device, arithmetic)
            if (device, dtype, group["fused"]) not in self._plans:
                plan = None if fake_mode_of(parameters[0]) else self._plan(device, dtype, group["fused"])
                self._plans[device, dtype, group["fused"]] = plan

    def _plan(self, device: torch.device, dtype: torch.dtype, fused: bool | None) -> Plan | None:
        """The plan of the fused kernel, None if it is not to be used or cannot run."""
        arithmetic = arithmetic_dtype(dtype)
        rule = self._placed_rules[device, arithmetic]
        return plan_if_wanted(rule, device, dtype, recurrent_dtype(rule, arithmetic, self._state_dtype), fused)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a copy of a state, cast to the dtypes in which this optimizer keeps it.

        The rule is not part of the state: construct the optimizer with the rule that the state was saved with.

        Raises:
            ValueError: the state belongs to other parameters or to another architecture; nothing is loaded then.
        """
        saved: dict[Any, Any] = {}
        lengths = [group["total_steps"] for group in self.param_groups]

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            saved.update(state_by_parameter(self.param_groups, state_dict))
            for parameter, state in saved.items():
                check_state(self._rule, parameter, state)

        def restore(_: Optimizer) -> None:
            # The base class has cast the entries to the dtypes of the parameters and shares the rest with state_dict.
            for group in self.param_groups:
                start_training_count(group, group, [self.state[p] for p in group["params"] if p in saved])
            capturable = {p for group in self.param_groups if group["capturable"] for p in group["params"]}
            for parameter, state in saved.items():
                kept, on_device = self.state[parameter], parameter in capturable
                restore_state(kept, state, self._rule, parameter, self._state_dtype, capturable=on_device)
            warn_of_other_length(lengths, self.param_groups)

        # Hooks, because those of the user may rewrite the state before and read it after.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """The attributes that copies and pickles hold: those of the base class, rule and dtype of the state."""
        return {**super().__getstate__(), "_rule": self._rule, "_state_dtype": self._state_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with defaults for settings that an older version did not have."""
        super().__setstate__(state)
        self._placed_rules = {}
        self._plans = {}
        for group in [self.defaults, *self.param_groups]:
            if "decoupled_weight_decay" not in group:  # of a version where a step shrank by lr * weight_decay
                group["weight_decay"] = (group.get("weight_decay") or 0.0) / DECAY_RATE
                group["decoupled_weight_decay"] = True
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if self._rule.uses_tensor_scale:
            for parameter, kept in self.state.items():
                if isinstance(parameter, Tensor) and has_begun(kept):  # users may keep what they like beside it
                    kept.setdefault("scale", torch.ones((), device=parameter.device, dtype=torch.float32))


def _private_copy(rule: object) -> UpdateRule:
    if isinstance(rule, str | Path):
        return load_rule(rule)
    if isinstance(rule, UpdateRule):
        return copy.deepcopy(rule).requires_grad_(False)
    hint = "; there is no learning rate to tune, leave it out" if isinstance(rule, Real | Tensor) else ""
    raise TypeError(f"rule must be a name, a path or an instance of an UpdateRule, got {rule!r}{hint}")


def warn_of_other_length(before: Sequence[int | None], groups: Sequence[dict[str, Any]]) -> None:
    """Warn of groups whose ``total_steps`` a loaded state has changed."""
    for given, group in zip(before, groups, strict=True):
        if given is not None and given != group["total_steps"]:
            warnings.warn(
                f"the state that is loaded has total_steps={group['total_steps']}, which holds now, not {given}; to "
                "change the length of the training, set total_steps in optimizer.param_groups after loading",
                stacklevel=4,
            )
            return
