"""Evaluation of learners on new tasks: loss and accuracy on queries, episode by episode."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learned_optim.meta_train.common.seeds import derive_seed, fixed_global_state, torch_generator
from learned_optim.meta_train.few_shot.algorithms import Algorithm
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.tasks import Split

TOGETHER = 50  # episodes in one pass: enough to keep a core busy, and images of so many fit anywhere


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy on the queries of some episodes, after 0, 1, ... inner steps."""

    losses: Tensor
    """``(episodes, steps + 1)``, float64; a single column for algorithms without inner steps."""
    accuracies: Tensor | None
    """Accuracies in the same places, 0..1; None: regression."""
    transductive: bool
    """Whether batch norm took its statistics from all queries of an episode together (in a learner that has any)."""
    batch_norm: bool
    """Whether the learner has batch norm."""

    @property
    def statistics(self) -> str:
        """The source of batch norm's statistics, in words for tables."""
        if not self.batch_norm:
            return "no batch norm"
        return "transductive" if self.transductive else "not transductive"

    def summary(self) -> dict[str, Any]:
        """Means and half widths of their 95% intervals at every step; for JSON."""
        parts = {"loss": self.losses} | ({} if self.accuracies is None else {"accuracy": self.accuracies})
        columns = {name: mean_and_interval(values) for name, values in parts.items()}
        rows: list[dict[str, float]] = []
        for step in range(self.losses.shape[1]):
            row: dict[str, float] = {"step": step}
            for name, (mean, interval) in columns.items():
                row |= {name: float(mean[step]), f"{name}_95": float(interval[step])}
            rows.append(row)
        return {"episodes": len(self.losses), "batch_norm": self.statistics, "steps": rows}


def mean_and_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over episodes of ``(episodes, ...)``, and half the width of its 95% confidence interval."""
    return values.mean(0), 1.96 * values.std(0) / len(values) ** 0.5


@torch.no_grad()
def evaluate(
    algorithm: Algorithm,
    learner: Learner,
    episodes: int,
    steps: int,
    *,
    seed: int = 0,
    split: Split = "test",
    transductive: bool = True,
) -> Evaluation:
    """Adapt to ``episodes`` tasks and judge the learners after every inner step.

    Args:
        algorithm: is not changed.
        learner: the module.
        episodes: number of tasks; the same ones at every call with the same seed.
        steps: inner steps.
        seed: determines the tasks.
        split: part of the data.
        transductive: whether batch norm may take its statistics from all queries of an episode together.

    Raises:
        ValueError: fewer than two episodes, which have no interval, or a negative number of steps.
    """
    if episodes < 2 or steps < 0:
        raise ValueError(f"at least 2 episodes and no negative number of steps, got {episodes} and {steps}")
    task = learner.few_shot
    losses, accuracies = [], []
    for number, begin in enumerate(range(0, episodes, TOGETHER)):
        generator = torch_generator(seed, f"few-shot {split}", number)
        count = min(TOGETHER, episodes - begin)
        drawn = task.episodes(count, generator, split, task.evaluation_queries).to(learner.device)
        inputs, targets = drawn.query
        with fixed_global_state(derive_seed(seed, "few-shot dropout", number), learner.device):
            adapted = algorithm.adapt(learner, drawn.support, steps, generator)
            predictions = [learners.predict(inputs, transductive=transductive) for learners in adapted]
        losses.append(torch.stack([task.losses(each, targets) for each in predictions], 1))
        if task.ways is not None:
            right = [(each.argmax(-1) == targets).double().mean(1) for each in predictions]
            accuracies.append(torch.stack(right, 1))
    return Evaluation(
        torch.cat(losses).double().cpu(),
        torch.cat(accuracies).cpu() if accuracies else None,
        transductive,
        learner.couples_examples,
    )
