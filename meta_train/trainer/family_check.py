"""Whether a family can be trained at all: found out in a second, before minutes are spent on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from learned_optim.meta_train.common.seeds import fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.config.load import Config
from learned_optim.meta_train.inner.unroll import start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Split, Task
from learned_optim.rules import UpdateRule

INSTANCES = 2
STEPS = 3


def check_family(config: Config, name: str) -> None:
    """Draw a task of every family and split, and train it for some steps by the rule that a run starts from.

    Args:
        config: of the run.
        name: how an error calls the family.

    Raises:
        ConfigError: it has no parameters, its shapes change, its loss is no positive number or does not depend on the
            parameters, or its code fails.
    """
    rule = config.rule.build(config.seed)
    for family in (entry.build() for entry in config.tasks):
        for split in get_args(Split):
            with _failing(name, f"sample(rng, {split!r})"):
                task = family.sample(numpy_generator(config.seed, "family check"), split)
            with fixed_global_state(config.seed):
                _check_module(task, name)
                _check_batch(task, name)
                _check_training(task, rule, f"{name}, split {split!r}")


def _check_module(task: Task, name: str) -> None:
    with _failing(name, "module()"):
        first, second = (
            {key: tensor.shape for key, tensor in task.module().named_parameters() if tensor.requires_grad}
            for _ in range(2)
        )
    if not first:
        raise ConfigError(f"{name}: the module has no parameters to train")
    if first != second:
        raise ConfigError(
            f"{name}: the shapes of the module's parameters change from call to call; fix them in the task"
        )


def _check_batch(task: Task, name: str) -> None:
    generator = torch_generator(0, "family check")
    with _failing(name, "batch()"):
        batches = [tree_leaves(task.batch(INSTANCES, generator)) for _ in range(2)]
    shapes = [[tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)] for leaves in batches]
    if any(not shape or shape[0] != INSTANCES for shape in shapes[0]):
        raise ConfigError(
            f"{name}: batch({INSTANCES}, generator) must give tensors ({INSTANCES}, ...), got {shapes[0]}"
        )
    if shapes[0] != shapes[1]:
        raise ConfigError(f"{name}: the shapes of batches change from step to step, from {shapes[0]} to {shapes[1]}")


def _check_training(task: Task, rule: UpdateRule, name: str) -> None:
    with _failing(name, "loss(module, batch), vectorised,"), torch.no_grad():
        vectorized = VectorizedTask(task, INSTANCES, seed=0).in_steps_of(rule)
        generator = torch_generator(0, "family check")
        state = start(rule, vectorized, generator)
    loss = state.initial_loss
    if not bool(loss.isfinite().all()):
        raise ConfigError(f"{name}: the loss is not finite before the first step: {loss.tolist()}")
    if not bool((loss > 0).all()):
        raise ConfigError(
            f"{name}: the loss must be positive before the first step, got {loss.tolist()}; add a constant to it"
        )
    if not bool(state.grad.isfinite().all()):
        raise ConfigError(f"{name}: the gradient is not finite before the first step")
    if not bool(state.grad.any()):
        raise ConfigError(f"{name}: the loss does not depend on the module's parameters: the gradient is zero")
    with _failing(name, "training"), torch.no_grad():
        losses = unroll(rule, vectorized, state, STEPS, generator).losses
    if not bool(losses.isfinite().all()):
        raise ConfigError(f"{name}: the loss is not finite after {STEPS} steps: {losses[-1].tolist()}")


@contextmanager
def _failing(name: str, what: str) -> Iterator[None]:
    """Name the part of a family whose code fails."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's code raises
        message = " ".join(str(error).split())
        raise ConfigError(f"{name}: {what} fails: {type(error).__name__}: {message}") from error
