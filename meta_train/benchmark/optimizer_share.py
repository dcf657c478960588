"""The optimizer's share of a user's training step, and what a rule must save in steps to pay in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from learned_optim import LearnedOptimizer
from learned_optim.meta_train.benchmark.contenders import REFERENCE
from learned_optim.meta_train.benchmark.evaluation import comparison_task
from learned_optim.meta_train.benchmark.report import aligned
from learned_optim.meta_train.benchmark.suites import suite_of_model
from learned_optim.meta_train.benchmark.timing import MakeOptimizer, Timing, time_steps
from learned_optim.meta_train.common.load import busy_machine
from learned_optim.meta_train.common.seeds import cpu_by_default, fixed_global_state
from learned_optim.meta_train.common.strict import ConfigError

RULE, FUSED = "default rule", f"{REFERENCE}, fused"
RATE = 1e-4  # of Adam: its steps take equally long at every rate, and here nothing can overflow


@dataclass(frozen=True)
class Shares:
    """Seconds of a training step of a model with several optimizers."""

    model: str
    parameters: int
    """Number of trained parameters, each entry of a tensor counted."""
    device: str
    threads: int
    timings: Mapping[str, Timing]
    """Optimizer -> its seconds."""

    def break_even(self, other: str) -> float:
        """Share of the steps of another optimizer that the rule must save to take no more seconds than it.

        ``1 - t / T`` where a step takes t seconds with the other and T with the rule; negative where that is cheaper.
        """
        return 1 - self.timings[other].step / self.timings[RULE].step

    @property
    def warning(self) -> str:
        """A sentence if the machine did other work meanwhile, else nothing."""
        return busy_machine(self.timings[RULE].others)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for a script."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "device": self.device,
            "threads": self.threads,
            "load_of_others": self.timings[RULE].others,
            "forward_and_backward_ms": 1e3 * self.timings[RULE].model,
            "optimizers": {
                name: {"optimizer_ms": 1e3 * timing.optimizer, "step_ms": 1e3 * timing.step, "share": timing.share}
                for name, timing in self.timings.items()
            },
            "steps_to_save": {name: self.break_even(name) for name in self.timings if name != RULE},
        }

    def __str__(self) -> str:
        """A table, and the break-even in words."""
        rule = self.timings[RULE]
        rows = [("optimizer", "its step, ms", "whole step, ms", "its share")]
        rows += [
            (name, f"{1e3 * timing.optimizer:.3g}", f"{1e3 * timing.step:.3g}", f"{timing.share:.1%}")
            for name, timing in self.timings.items()
        ]
        return "\n".join(
            [
                f"a training step of {self.model}: {self.parameters:,} parameters on {self.device}, "
                f"{self.threads} {'thread' if self.threads == 1 else 'threads'}, medians of {rule.rounds} rounds",
                f"batch, forward and backward take {1e3 * rule.model:.3g} ms",
                "",
                aligned(rows),
                "",
                *(self._verdict(name) for name in self.timings if name != RULE),
            ]
        )

    def _verdict(self, other: str) -> str:
        saved = self.break_even(other)
        if saved <= 0:
            return f"beside {other}: the {RULE} takes no more seconds a step, so that every step that it saves pays"
        return f"beside {other}: the {RULE} pays in seconds if it needs at least {saved:.1%} fewer steps"


@cpu_by_default()
def measure_shares(model: str, device: str = "cpu") -> Shares:
    """Time a model's training steps with the default rule and with Adam, as PyTorch makes it by default and fused.

    Args:
        model: ``FILE.py:CLASS``, as :func:`~learned_optim.meta_train.tasks.users.load_model` takes it.
        device: where it is trained.

    Raises:
        ConfigError: there is no such model, or a step of it fails.
    """
    (problem,) = suite_of_model(model).problems
    try:
        task = comparison_task(problem.build())
        with fixed_global_state(0):
            module = task.module()
    except Exception as error:  # whatever a user's code raises
        raise _failure(model, "the model cannot be built", error) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"--model {model}: what it returns must be a torch.nn.Module, got {module!r}")
    parameters = sum(tensor.numel() for tensor in module.parameters() if tensor.requires_grad)
    if not parameters:
        raise ConfigError(f"--model {model}: the module has no parameters to train")
    makers: dict[str, MakeOptimizer] = {RULE: _rule, REFERENCE: _adam}
    if _has_fused_adam(module, torch.device(device)):
        makers[FUSED] = partial(_adam, fused=True)
    try:
        timings = time_steps(task, makers, torch.device(device))
    except Exception as error:
        raise _failure(model, "a training step fails", error) from error
    return Shares(model, parameters, device, torch.get_num_threads(), timings)


def _rule(module: nn.Module) -> Optimizer:
    return LearnedOptimizer(_trained(module))


def _adam(module: nn.Module, fused: bool | None = None) -> Optimizer:
    return Adam(_trained(module), lr=RATE, fused=fused)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [tensor for tensor in module.parameters() if tensor.requires_grad]


def _has_fused_adam(module: nn.Module, device: torch.device) -> bool:
    """Whether PyTorch has a fused Adam for these parameters there."""
    try:
        _adam(module.to(device), fused=True)
    except RuntimeError:
        return False
    return True


def _failure(model: str, what: str, error: Exception) -> ConfigError:
    message = " ".join(str(error).split())
    return ConfigError(f"--model {model}: {what}: {type(error).__name__}: {message}")
