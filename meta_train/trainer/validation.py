"""The score of a rule on held-out tasks: one number for a suite."""

import math
from collections.abc import Iterator

import torch

from learned_optim.meta_train.common.seeds import derive_seed, fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.config.settings import Config, SuiteConfig
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.inner.unroll import check_positive, start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Split
from learned_optim.rules import UpdateRule

SOLVED, WORST = 1e-3, 10.0  # initial losses: a final loss counts as at least, and as at most, so much


class ValidationSuite:
    """Held-out tasks of some families; the same ones, with the same batches, at every call.

    Args:
        config: configuration of the run.
        suite: the suite's part of it.
        device: device on which tasks are trained.
        world: processes that the tasks are divided among; None: this one alone.
    """

    def __init__(self, config: Config, suite: SuiteConfig, device: torch.device, world: World | None = None) -> None:
        self.world = World() if world is None else world
        defaults = config.validation
        self.name, self.seed, self.device = suite.name, config.seed, device
        self.families = [family.build() for family in suite.families or config.tasks]
        self.suffix = f" {suite.name}" if suite.families else ""  # the mixture's tasks do not depend on its name
        self.horizon = suite.horizon or defaults.horizon
        self.tasks = suite.tasks or defaults.tasks
        self.instances = suite.instances or defaults.instances

    @torch.no_grad()
    def score(self, rule: UpdateRule, split: Split = "validation", horizon: int | None = None) -> float:
        """Geometric mean over tasks of the final loss relative to the initial one.

        The final loss is the mean over instances and the last tenth of the steps. A task counts as at least a
        thousandth, or a few noiseless ones would decide, and as ten if its loss grew further or is not finite.

        Args:
            rule: is not changed.
            split: part of the data.
            horizon: inner steps; None: the suite's own.

        Raises:
            ValueError: a task starts at a loss that is not positive.
        """
        steps = self.horizon if horizon is None else horizon
        logarithms = torch.zeros(len(self.families) * self.tasks, dtype=torch.float64)
        own = range(self.world.rank, len(logarithms), self.world.size)
        for number, (task, seed) in zip(own, self.vectorized_tasks(split, own), strict=True):
            task = task.in_steps_of(rule)
            generator = torch_generator(seed, "validation", number)
            with fixed_global_state(derive_seed(seed, "validation dropout"), self.device):
                state = start(rule, task, generator)
                check_positive(task, state, "a validation score is relative to the initial loss")
                losses = unroll(rule, task, state, steps, generator).losses
            final = losses[-max(1, steps // 10) :].mean(0)
            final = torch.minimum(final.nan_to_num(math.inf), WORST * state.initial_loss)
            logarithms[number] = math.log(max(float(final.mean() / state.initial_loss.mean()), SOLVED))
        return math.exp(sum(self.world.sum(logarithms).tolist()) / len(logarithms))

    def vectorized_tasks(self, split: Split, numbers: range | None = None) -> Iterator[tuple[VectorizedTask, int]]:
        """The tasks, each with the seed that it was drawn with; of all, those with these numbers."""
        for number in range(len(self.families) * self.tasks) if numbers is None else numbers:
            family_index, index = divmod(number, self.tasks)
            seed = derive_seed(self.seed, split + self.suffix, family_index, index)
            task = self.families[family_index].sample(numpy_generator(seed, "task"), split)
            yield VectorizedTask(task, self.instances, seed, device=self.device), seed
