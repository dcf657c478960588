"""Optimizers that are learned, not hand-designed.

>>> from learned_optim import LearnedOptimizer
>>> optimizer = LearnedOptimizer(model.parameters())
"""

from learned_optim.checkpoint import available_rules, load_rule, save_rule
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.rules import UpdateRule

__version__ = "0.1.0"

__all__ = ["LearnedOptimizer", "UpdateRule", "__version__", "available_rules", "load_rule", "save_rule"]
