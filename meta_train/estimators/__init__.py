"""Gradient estimators: from a window of inner training to a meta-gradient, one file each."""

from learned_optim.meta_train.estimators.base import (
    Combination,
    Directions,
    Estimate,
    Estimator,
    Part,
    Trajectory,
    WindowShare,
)
from learned_optim.meta_train.estimators.combined import Combined
from learned_optim.meta_train.estimators.es import ES
from learned_optim.meta_train.estimators.es_single import ESSingle
from learned_optim.meta_train.estimators.output_es import OutputES
from learned_optim.meta_train.estimators.pes import PES
from learned_optim.meta_train.estimators.reparameterization import Reparameterization
from learned_optim.meta_train.estimators.truncated_bptt import TruncatedBPTT, WindowGradient, truncated_bptt

ESTIMATORS: dict[str, type[Estimator]] = {
    estimator.name: estimator
    for estimator in (TruncatedBPTT, Reparameterization, ES, Combined, PES, ESSingle, OutputES)
}
"""Estimators by the name that stands in a configuration."""

__all__ = [
    "ES",
    "ESTIMATORS",
    "PES",
    "Combination",
    "Combined",
    "Directions",
    "ESSingle",
    "Estimate",
    "Estimator",
    "OutputES",
    "Part",
    "Reparameterization",
    "Trajectory",
    "TruncatedBPTT",
    "WindowGradient",
    "WindowShare",
    "truncated_bptt",
]
