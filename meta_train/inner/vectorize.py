"""Many instances of a task as one function of one matrix of parameters."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.utils._pytree import tree_map

from learned_optim.meta_train.common.seeds import fixed_global_state, global_state, set_global_state, torch_generator
from learned_optim.meta_train.inner.recorded import Recorded
from learned_optim.meta_train.tasks import Batch, Task
from learned_optim.rules import UpdateRule


class VectorizedTask:
    """``instances`` copies of a task, each with its own starting point, trained as one ``(instances, N)`` matrix.

    Args:
        task: the kind of optimizee.
        instances: number of copies, B.
        seed: determines all starting points and random problems.
        device: device of parameters and batches.
        scale: factor between stored and used parameters, broadcastable to ``(B, N)``: the loss sees
            ``scale * parameters``. Random scales teach a rule that the size of a parameter says little
            (Lv et al. 2017, section 4.1).
        random_signs: turn the sign of each stored parameter with probability 1/2, a factor of -1 on its scale. The task
            stays the same, but a step of all parameters in the same direction is no direction of its own any more:
            that one otherwise fills the meta-gradients of a rule that is not odd in the gradient with noise.
        outer: task of :meth:`outer_batch`, such as the second part of :meth:`Task.hold_out`; None: ``task``.
        anchor: whether a rule should learn to leave its outputs at zero here; see
            :class:`~learned_optim.meta_train.estimators.OutputES`.
        total_steps: inner steps that the rule is told the training will have; None: it is not told.
    """

    def __init__(
        self,
        task: Task,
        instances: int,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        scale: Tensor | None = None,
        random_signs: bool = False,
        outer: Task | None = None,
        anchor: bool = False,
        total_steps: int | None = None,
    ) -> None:
        self.anchor, self.total_steps = anchor, total_steps
        self._draws: bool | None = None  # whether the loss draws random numbers; None: not known yet
        self.outer = task if outer is None else outer
        self.task, self.instances, self.device = task, instances, torch.device(device)
        self.siblings, self.rows = instances, slice(None)  # instances that batches are drawn for, and ours of them
        with fixed_global_state(seed):
            modules = [LossModule(task, task.module()) for _ in range(instances)]
        stacked_parameters, stacked_buffers = stack_module_state(modules)
        trained = {name: tensor for name, tensor in stacked_parameters.items() if tensor.requires_grad}
        constant = {name: tensor for name, tensor in stacked_parameters.items() if not tensor.requires_grad}
        self.skeleton = modules[0]  # never used with its own tensors; on the meta device it would lose tied weights
        self.shapes = {name: tensor.shape[1:] for name, tensor in trained.items()}
        self.buffers = {name: tensor.detach().to(self.device) for name, tensor in (constant | stacked_buffers).items()}
        initial = torch.cat([tensor.detach().reshape(instances, -1) for tensor in trained.values()], dim=1)
        initial = initial.to(self.device)
        if random_signs:
            bits = torch.randint(2, initial.shape, generator=torch_generator(seed, "signs"), dtype=initial.dtype)
            scale = (2 * bits - 1) * (1 if scale is None else scale)
        self.scale = None if scale is None else scale.to(self.device)
        self.initial_parameters = initial if self.scale is None else initial / self.scale

    @torch.no_grad()
    def in_steps_of(self, rule: UpdateRule) -> "VectorizedTask":
        """This task in other units: a stored coordinate is the used one over its tensor's scale under the rule.

        A rule that does not depend on the size of gradients then trains it, all coordinates alike, as
        :class:`~learned_optim.LearnedOptimizer` trains the modules.
        """
        units = self.scales(rule)
        if units is None:
            return self
        task = copy.copy(self)
        task.scale = units if self.scale is None else self.scale * units
        task.initial_parameters = self.initial_parameters / units
        return task

    @torch.no_grad()
    def scales(self, rule: UpdateRule) -> Tensor | None:
        """:meth:`UpdateRule.tensor_scale` of each coordinate's tensor, ``(B, N)``; None if all are 1."""
        if not rule.uses_tensor_scale:
            return None
        parts = []
        for stored, shape in zip(self._split(self.initial_parameters), self.shapes.values(), strict=True):
            rms = stored.norm(dim=-1) / max(1, shape.numel()) ** 0.5
            scale = rule.tensor_scale(shape, rms) if len(shape) > 1 else None
            parts.append(torch.ones_like(stored) if scale is None else scale[:, None].expand_as(stored))
        scales = torch.cat(parts, 1)
        return None if bool((scales == 1).all()) else scales

    @functools.cached_property
    def decays(self) -> Tensor:
        """1 for coordinates of matrices and larger tensors, whose value a rule may know, 0 for others; ``(N,)``."""
        parts = [torch.full((shape.numel(),), float(len(shape) > 1)) for shape in self.shapes.values()]
        return torch.cat(parts).to(self.device)

    def progress(self, step: Tensor) -> Tensor | float:
        """The fraction of the training that is done with this step, as the rule is told it; 0 if it is not."""
        return 0.0 if self.total_steps is None else (step / (self.total_steps + 1)).clamp(max=1.0)

    def tensors(self, values: Tensor) -> list[Tensor]:
        """Views of ``values`` ``(B, N)``, instance by instance, in the shapes of the module's tensors."""
        rows = [self._split(row) for row in values]
        return [part.view(shape) for parts in rows for part, shape in zip(parts, self.shapes.values(), strict=True)]

    @property
    def coordinates(self) -> int:
        """Number of coordinates of one instance, N."""
        return self.initial_parameters.shape[1]

    def part(self, rows: slice) -> "VectorizedTask":
        """The instances ``rows`` alone. Batches are drawn for all and cut, so that each sees what it sees here."""
        part = copy.copy(self)
        for name in vars(self).keys() & {"_losses", "_grad_and_value", "_grads_of_instances", "_grads_of_copies"}:
            delattr(part, name)  # they would keep this task alive
        part.instances, part.rows = len(range(self.instances)[rows]), rows
        part.buffers = {name: tensor[rows].clone() for name, tensor in self.buffers.items()}
        part.scale = self.scale if self.scale is None or len(self.scale) == 1 else self.scale[rows].clone()
        part.initial_parameters = self.initial_parameters[rows].clone()
        return part

    @property
    def draws_random_numbers(self) -> bool:
        """Whether the loss itself does, as dropout does: then instances see other numbers when they are fewer."""
        return self._draws_random_numbers_on(self.batch(torch.Generator().manual_seed(0)))

    def _draws_random_numbers_on(self, batch: Batch) -> bool:
        if self._draws is None:
            with fixed_global_state(0, self.device), torch.no_grad():
                before = global_state(self.device)
                # with gradients: without them, vmap has no rule for torch's recurrent layers
                self._grad_and_value(self._used(self.initial_parameters), self.buffers, batch)
                self._draws = not all(map(torch.equal, before, global_state(self.device)))
        return self._draws

    def batch(self, generator: torch.Generator) -> Batch:
        """Fresh data for one inner step of every instance."""
        return self._ours(self.task.batch(self.siblings, generator))

    def outer_batch(self, generator: torch.Generator) -> Batch:
        """Fresh data on which the meta-loss alone is taken."""
        return self._ours(self.outer.batch(self.siblings, generator))

    def losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Loss of every instance, ``(B,)``, at ``parameters`` ``(B, N)``; or of particles, as below."""
        if parameters.dim() == 3:
            losses: Tensor = self._of_copies(self._losses, of_copies(self._losses), parameters, batch)
            return losses.view(parameters.shape[:2])
        return self._losses(self._used(parameters), self.buffers, batch)

    def losses_and_grads(
        self, parameters: Tensor, batch: Batch, *, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Losses ``(B,)`` and their gradients ``(B, N)`` with respect to ``parameters`` ``(B, N)``.

        ``parameters`` may also be those of *particles*, ``(P, b, N)``, with the losses ``(P, b)``: each particle trains
        b of the B instances, the first particles the first instances, and when these are used up it starts over. All
        that train the same instance see the same batch and the same dropout.

        ``differentiable`` lets the gradients be differentiated once more.
        """
        if differentiable and parameters.requires_grad:
            # vmap(grad) has wrong second derivatives through layer and batch norm (pytorch/functorch issue 534).
            losses = self.losses(parameters, batch)
            return losses, torch.autograd.grad(losses.sum(), parameters, create_graph=True)[0]
        if parameters.dim() == 3:
            grads, losses = self._of_copies(self._grad_and_value, self._grads_of_copies, parameters, batch)
            grads = grads if self.scale is None else grads * self.scale
            return losses.view(parameters.shape[:2]), grads.view(parameters.shape)
        grads, losses = self._grads_of_instances(self._used(parameters), self.buffers, batch)
        return losses, grads if self.scale is None else grads * self.scale

    @torch.no_grad()
    def evaluate(self, parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Losses and accuracies ``(B,)`` at ``parameters`` ``(B, N)``, as a user takes them after training.

        Instances are evaluated one by one, not vectorised, and in evaluation mode: nothing is dropped out. Accuracies
        are None where the task has none (:meth:`Task.accuracy`).
        """
        with _evaluation_mode(self.skeleton), fixed_global_state(0, self.device):
            rows = [self._evaluated(number, row, batch) for number, row in enumerate(self._used(parameters))]
        losses, accuracies = zip(*rows, strict=True)
        known = [torch.as_tensor(accuracy) for accuracy in accuracies if accuracy is not None]
        return torch.stack(losses), torch.stack(known) if known else None

    def _evaluated(self, number: int, parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor | float | None]:
        tensors = {**self.named(parameters), **{name: tensor[number] for name, tensor in self.buffers.items()}}
        own = tree_map(lambda tensor: tensor[number], batch)
        loss, accuracy = (functional_call(self.skeleton, tensors, (own, measure)) for measure in ("loss", "accuracy"))
        return loss, accuracy

    @functools.cached_property
    def _losses(self) -> Callable[..., Tensor]:
        return vmap(self._instance_loss, randomness="different")

    @functools.cached_property
    def _grad_and_value(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return vmap(grad_and_value(self._instance_loss), randomness="different")

    @functools.cached_property
    def _grads_of_instances(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return Recorded(self._grad_and_value) if self.task.same_operations else self._grad_and_value

    @functools.cached_property
    def _grads_of_copies(self) -> Callable[..., tuple[Tensor, Tensor]]:
        grads = of_copies(self._grad_and_value)
        return Recorded(grads) if self.task.same_operations else grads

    def _ours(self, batch: Batch) -> Batch:
        whole = self.instances == self.siblings
        return tree_map(lambda tensor: (tensor if whole else tensor[self.rows]).to(self.device), batch)

    def _of_copies(
        self, function: Callable[..., Any], together: Callable[..., Any], parameters: Tensor, batch: Batch
    ) -> Any:
        """``function`` at the parameters of particles ``(P, b, N)``, by instance: results of ``(P * b / B, B, ...)``.

        ``together`` is the same function of copies side by side.

        All copies of an instance see the same random numbers. A nested vmap has no rule for most operations that draw
        them, fused attention among these: then one copy follows the other, from the same global random state.
        """
        used = self._used(parameters.reshape(-1, self.instances, self.coordinates))
        if not self._draws_random_numbers_on(batch):
            return together(used, self.buffers, batch)
        state, results = global_state(self.device), []
        for copy_of_all in used:
            set_global_state(state, self.device)
            results.append(function(copy_of_all, self.buffers, batch))
        return tree_map(lambda *parts: torch.stack(parts), *results)

    def _used(self, parameters: Tensor) -> Tensor:
        return parameters if self.scale is None else parameters * self.scale

    def named(self, parameters: Tensor) -> dict[str, Tensor]:
        """Parameters of one instance ``(N,)`` as tensors of :attr:`skeleton`, by name."""
        parts = self._split(parameters)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """Tensor by tensor, the last axis of ``(..., N)``."""
        parts: tuple[Tensor, ...] = parameters.split([shape.numel() for shape in self.shapes.values()], -1)
        return parts

    def _instance_loss(self, parameters: Tensor, buffers: dict[str, Tensor], batch: Batch) -> Tensor:
        loss: Tensor = functional_call(self.skeleton, {**self.named(parameters), **buffers}, (batch,))
        return loss


def of_copies(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of parameters, buffers and batch for many copies of the parameters, which share the rest."""
    copies: Callable[..., Any] = vmap(function, in_dims=(0, None, None), randomness="same")
    return copies


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Every part of a module in evaluation mode, and as it was afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class LossModule(nn.Module):
    """A module whose call is the task's loss or accuracy, so that ``functional_call`` reaches whatever these use."""

    def __init__(self, task: Task, module: nn.Module) -> None:
        super().__init__()
        self.task, self.module = task, module

    def forward(self, batch: Batch, measure: Literal["loss", "accuracy"] = "loss") -> Any:
        """The task's loss on ``batch``, or its accuracy."""
        return self.task.loss(self.module, batch) if measure == "loss" else self.task.accuracy(self.module, batch)
