"""Few-shot algorithms, one file each."""

from learned_optim.meta_train.few_shot.algorithms.base import Adapted, Algorithm, MetaGradient
from learned_optim.meta_train.few_shot.algorithms.fomaml import FOMAML
from learned_optim.meta_train.few_shot.algorithms.gradient import GradientAlgorithm
from learned_optim.meta_train.few_shot.algorithms.leap import Leap
from learned_optim.meta_train.few_shot.algorithms.maml import MAML
from learned_optim.meta_train.few_shot.algorithms.meta_lstm import MetaLSTM
from learned_optim.meta_train.few_shot.algorithms.meta_sgd import MetaSGD
from learned_optim.meta_train.few_shot.algorithms.reptile import Reptile

__all__ = [
    "FOMAML",
    "MAML",
    "Adapted",
    "Algorithm",
    "GradientAlgorithm",
    "Leap",
    "MetaGradient",
    "MetaLSTM",
    "MetaSGD",
    "Reptile",
]
