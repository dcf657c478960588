"""Estimators by the names and options that stand in configurations."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from learned_optim.meta_train.common.strict import ConfigError, checked, unknown
from learned_optim.meta_train.estimators import ESTIMATORS, Estimator, TruncatedBPTT

FORMER_DEFAULTS: Mapping[str, Any] = {
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
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: estimator: a table is needed, got {table!r}")
    options = dict(table)
    name = options.pop("name", TruncatedBPTT.name)
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise ConfigError(f"{source}: estimator.name: {unknown(str(name), ESTIMATORS)}, got {name!r}")
    own = option_names(ESTIMATORS[name])
    for option, value in table.items():
        if option not in own and option in FORMER_DEFAULTS and value == FORMER_DEFAULTS[option]:
            del options[option]
    for option in options:
        if option not in own and any(option in option_names(other) for other in ESTIMATORS.values()):
            raise ConfigError(f"{source}: estimator: estimator {name!r} has no option {option!r}; it has {', '.join(own)}")
    return checked(ESTIMATORS[name], options, source, "estimator")


def option_names(estimator: type[Estimator]) -> list[str]:
    """The options of an estimator: those of its own, then those of every estimator."""
    shared = [field.name for field in dataclasses.fields(Estimator)]
    own = [field.name for field in dataclasses.fields(estimator) if field.name not in shared]
    return [*own, *shared]
