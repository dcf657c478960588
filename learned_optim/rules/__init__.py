"""Update rules: the learned functions, one file each, with the mathematics in ``forward``.

``base`` defines the interface; ``lstm`` and ``moments`` are parts that rules share. Of the shipped rules, whose weights
are in ``learned_optim/weights/``, ``default`` is a ``schedule_free_lstm``, and the others are ``lstm_l2l``.
"""

from learned_optim.rules.base import NO_CONDITIONS, Conditions, RuleSettings, RuleState, UpdateRule
from learned_optim.rules.lstm_l2l import LSTML2L
from learned_optim.rules.mlp import MLP
from learned_optim.rules.scale_free_lstm import ScaleFreeLSTM
from learned_optim.rules.schedule_free_lstm import ScheduleFreeLSTM

ARCHITECTURES: dict[str, type[UpdateRule]] = {
    rule.name: rule for rule in (LSTML2L, ScaleFreeLSTM, ScheduleFreeLSTM, MLP)
}
"""Architectures by name, as they stand in weights files and configurations."""

__all__ = [
    "ARCHITECTURES",
    "LSTML2L",
    "MLP",
    "NO_CONDITIONS",
    "Conditions",
    "RuleSettings",
    "RuleState",
    "ScaleFreeLSTM",
    "ScheduleFreeLSTM",
    "UpdateRule",
]
