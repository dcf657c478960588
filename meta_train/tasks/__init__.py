"""Task families: distributions over optimizees, one file each."""

from learned_optim.meta_train.tasks.augmentation import Augmentation
from learned_optim.meta_train.tasks.autoencoder import AutoencoderFamily
from learned_optim.meta_train.tasks.base import Batch, DataTask, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.classification import ClassificationTask
from learned_optim.meta_train.tasks.conv_net import ConvNetFamily
from learned_optim.meta_train.tasks.factorization import FactorizationFamily
from learned_optim.meta_train.tasks.fine_tuning import FineTuningFamily
from learned_optim.meta_train.tasks.implicit_picture import ImplicitPictureFamily
from learned_optim.meta_train.tasks.language_model import LanguageModelFamily
from learned_optim.meta_train.tasks.mlp import MLPFamily
from learned_optim.meta_train.tasks.neural_art import NeuralArtFamily
from learned_optim.meta_train.tasks.physics import PhysicsFamily
from learned_optim.meta_train.tasks.quadratic import QuadraticFamily
from learned_optim.meta_train.tasks.residual import ResidualFamily
from learned_optim.meta_train.tasks.softmax_regression import SoftmaxRegressionFamily
from learned_optim.meta_train.tasks.table import TableFamily
from learned_optim.meta_train.tasks.valleys import ValleyFamily
from learned_optim.meta_train.tasks.vision_transformer import VisionTransformerFamily

FAMILIES: dict[str, type[TaskFamily]] = {
    "quadratic": QuadraticFamily,
    "valleys": ValleyFamily,
    "factorization": FactorizationFamily,
    "softmax-regression": SoftmaxRegressionFamily,
    "mlp": MLPFamily,
    "conv-net": ConvNetFamily,
    "residual": ResidualFamily,
    "vision-transformer": VisionTransformerFamily,
    "fine-tuning": FineTuningFamily,
    "autoencoder": AutoencoderFamily,
    "language-model": LanguageModelFamily,
    "table": TableFamily,
    "implicit-picture": ImplicitPictureFamily,
    "neural-art": NeuralArtFamily,
    "physics": PhysicsFamily,
}
"""Families by the name that stands in a configuration."""

__all__ = [
    "FAMILIES",
    "Augmentation",
    "AutoencoderFamily",
    "Batch",
    "ClassificationTask",
    "ConvNetFamily",
    "DataTask",
    "FactorizationFamily",
    "FineTuningFamily",
    "ImplicitPictureFamily",
    "LanguageModelFamily",
    "MLPFamily",
    "NeuralArtFamily",
    "PhysicsFamily",
    "QuadraticFamily",
    "ResidualFamily",
    "SoftmaxRegressionFamily",
    "Split",
    "TableFamily",
    "Task",
    "TaskFamily",
    "ValleyFamily",
    "VisionTransformerFamily",
]
