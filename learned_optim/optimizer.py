"""LearnedOptimizer: a learned update rule as a drop-in ``torch.optim.Optimizer``."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from learned_optim.checkpoint import load_rule
from learned_optim.execution import Settings, Slot, apply_in_blocks
from learned_optim.kernels.availability import why_not_fused
from learned_optim.rules import UpdateRule

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LearnedOptimizer(Optimizer):
    r"""Train a model with a meta-trained update rule. No learning rate to tune.

    .. math:: p \leftarrow (1 - lr \cdot weight\_decay)\, p + lr \cdot \mathrm{rule}(\text{gradient history of } p)

    The rule is applied to every coordinate by itself (Andrychowicz et al. 2016). Its arithmetic is float32, float64
    for float64 parameters; moments are kept in that dtype too. A gradient of NaN makes its own coordinate NaN for
    good, parameter and state, as with Adam, and no other coordinate.

    Args:
        params: parameters, named parameters or parameter groups, as for every PyTorch optimizer.
        rule: name of a shipped rule (see :func:`learned_optim.available_rules`), path of a ``.safetensors`` file, or
            an :class:`UpdateRule`, of which a copy is kept.
        lr: factor on the learned update; 1.0 is the rule as it was meta-trained. A number or a tensor of one element.
            Schedulers work: they scale the update relative to the rule's own step size (``OneCycleLR`` and
            ``CyclicLR`` with ``cycle_momentum=False``: there is no momentum to cycle).
        weight_decay: decoupled weight decay; a step shrinks parameters by ``lr * weight_decay``, so that AdamW's
            ``lr=1e-3, weight_decay=1e-2`` corresponds to ``1e-5`` here.
        maximize: ascend instead of descend.
        fused: True demands a fused kernel, False forbids it, None takes one where there is one.
        state_dtype: dtype of the recurrent part of the state (hidden and cell). None: the rule's own choice, bfloat16
            for the default rule, and float64 for float64 parameters.

    Raises:
        ValueError: no parameters, ``lr`` or ``weight_decay`` negative or not a number, unknown rule name, a file that
            holds no rule, ``state_dtype`` not a floating dtype of at most 32 bits.
        TypeError: ``params`` or ``rule`` is of a wrong type, or a parameter is complex.
        RuntimeError: ``fused=True`` where no fused kernel can run; in :meth:`step`, a sparse gradient or capture in a
            CUDA graph.

    When not to use it: for sparse gradients and complex parameters, which it refuses; where AdamW's regularisation
    has been tuned to the last digit; for models far larger than those measured in the documentation.

    Example:
        >>> optimizer = LearnedOptimizer(model.parameters())
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
        weight_decay: float = 0.0,
        maximize: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if state_dtype is not None and state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {STATE_DTYPES} or None, got {state_dtype}")
        self._rule = _private_copy(rule)
        self._placed_rules: dict[tuple[torch.device, torch.dtype], UpdateRule] = {}
        self._state_dtype = state_dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "fused": fused})

    @property
    def rule(self) -> UpdateRule:
        """The rule in use, a copy made at construction."""
        return self._rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; raises like the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group, self._rule)
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()  # a refused group leaves no trace
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("LearnedOptimizer cannot be captured in a CUDA graph: the step count would stand still")
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
            settings = Settings(lr, group["weight_decay"], group["maximize"])
            for (device, dtype, count), slots in self._slots(group["params"]).items():
                arithmetic = _arithmetic_dtype(dtype)
                step = torch.full((), count, device=device, dtype=arithmetic)
                apply_in_blocks(self._placed_rule(device, arithmetic), slots, step, settings)
        return loss

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise RuntimeError(
                        "LearnedOptimizer does not support sparse gradients; use sparse=False in the embedding, or "
                        "torch.optim.SparseAdam for its parameters"
                    )

    def _slots(self, parameters: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype, float], list[Slot]]:
        """Slots that one call can process: of one device, dtype and step count, with that count already advanced."""
        together: defaultdict[tuple[torch.device, torch.dtype, float], list[Slot]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self._state_of(parameter)
            state["step"] += 1
            entries = {entry: state[entry] for entry in self._rule.state_features}
            together[parameter.device, parameter.dtype, float(state["step"])].append(
                Slot(parameter, parameter.grad, entries)
            )
        return together

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            dtype = _arithmetic_dtype(parameter.dtype)
            shape = tuple(parameter.shape)
            # On the CPU, whatever torch.set_default_device says: no step has to ask a GPU.
            state["step"] = torch.zeros((), device="cpu", dtype=torch.float32)
            for entry, tensor in self._rule.init_state(shape, device="meta", dtype=dtype).items():
                state[entry] = torch.zeros_like(tensor, device=parameter.device, dtype=self._entry_dtype(entry, dtype))
        return state

    def _entry_dtype(self, entry: str, arithmetic: torch.dtype) -> torch.dtype:
        if entry not in self._rule.recurrent_state:
            return arithmetic
        if self._state_dtype is not None:
            return self._state_dtype
        return arithmetic if arithmetic == torch.float64 else self._rule.recurrent_dtype

    def _placed_rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        key = (device, dtype)
        if key not in self._placed_rules:
            self._placed_rules[key] = copy.deepcopy(self._rule).to(device, dtype)
        return self._placed_rules[key]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a copy of a state; every entry keeps the dtype it was saved in.

        The rule is no part of the state: construct the optimizer with the one that the state was saved with.

        Raises:
            ValueError: the state belongs to other parameters or to another architecture; nothing is loaded then.
        """
        saved: dict[Any, Any] = {}

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            saved.update(self._state_by_parameter(state_dict))
            for parameter, state in saved.items():
                self._check_state(parameter, state)

        def restore(_: Optimizer) -> None:
            # The base class has cast the entries to the dtypes of the parameters and shares the rest with state_dict.
            for parameter, state in saved.items():
                for entry in self._rule.state_features:
                    value = state[entry].detach().to(parameter.device, copy=True)
                    self.state[parameter][entry] = value.contiguous()
                self.state[parameter]["step"] = torch.tensor(float(state["step"]), device="cpu", dtype=torch.float32)

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

    def _state_by_parameter(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """The states in a state dict, without those of parameters that have none yet."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = ((parameter, state_dict["state"].get(key)) for key, parameter in zip(keys, parameters, strict=False))
        return {parameter: state for parameter, state in states if state}

    def _check_state(self, parameter: Tensor, state: dict[str, Any]) -> None:
        shapes = {entry: tuple(getattr(value, "shape", ())) for entry, value in state.items()}
        features = {entry: shape[0] if shape else 1 for entry, shape in shapes.items()}
        needed = {"step": 1, **self._rule.state_features}
        if features != needed:
            raise ValueError(
                f"the state was saved with another rule: it holds {features} (entry: features), "
                f"the rule {self._rule.name!r} needs {needed}; construct the optimizer with that rule"
            )
        for entry in self._rule.state_features:
            if shapes[entry][1:] != parameter.shape:
                raise ValueError(
                    f"the state was saved for other parameters: {entry!r} is for one of shape {shapes[entry][1:]}, "
                    f"the parameter in its place has {tuple(parameter.shape)}"
                )

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying keep: besides the base class's, the rule."""
        return {**super().__getstate__(), "_rule": self._rule, "_state_dtype": self._state_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with defaults for settings that an older version did not have."""
        super().__setstate__(state)
        self._placed_rules = {}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # the base class adds it to the defaults
                    group.setdefault(key, value)


def _private_copy(rule: str | Path | UpdateRule) -> UpdateRule:
    if isinstance(rule, str | Path):
        return load_rule(rule)
    if isinstance(rule, UpdateRule):
        return copy.deepcopy(rule).requires_grad_(False)
    raise TypeError(f"rule must be a name, a path or an UpdateRule, got {type(rule).__name__}")


def _check_group(group: dict[str, Any], rule: UpdateRule) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}; it multiplies the learned update, 1.0 is the rule as trained")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise TypeError(f"LearnedOptimizer needs real floating-point parameters, got one of {parameter.dtype}")
        reason = why_not_fused(rule.name, parameter.device) if group["fused"] else None
        if reason is not None:
            raise RuntimeError(f"fused=True cannot be had: {reason}; use fused=None")


def _arithmetic_dtype(parameter: torch.dtype) -> torch.dtype:
    return torch.float64 if parameter == torch.float64 else torch.float32
