"""The step on the meta-parameters: an optimizer of PyTorch's, with a schedule and clipping."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from learned_optim.meta_train.config.settings import MetaOptimizerConfig


class MetaOptimizer:
    """Steps meta-parameters: those of a rule, or what a few-shot algorithm learns.

    Args:
        module: its parameters that require a gradient are stepped.
        settings: choice of optimizer, schedule and clipping.
        steps: meta-steps of the whole run.

    Raises:
        ValueError: ``settings.rates`` names a parameter that is not stepped.
    """

    def __init__(self, module: torch.nn.Module, settings: MetaOptimizerConfig, steps: int) -> None:
        stepped = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if absent := [name for name in settings.rates if name not in stepped]:
            raise ValueError(f"meta_optimizer.rates: no parameter {absent[0]!r}; there are {', '.join(stepped)}")
        self.parameters = list(stepped.values())
        self.factors = [settings.rates.get(name, settings.lr) / settings.lr for name in stepped]
        self.settings, self.steps = settings, steps
        self.optimizer = build_optimizer(self.parameters, settings)

    def step(self, grads: Sequence[Tensor], meta_step: int) -> None:
        """Take the step after ``meta_step`` earlier ones along the meta-gradient ``grads``, which is finite."""
        for parameter, grad in zip(self.parameters, self.clipped(grads), strict=True):
            parameter.grad = grad
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
            group["lr"] = factor * self.rate(meta_step)
        self.optimizer.step()

    def clipped(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """``grads`` with each entry bounded, and then their norm."""
        bound, bound_of_norm = self.settings.clip_value, self.settings.clip_norm
        clipped = list(grads) if bound is None else [grad.clamp(-bound, bound) for grad in grads]
        if bound_of_norm is None:
            return clipped
        scale = min(1.0, bound_of_norm / max(norm_of(clipped), 1e-30))  # an all-zero gradient stays zero
        return [grad * scale for grad in clipped]

    def rate(self, meta_step: int) -> float:
        """Learning rate of the step after ``meta_step`` earlier ones, of parameters that have none of their own."""
        settings, warmup = self.settings, self.settings.warmup
        if meta_step < warmup:
            return settings.lr * (meta_step + 1) / warmup
        fraction = (meta_step - warmup) / max(1, self.steps - warmup)
        end = settings.final_fraction
        if settings.schedule == "cosine":
            return settings.lr * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * fraction)))
        if settings.schedule == "linear":
            return settings.lr * (end + (1 - end) * (1 - fraction))
        return settings.lr * (end**fraction if settings.schedule == "exponential" else 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by dotted names."""
        state = self.optimizer.state_dict()["state"]
        return {f"{index}.{name}": tensor for index, entry in state.items() for name, tensor in entry.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` has given."""
        state = self.optimizer.state_dict()
        for dotted, tensor in tensors.items():
            index, _, name = dotted.partition(".")
            state["state"].setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict(state)


def build_optimizer(parameters: list[torch.nn.Parameter], settings: MetaOptimizerConfig) -> Optimizer:
    """The optimizer that ``settings`` name, with a group for each parameter."""
    groups = [{"params": [parameter]} for parameter in parameters]
    if settings.name == "sgd":
        return SGD(groups, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    if settings.name == "adamw":
        return AdamW(groups, settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    return Adam(groups, settings.lr, betas=settings.betas)


def norm_of(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of all entries together."""
    return float(torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in tensors])))
