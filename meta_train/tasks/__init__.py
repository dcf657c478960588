"""Task families: distributions over optimizees, one file each."""

from learned_optim.meta_train.tasks.base import Batch, DataTask, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.conv_net import ConvNetFamily
from learned_optim.meta_train.tasks.mlp import MLPFamily
from learned_optim.meta_train.tasks.quadratic import QuadraticFamily

FAMILIES: dict[str, type[TaskFamily]] = {"quadratic": QuadraticFamily, "mlp": MLPFamily, "conv-net": ConvNetFamily}
"""Families by the name that stands in a configuration."""

__all__ = [
    "FAMILIES",
    "Batch",
    "ConvNetFamily",
    "DataTask",
    "MLPFamily",
    "QuadraticFamily",
    "Split",
    "Task",
    "TaskFamily",
]
