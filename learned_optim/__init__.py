"""Optimizers that are learned, not hand-designed.

>>> from learned_optim import LearnedOptimizer
>>> optimizer = LearnedOptimizer(model.parameters())
"""

import os
from typing import TYPE_CHECKING

# kernels/ and meta_train/ are sub-packages by links in this folder. In a clone without symbolic links, git's default on
# Windows, they are found beside this package.
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(__path__[0]))

if TYPE_CHECKING:
    from learned_optim.checkpoint import available_rules, load_rule, save_rule
    from learned_optim.optimizer import LearnedOptimizer
    from learned_optim.rules import UpdateRule
else:
    _MODULES = {
        "LearnedOptimizer": "optimizer",
        "UpdateRule": "rules",
        "available_rules": "checkpoint",
        "load_rule": "checkpoint",
        "save_rule": "checkpoint",
    }

    def __getattr__(name):
        """Import a public name when it is first used: ``learned-optim --help`` need not wait for torch."""
        import importlib

        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value

    def __dir__():
        return sorted({*globals(), *_MODULES})


__version__ = "0.1.0"

__all__ = ["LearnedOptimizer", "UpdateRule", "__version__", "available_rules", "load_rule", "save_rule"]
