"""Meta-train a rule for a model of your own, and see what that gains.

    pip install 'learned-optim[train]'
    python examples/meta_train_for_my_model.py

The model tells two spirals apart. A rule is meta-trained on such trainings for two minutes, saved as
`spirals.safetensors`, and then trains new networks on new spirals, beside the default rule and Adam at its best of
several rates. Prints validation scores (final over initial loss) of what the rule should get below, and of the rule now
and then; then the final loss of each optimizer: the mean of the last tenth of the steps, over 8 seeds.

`learned-optim specialise examples/meta_train_for_my_model.py:SpiralFamily --steps 300` does it in one command.

docs/meta-training.md does the same from the command line, with the same settings, tuned baselines, bands and figures.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, save_rule
from learned_optim.meta_train.benchmark.evaluation import Problem, final_loss
from learned_optim.meta_train.config.load import config_from_tables
from learned_optim.meta_train.tasks import DataTask, Split, TaskFamily
from learned_optim.meta_train.trainer.trainer import Trainer

INNER_STEPS = 300


def spirals(rng: np.random.Generator, points: int = 1000) -> tuple[Tensor, Tensor]:
    """Places ``(points, 2)`` on two noisy spirals and which one, ``(points,)``."""
    kinds = rng.integers(2, size=points)
    radius = rng.uniform(0.2, 1.0, points)
    angles = 3 * np.pi * radius + np.pi * kinds + rng.uniform(0, 2 * np.pi)
    places = radius * np.stack([np.cos(angles), np.sin(angles)]) + rng.normal(0, 0.02, (2, points))
    return torch.from_numpy(places.T).float(), torch.from_numpy(kinds)


class Spirals(DataTask):
    """One training of the model. All instances are vectorised: write it for a single one."""

    def module(self) -> nn.Module:
        """The model."""
        return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Its loss on a batch."""
        places, kinds = batch
        return nn.functional.cross_entropy(module(places), kinds)


@dataclass(frozen=True)
class SpiralFamily(TaskFamily):
    """Trainings to learn from: every one has spirals of its own. The fields are options of the configuration."""

    batch_size: int = 64

    def sample(self, rng: np.random.Generator, split: Split) -> Spirals:
        """A new pair of spirals; drawn afresh, so no split shares data with another."""
        return Spirals(spirals(rng), self.batch_size)


def main() -> None:
    """Meta-train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="meta-steps")
    parser.add_argument("--output", type=Path, default=Path("spirals.safetensors"))
    options = parser.parse_args()
    config = config_from_tables(
        {
            "steps": options.steps,
            "tasks": [{"family": f"{Path(__file__).resolve()}:SpiralFamily"}],
            "unroll": {
                "truncation": min(50, 10 * options.steps),
                "horizon": [50, 2 * INNER_STEPS],
                "instances": 16,
                "pool": 4,
                "stagger": options.steps >= 100,
            },
            "estimator": {"name": "es-single", "meta_loss": "log-of-mean", "sigma": 0.02},
            "meta_optimizer": {
                "lr": 1e-3,
                "rates": {"output_bias": 5e-3},
                "schedule": "cosine",
                "average": 0.98,
            },
            "validation": {"every": 50, "horizon": min(INNER_STEPS, 10 * options.steps), "tasks": 2},
        }
    )
    trainer = Trainer(config)
    for progress in trainer.run():
        if progress.meta_step == 1:
            scores = ", ".join(f"{name} {score:.3f}" for name, score in trainer.baselines.items())
            print(f"validation scores before meta-training: {scores}")
        if progress.validation is not None:
            print(f"meta-step {progress.meta_step}: validation score {progress.validation:.3f}")
    save_rule(trainer.best, options.output, trainer.provenance(trainer.best_meta_step))

    problem = Problem(SpiralFamily(), seeds=8, steps=min(INNER_STEPS, 10 * options.steps), seed=1)
    for name in ("default", str(options.output)):
        losses = problem.run(lambda parameters, name=name: LearnedOptimizer(parameters, name))
        print(f"{name}: {final_loss(losses).mean():.4f}")
    rates = (0.1, 0.03, 0.01, 0.003, 0.001)
    adam = {
        rate: final_loss(problem.run(lambda parameters, rate=rate: torch.optim.Adam(parameters, rate))).mean()
        for rate in rates
    }
    best = min(adam, key=adam.__getitem__)
    print(f"Adam at {best:g}, the best of {rates}: {adam[best]:.4f}")


if __name__ == "__main__":
    main()
