"""What steps the training runs of a comparison: one optimizer for all of them, or one for each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim.meta_train.common.seeds import global_state, set_global_state
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Batch

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
"""Parameters -> optimizer: what a user writes, ``lambda parameters: torch.optim.Adam(parameters, lr=1e-3)``."""


class Model(NamedTuple):
    """What an optimizer is given that must see its model whole."""

    module: nn.Module
    """Tells what kind of layer a tensor belongs to; its own tensors may be others."""
    tensors: Mapping[str, Tensor]
    """The trained parameters in their shapes, by their names in the module."""


@dataclass(frozen=True)
class ForEach:
    """One optimizer for each training run.

    For optimizers in which one coordinate depends on others: on those of its matrix, as with Muon and SOAP, or on all
    of the model, as where a step size is estimated for all of it (D-Adaptation, Prodigy).
    """

    build: Callable[[Model], Optimizer]


def model_of(module: nn.Module) -> Model:
    """A module with its own trained parameters."""
    return Model(module, {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad})


class Stepper(Protocol):
    """Losses and steps of all runs, at the parameters ``(instances, N)`` that it was built with."""

    @property
    def shown(self) -> Tensor:
        """The parameters ``(instances, N)`` at which the losses of this step are taken."""

    def losses(self, batch: Batch) -> Tensor:
        """Losses ``(instances,)`` on a batch; the gradients on it are kept for the step."""

    def step(self) -> None:
        """One update of all runs."""


class Together:
    """One optimizer for all runs: of one tensor with all coordinates, or of all their tensors in their shapes."""

    def __init__(self, task: VectorizedTask, parameters: Tensor, make: MakeOptimizer, by_tensor: bool) -> None:
        self.task, self.parameters, self.by_tensor = task, parameters, by_tensor
        self.optimized = task.tensors(parameters) if by_tensor else [parameters.view(-1)]
        self.optimizer = make([tensor.requires_grad_() for tensor in self.optimized])

    @property
    def shown(self) -> Tensor:
        """The parameters."""
        return self.parameters

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """Losses of all runs."""
        losses, grads = self.task.losses_and_grads(self.parameters, batch)
        for tensor, grad in zip(
            self.optimized, self.task.tensors(grads) if self.by_tensor else [grads.reshape(-1)], strict=True
        ):
            tensor.grad = grad
        return losses

    def step(self) -> None:
        """One step of the optimizer."""
        self.optimizer.step()


class Apart:
    """One optimizer for each run, which sees the tensors of that run alone, in their shapes.

    An optimizer with the methods ``train`` and ``eval``, as Schedule-Free has them, takes gradients at one point and is
    to be evaluated at another, the average of its iterates. Losses are then those of the average, on the batch whose
    gradient is taken. Each look goes from one point to the other and back, and puts the exact parameters back, so that
    training is what it would be without looks. Random numbers, of dropout, are the same at both points.

    A run whose loss or gradient is not finite is not stepped any more, and counts as diverged: some optimizers, among
    them those that decompose matrices, would raise an error.
    """

    def __init__(self, task: VectorizedTask, parameters: Tensor, make: ForEach) -> None:
        self.task, self.parameters = task, parameters
        self.tensors = [_own_names(task.named(row)) for row in parameters]
        for tensor in (each for run in self.tensors for each in run.values()):
            tensor.requires_grad_()
        self.optimizers: list[Any] = [make.build(Model(task.skeleton.module, run)) for run in self.tensors]
        self.running = torch.ones(task.instances, dtype=torch.bool, device=parameters.device)
        self.averages = all(hasattr(optimizer, "eval") for optimizer in self.optimizers)
        self.shown = parameters

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """Losses of all runs, where they are evaluated."""
        losses = None
        if self.averages:
            state = global_state(self.task.device)
            self.shown = self._average()
            losses = self.task.losses(self.shown, batch)
            set_global_state(state, self.task.device)
        here, grads = self.task.losses_and_grads(self.parameters, batch)
        losses = here if losses is None else losses
        self.running &= losses.isfinite() & grads.isfinite().all(1)
        for run, row in zip(self.tensors, grads, strict=True):
            for tensor, grad in zip(run.values(), self.task.named(row).values(), strict=True):
                tensor.grad = grad
        return losses

    def step(self) -> None:
        """One step of each run that is still finite; parameters of the others become not a number."""
        for optimizer, row, running in zip(self.optimizers, self.parameters, self.running.tolist(), strict=True):
            if running:
                optimizer.step()
            else:
                row.fill_(torch.nan)

    def _average(self) -> Tensor:
        """Where the optimizers are to be evaluated; they and the parameters are as before."""
        trained = self.parameters.clone()
        for optimizer in self.optimizers:
            optimizer.eval()
        average = self.parameters.clone()
        for optimizer in self.optimizers:
            optimizer.train()
        self.parameters.copy_(trained)
        return average


def stepper(
    task: VectorizedTask, parameters: Tensor, make: MakeOptimizer | ForEach, *, by_tensor: bool = False
) -> Stepper:
    """What steps ``parameters`` ``(instances, N)``, in place.

    Args:
        task: what is trained.
        parameters: of all runs.
        make: the optimizer of all runs, or what makes one for each.
        by_tensor: give the optimizer of all runs their tensors in their shapes.
    """
    if isinstance(make, ForEach):
        return Apart(task, parameters, make)
    return Together(task, parameters, make, by_tensor)


def _own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the task's module, which is a part of the one that is trained."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
