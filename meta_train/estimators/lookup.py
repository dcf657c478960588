"""Estimators by the names and options that stand in configurations."""

from collections.abc import Mapping
from typing import Any

from learned_optim.meta_train.common.strict import checked_by_name
from learned_optim.meta_train.estimators import ESTIMATORS, Estimator, TruncatedBPTT

FORMER_ESTIMATOR_DEFAULTS: Mapping[str, Any] = {
    "second_derivatives": False,
    "replay_coordinates": None,
    "sigma": 0.01,
    "pairs": 1,
    "groups": None,
    "perturbed": None,
    "caution": 8.0,
    "covariance": True,
    "variance_decay": 0.0,
}
"""Options that earlier versions recorded for every estimator, at these values for those that do not have them."""


def build_estimator(table: Any, source: str) -> Estimator:
    """An estimator with its options checked.

    Args:
        table: ``name``, by default that of truncated backpropagation, and the options of the estimator.
        source: how an error calls the configuration.

    Raises:
        ConfigError: there is no such estimator, or it does not have an option, or does not take its value.
    """
    return checked_by_name(ESTIMATORS, table, source, "estimator", TruncatedBPTT.name, FORMER_ESTIMATOR_DEFAULTS)
