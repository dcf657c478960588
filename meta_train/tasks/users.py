"""A user's own model, from a Python file, as a task family."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from learned_optim.meta_train.common.module_search import find_file
from learned_optim.meta_train.tasks.base import Batch, Split, Task, TaskFamily


@dataclass(frozen=True)
class SingleTask(TaskFamily):
    """One task, whatever the draw and the split."""

    task: Task

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """The task."""
        return self.task


class ModelTask(Task):
    """A plain module with a few functions.

    Args:
        build: makes a freshly initialised module.
        draw: generator -> the batch of one step, a tensor or a nest of tuples and dicts of them.
        evaluate: module and batch -> loss, a 0-d tensor.
        draw_held_out: generator -> a batch of data that ``draw`` never gives; None: there are none.
        count: module and batch -> share of right predictions; None: no classes are predicted.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        draw: Callable[[torch.Generator], Batch],
        evaluate: Callable[[nn.Module, Batch], Tensor],
        draw_held_out: Callable[[torch.Generator], Batch] | None = None,
        count: Callable[[nn.Module, Batch], Tensor | float] | None = None,
    ) -> None:
        self.build, self.draw, self.evaluate = build, draw, evaluate
        self.draw_held_out, self.count = draw_held_out, count

    def module(self) -> nn.Module:
        """A fresh module."""
        return self.build()

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """A batch for every instance."""
        batches = [self.draw(generator) for _ in range(instances)]
        return tree_map(lambda *tensors: torch.stack(tensors), *batches)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The user's loss."""
        return self.evaluate(module, batch)

    def accuracy(self, module: nn.Module, batch: Batch) -> Tensor | float | None:
        """The user's share of right predictions, where there is one."""
        return None if self.count is None else self.count(module, batch)

    def hold_out(self) -> tuple[Task, Task]:
        """This task, and the same one on the user's held-out data."""
        if self.draw_held_out is None:
            raise ValueError("no function held_out(generator) beside batch(generator)")
        return self, ModelTask(self.build, self.draw_held_out, self.evaluate, count=self.count)


def load_model(name: str) -> type[TaskFamily] | TaskFamily:
    """The family that ``FILE.py:Class`` names.

    The class is a sub-class of ``TaskFamily`` (returned as it is), of ``Task`` or of ``nn.Module``; the last two are
    constructed without arguments, and beside a module the file defines ``batch(generator)``, the data of one step, and
    ``loss(model, batch)``. A function that returns a fresh module may stand in place of its class. Two more functions
    are used where the file has them: ``held_out(generator)``, a batch of data that training never sees, and
    ``accuracy(model, batch)``, the share of right predictions.
    The file is run, with its folder importable, as ``python FILE.py`` would.

    Raises:
        FileNotFoundError: no such file.
        AttributeError: no such class in it, or no ``batch`` or ``loss`` beside a module.
        ImportError: the file cannot be run.
        TypeError: the class is none of these.
    """
    file, _, attribute = name.partition(":")
    module = _run_file(Path(file))
    cls: Any = getattr(module, attribute, None)
    if cls is None:
        raise AttributeError(f"{file} defines no {attribute!r}; write FILE.py:CLASS")
    if not isinstance(cls, FunctionType):
        if not isinstance(cls, type) or not issubclass(cls, TaskFamily | Task | nn.Module):
            raise TypeError(
                f"{name!r} must be a sub-class of TaskFamily, of Task or of torch.nn.Module, or a function that "
                "returns a module"
            )
        if issubclass(cls, TaskFamily):
            return cls
        if issubclass(cls, Task):
            return SingleTask(cls())
    for function, signature in (("batch", "batch(generator)"), ("loss", "loss(model, batch)")):
        if not callable(getattr(module, function, None)):
            raise AttributeError(f"beside the module {attribute!r}, {file} must define a function {signature}")
    held_out, accuracy = (_function(module, function) for function in ("held_out", "accuracy"))
    return SingleTask(ModelTask(cls, module.batch, module.loss, held_out, accuracy))


def _function(module: ModuleType, name: str) -> Any:
    """A function of a module; None if the name is not there or is something else."""
    found = getattr(module, name, None)
    return found if callable(found) else None


def _run_file(path: Path) -> ModuleType:
    path = find_file(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pydantic and dataclasses look up a class's annotations
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[spec.name]
        if isinstance(error, Exception):
            raise ImportError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
        raise
    return module
