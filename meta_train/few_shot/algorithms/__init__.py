"""Few-shot algorithms, and the baselines beside them, one file each."""

from learned_optim.meta_train.few_shot.algorithms.base import Adapted, Algorithm, MetaGradient
from learned_optim.meta_train.few_shot.algorithms.fomaml import FOMAML
from learned_optim.meta_train.few_shot.algorithms.gradient import GradientAlgorithm
from learned_optim.meta_train.few_shot.algorithms.leap import Leap
from learned_optim.meta_train.few_shot.algorithms.maml import MAML
from learned_optim.meta_train.few_shot.algorithms.matching import Matching
from learned_optim.meta_train.few_shot.algorithms.meta_lstm import MetaLSTM
from learned_optim.meta_train.few_shot.algorithms.meta_sgd import MetaSGD
from learned_optim.meta_train.few_shot.algorithms.nearest_neighbour import NearestNeighbour
from learned_optim.meta_train.few_shot.algorithms.pretraining import Pretraining
from learned_optim.meta_train.few_shot.algorithms.prototypical import Prototypical
from learned_optim.meta_train.few_shot.algorithms.reptile import Reptile
from learned_optim.meta_train.few_shot.algorithms.scratch import Scratch

__all__ = [
    "FOMAML",
    "MAML",
    "Adapted",
    "Algorithm",
    "GradientAlgorithm",
    "Leap",
    "Matching",
    "MetaGradient",
    "MetaLSTM",
    "MetaSGD",
    "NearestNeighbour",
    "Pretraining",
    "Prototypical",
    "Reptile",
    "Scratch",
]
