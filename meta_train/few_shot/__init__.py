"""Few-shot learning: starting points, rates and rules from which a learner adapts to a new task in a few steps."""

from learned_optim.meta_train.few_shot.evaluation import Evaluation, evaluate
from learned_optim.meta_train.few_shot.model import AdaptedModel, FewShotModel

__all__ = ["AdaptedModel", "Evaluation", "FewShotModel", "evaluate"]
