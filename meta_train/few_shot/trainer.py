"""Meta-training of a few-shot algorithm, on the loop that trains rules as well."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learned_optim.meta_train.common.seeds import cpu_by_default, derive_seed, fixed_global_state, torch_generator
from learned_optim.meta_train.few_shot.algorithms import Algorithm
from learned_optim.meta_train.few_shot.evaluation import Evaluation, evaluate
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.few_shot.model import save_few_shot
from learned_optim.meta_train.few_shot.settings import FewShotConfig, few_shot_config, is_few_shot
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.trainer.checkpoint import CHECKPOINT_FILE, read_checkpoint, restoring
from learned_optim.meta_train.trainer.log import Progress
from learned_optim.meta_train.trainer.loop import MetaTraining


class FewShotTrainer(MetaTraining[FewShotConfig, Algorithm]):
    """Meta-trains one algorithm. Everything random follows from the configuration's seed and counters.

    Args:
        config: the run's configuration.
        folder: folder of checkpoints, weights and logs; None keeps everything in memory.
        device: device on which learners are adapted.
        world: the processes of the run; a few-shot run takes one.
        resuming: read no rule's file: :meth:`resume` brings the weights.

    Raises:
        ValueError: there are several processes, or the algorithm learns nothing.
    """

    module_name = "algorithm"

    @cpu_by_default()
    def __init__(
        self,
        config: FewShotConfig,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        world: World | None = None,
        *,
        resuming: bool = False,
    ) -> None:
        world = World() if world is None else world
        if world.size > 1:
            raise ValueError(f"a few-shot run takes one process, got {world.size}; start it without torchrun")
        self.learner = Learner(config.task.build(), config.seed, device=device)
        initial = self.learner.fresh_parameters
        algorithm = config.algorithm.build(self.learner.few_shot, initial, config.seed, fresh=resuming)
        if not algorithm.learned():
            name = config.algorithm.name
            raise ValueError(f"{name!r} learns nothing across tasks; evaluate it with learned-optim few-shot")
        super().__init__(config, folder, torch.device(device), algorithm, world)

    def _step(self) -> Progress:
        config, details = self.config, {"meta_optimizer/lr": self.meta_optimizer.rate(self.meta_step)}
        generator = torch_generator(config.seed, "episodes", self.meta_step)
        episodes = self.learner.few_shot.episodes(config.episodes, generator).to(self.device)
        with fixed_global_state(derive_seed(config.seed, "dropout", self.meta_step), self.device):
            outcome = self.module.meta_gradient(self.learner, episodes, generator)
        meta_loss = float(outcome.meta_loss)
        grad_norm = self._update(outcome.grads, math.isfinite(meta_loss))
        validation = None
        if self.meta_step % config.validation.every == 0 or self.finished:
            validation = self._validate(details)
        return Progress(
            meta_step=self.meta_step,
            meta_loss=meta_loss,
            inner_loss=float(outcome.initial_loss),
            grad_norm=grad_norm,
            skipped=self.skipped,
            validation=validation,
            best_validation=self.best_validation,
            seconds=self.seconds,
            details=details,
        )

    def _validate(self, details: dict[str, float]) -> float:
        """Error rate (regression: loss) of the averaged version on held-out episodes; kept if it is the best so far."""
        evaluation = self.evaluate(self.averaged)
        details["validation/loss"] = float(evaluation.losses[:, -1].mean())
        score = details["validation/loss"]
        if evaluation.accuracies is not None:
            details["validation/accuracy"] = float(evaluation.accuracies[:, -1].mean())
            score = 1 - details["validation/accuracy"]
        self._keep_best(score)
        return score

    @cpu_by_default()
    def evaluate(self, algorithm: Algorithm) -> Evaluation:
        """A version of the algorithm on the validation episodes, always the same ones."""
        settings = self.config.validation
        return evaluate(
            algorithm,
            self.learner,
            settings.episodes,
            self.config.validation_steps,
            seed=self.config.seed,
            split="validation",
            transductive=settings.transductive,
        )

    @property
    def detail_names(self) -> list[str]:
        """All names that a :attr:`Progress.details` may have."""
        accuracy = [] if self.learner.few_shot.ways is None else ["validation/accuracy"]
        return ["meta_optimizer/lr", "validation/loss", *accuracy]

    def _state(self) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Tensor]]]:
        return {}, {}

    def save_weights(self, module: Algorithm, path: Path, meta_step: int) -> None:
        """Write a version of the algorithm, with the configuration of its learner, for use."""
        save_few_shot(module, self.config, path, self.provenance(meta_step))

    @classmethod
    @cpu_by_default()
    def resume(cls, folder: Path, device: torch.device | str = "cpu", world: World | None = None) -> "FewShotTrainer":
        """Go on from the checkpoint in ``folder``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or not a few-shot checkpoint.
        """
        checkpoint = read_checkpoint(folder)
        if not is_few_shot(checkpoint.config):
            raise ValueError(f"{folder} holds the run of a rule, not a few-shot run")
        config = few_shot_config(checkpoint.config, str(folder / CHECKPOINT_FILE), resuming=True)
        trainer = cls(config, folder, device, world, resuming=True)
        with restoring(folder):
            trainer._restore(checkpoint.progress, checkpoint.tensors)
        return trainer
