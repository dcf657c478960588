"""Gradient estimators: from a window of inner training to a meta-gradient, one file each."""

from learned_optim.meta_train.estimators.truncated_bptt import MetaGradient, truncated_bptt

__all__ = ["MetaGradient", "truncated_bptt"]
