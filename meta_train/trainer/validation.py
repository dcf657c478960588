"""The score of a rule on held-out tasks: one number for a suite."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.common.seeds import derive_seed, fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.config.settings import Config, SuiteConfig
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.inner.unroll import check_positive, start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Split
from learned_optim.meta_train.trainer.tuned_adam import Drawn, Train, tuned_adam
from learned_optim.rules import UpdateRule

WORST = 10.0  # initial losses: a final loss counts as at most so much


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
        self.solved = defaults.solved
        self.families = [family.build() for family in suite.families or config.tasks]
        self.suffix = f" {suite.name}" if suite.families else ""  # the mixture's tasks do not depend on its name
        self.horizon = suite.horizon or defaults.horizon
        self.tasks = suite.tasks or defaults.tasks
        self.instances = suite.instances or defaults.instances

    @torch.no_grad()
    def score(self, rule: UpdateRule, split: Split = "validation", horizon: int | None = None) -> float:
        """Geometric mean over tasks of the final loss relative to the initial one.

        The final loss is the mean over instances and the last tenth of the steps. A task counts as at least
        :attr:`ValidationConfig.solved`, and as ten if its loss grew further or is not finite.

        Args:
            rule: is not changed.
            split: part of the data.
            horizon: inner steps; None: the suite's own.

        Raises:
            ValueError: a task starts at a loss that is not positive.
        """
        steps = self.horizon if horizon is None else horizon

        def train(task: VectorizedTask, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            task = task.in_steps_of(rule)
            state = start(rule, task, generator)
            check_positive(task, state, "a validation score is relative to the initial loss")
            return unroll(rule, task, state, steps, generator).losses, state.initial_loss

        return self.mean_of(lambda drawn: self.logarithm(drawn, train), split)

    @torch.no_grad()
    def adam_score(self, cache: Cache) -> float:
        """The score of Adam at the best rate for each task of the split "validation", as :meth:`score` is taken.

        Tuning is by the score itself, on the tasks that are scored. What it finds is stored by content, so that another
        run with the same validation tasks does not tune again.
        """

        def lowest(drawn: Drawn) -> float:
            return tuned_adam(drawn, self.logarithm, self.horizon, self.solved, cache)

        return self.mean_of(lowest, "validation")

    def mean_of(self, logarithm: Callable[[Drawn], float], split: Split) -> float:
        """Geometric mean over all tasks, of which every process takes some."""
        logarithms = torch.zeros(len(self.families) * self.tasks, dtype=torch.float64)
        own = range(self.world.rank, len(logarithms), self.world.size)
        for number, (task, seed) in zip(own, self.vectorized_tasks(split, own), strict=True):
            logarithms[number] = logarithm(Drawn(task, seed, number))
        return math.exp(sum(self.world.sum(logarithms).tolist()) / len(logarithms))

    def logarithm(self, drawn: Drawn, train: Train) -> float:
        """Log of the final over the initial loss of a training, within the bounds of :meth:`score`."""
        with fixed_global_state(derive_seed(drawn.seed, "validation dropout"), self.device):
            losses, initial = train(drawn.task, torch_generator(drawn.seed, "validation", drawn.number))
        final = losses[-max(1, len(losses) // 10) :].mean(0)
        final = torch.minimum(final.nan_to_num(math.inf), WORST * initial)
        return math.log(max(float(final.mean() / initial.mean()), self.solved))

    def vectorized_tasks(self, split: Split, numbers: range | None = None) -> Iterator[tuple[VectorizedTask, int]]:
        """The tasks, each with the seed that it was drawn with; of all, those with these numbers."""
        for number in range(len(self.families) * self.tasks) if numbers is None else numbers:
            family_index, index = divmod(number, self.tasks)
            seed = derive_seed(self.seed, split + self.suffix, family_index, index)
            task = self.families[family_index].sample(numpy_generator(seed, "task"), split)
            yield VectorizedTask(task, self.instances, seed, device=self.device), seed
