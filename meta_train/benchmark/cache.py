"""Results on disk, one small file a run, named by a hash of everything that determines it."""

import ast
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils._pytree import tree_leaves

from learned_optim.files import write_atomically
from learned_optim.meta_train.benchmark.evaluation import comparison_task
from learned_optim.meta_train.common.seeds import cpu_by_default, torch_generator
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Batch, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.users import ModelTask
from learned_optim.rules import UpdateRule

CACHE_VERSION = 1
"""Version of the stored results: raise it when a change of training or tuning makes the stored ones wrong."""

MEASURES = ("accuracy",)
"""Methods of tasks that only measure: trainings are the same with and without them."""

Key = Mapping[str, Any]
"""Everything that determines a result; plain values."""


def default_folder() -> Path:
    """``learned_optim/benchmark`` in the user's cache."""
    return data.cache_folder().with_name("benchmark")


class Cache:
    """Arrays by key, in files of their own.

    Args:
        folder: the folder of the stored runs; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: Key, compute: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """The arrays of ``key``, from its file or computed and then stored. A damaged file counts as none."""
        if self.folder is None:
            return compute()
        path = self.path(key)
        stored = _read(path, key)
        if stored is not None:
            return stored
        arrays = compute()
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        write_atomically(path, save(tensors, {"key": _canonical(key)}))
        return arrays

    def path(self, key: Key) -> Path:
        """The file with the result of ``key``, whether it is there or not."""
        if self.folder is None:
            raise ValueError("this cache has no folder")
        name = hashlib.sha256(_canonical(key).encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:32]}.safetensors"


@cpu_by_default()
def problem_fingerprint(family: TaskFamily, split: Split, draw: int) -> str:
    """A hash of one instance of the task: parameters, buffers, first batch, code of its classes and their bases.

    So another data set, another option or an edited loss is another problem. Code counts without its comments,
    docstrings and layout, and that of this package without the methods ``accuracy``, by which nothing is trained.
    """
    task = comparison_task(family, split, draw)
    return task_fingerprint(VectorizedTask(task, 1, seed=0), type(family))


def task_fingerprint(task: VectorizedTask, *more: type) -> str:
    """A hash of the instances of a task: parameters, buffers, first batch, code of its classes and their bases.

    Args:
        task: instances with their starting points.
        more: further classes whose code counts.
    """
    digest = hashlib.sha256()
    for tensor in tree_leaves([task.initial_parameters, task.buffers, task.batch(torch_generator(0, "fingerprint"))]):
        _add(digest, tensor)
    classes = {*more, type(task.task), *(type(module) for module in task.skeleton.module.modules())}
    definitions: list[type | FunctionType] = [ancestor for cls in classes for ancestor in cls.__mro__]
    if isinstance(task.task, ModelTask):  # a user's functions, which need no class of theirs
        definitions += [value for value in vars(task.task).values() if isinstance(value, FunctionType)]
    for code in sorted(set(map(_code, definitions))):
        digest.update(code.encode())
    return digest.hexdigest()


def held_out_fingerprint(task: Task, batch: Batch) -> str:
    """A hash of what is measured beside a training: a batch of the data held out, and the code of the accuracy.

    Args:
        task: on the data held out.
        batch: always drawn alike.
    """
    digest = hashlib.sha256()
    for tensor in tree_leaves(batch):
        _add(digest, tensor)
    for cls in type(task).__mro__:
        digest.update(_code(cls, measures=True).encode())
    return digest.hexdigest()


def rule_fingerprint(rule: UpdateRule) -> str:
    """A hash of a rule's weights, settings and code."""
    digest = hashlib.sha256(json.dumps([rule.name, dict(rule.settings)], sort_keys=True).encode())
    for name, tensor in sorted(rule.state_dict().items()):
        digest.update(name.encode())
        _add(digest, tensor)
    digest.update(_code(type(rule)).encode())
    return digest.hexdigest()


def code_fingerprint(*classes: type) -> str:
    """A hash of the modules that define classes, without comments, docstrings and layout."""
    return hashlib.sha256("".join(map(_code, classes)).encode()).hexdigest()


def _add(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _code(cls: type | FunctionType, *, measures: bool = False) -> str:
    """The module that defines a class or function, as a syntax tree without docstrings; without source its name.

    Args:
        cls: the class or function.
        measures: with this package's methods :data:`MEASURES` too.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    package = cls.__module__.partition(".")[0]
    if package == "torch" or package in sys.stdlib_module_names or file is None or not file.endswith(".py"):
        return name
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    left_out = () if measures or package != "learned_optim" else MEASURES
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not (_is_text(part) or _is_method(node, part, left_out))]
    return ast.dump(tree)


def _is_method(parent: ast.AST, part: ast.stmt, names: tuple[str, ...]) -> bool:
    return isinstance(parent, ast.ClassDef) and isinstance(part, ast.FunctionDef) and part.name in names


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _canonical(key: Key) -> str:
    return json.dumps({"version": CACHE_VERSION, "torch": torch.__version__, **key}, sort_keys=True, allow_nan=False)


def _read(path: Path, key: Key) -> dict[str, np.ndarray] | None:
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("key") != _canonical(key):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError):
        return None
