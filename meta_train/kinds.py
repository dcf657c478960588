"""All kinds of run, for the command line: the one place besides the few-shot room that knows of few-shot runs."""

from learned_optim.meta_train.few_shot.kind import FEW_SHOT
from learned_optim.meta_train.trainer.kind import RULE, RunKind

KINDS: tuple[RunKind, ...] = (RULE, FEW_SHOT)
"""Runs that train a rule, and those that train a few-shot algorithm."""
