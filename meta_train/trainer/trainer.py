"""Meta-training of a rule: a pool of inner trainings, validation, what belongs into a checkpoint."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learned_optim.checkpoint import save_rule
from learned_optim.files import finite_or_none
from learned_optim.meta_train.common.seeds import cpu_by_default
from learned_optim.meta_train.config.load import Config, config_from_tables
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.tasks import Split
from learned_optim.meta_train.trainer.baselines import START, score_baselines
from learned_optim.meta_train.trainer.checkpoint import CHECKPOINT_FILE, below, read_checkpoint, restoring
from learned_optim.meta_train.trainer.curriculum import Curriculum
from learned_optim.meta_train.trainer.log import Progress
from learned_optim.meta_train.trainer.loop import MetaTraining
from learned_optim.meta_train.trainer.pool import Pool
from learned_optim.meta_train.trainer.validation import ValidationSuite
from learned_optim.rules import UpdateRule


class Trainer(MetaTraining[Config, UpdateRule]):
    """Meta-trains one rule.

    Everything random follows from the configuration's seed and counters, so a run that is interrupted and resumed
    takes bit by bit the course of one that was not (on the same machine and number of threads).

    Args:
        config: the run's configuration.
        folder: folder of checkpoints, weights and logs; None keeps everything in memory.
        device: device of inner training.
        rule: the rule that is meta-trained, from its present weights; None: the configuration's.
        world: the processes of the run, each with a trainer of its own; None: this one alone. All hold the same
            meta-parameters, to the bit; the leader writes.
    """

    module_name = "rule"

    @cpu_by_default()
    def __init__(
        self,
        config: Config,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        rule: UpdateRule | None = None,
        world: World | None = None,
    ) -> None:
        world = World() if world is None else world
        rule = config.rule.build(config.seed) if rule is None else rule
        super().__init__(config, folder, torch.device(device), rule, world)
        self.pool = Pool(config, self.device, rule, world)
        self.suites = {
            suite.name: ValidationSuite(config, suite, self.device, world) for suite in config.validation.suites
        }
        self.curriculum = None if config.curriculum is None else Curriculum(config.curriculum)

        self.baselines: dict[str, float] = {}
        """Validation scores of the start, the default rule, outputs of zero and tuned Adam; empty where not taken."""
        self.validation_seconds = 0.0
        """What a validation takes on the suite that chooses the weights; 0 where it was not measured."""

    def _before_first_step(self) -> None:
        if self.config.validation.baselines and not self.baselines:
            suite = self.suites[self.config.validation.selected]
            self.baselines, self.validation_seconds = score_baselines(self.averaged, suite, self.tell)
            self._keep_best(self.baselines[START])

    @property
    def gained(self) -> bool | None:
        """Whether some weights have a better validation score than the start; None: the start was not scored."""
        return self.best_meta_step > 0 if self.baselines else None

    # One meta-step

    @property
    def finished(self) -> bool:
        """Whether all meta-steps are done, or the curriculum has ended the run."""
        return self.meta_step >= self.config.steps or (self.curriculum is not None and self.curriculum.finished)

    def _step(self) -> Progress:
        details: dict[str, float] = {"meta_optimizer/lr": self.meta_optimizer.rate(self.meta_step)}
        horizon, curriculum = self.config.unroll.horizon, self.curriculum
        if curriculum is not None:
            if curriculum.best is None:
                self._evaluate(curriculum)  # the yardstick of a new stage
            horizon = (curriculum.horizon, curriculum.horizon)
            details["curriculum/horizon"] = curriculum.horizon
        outcome = self.pool.meta_gradient(self.meta_step, horizon)
        if outcome.agreement is not None:
            details["estimator/agreement"] = outcome.agreement
        grad_norm = self._update(outcome.grads, outcome.finite)
        if curriculum is not None and curriculum.due(self.meta_step):
            details["curriculum/score"] = self._evaluate(curriculum)
        scores = {}
        if self.meta_step % self.config.validation.every == 0 or self.finished:
            scores = self._validate()
            details |= {f"validation/{name}": score for name, score in scores.items() if len(scores) > 1}
        return Progress(
            meta_step=self.meta_step,
            meta_loss=outcome.meta_loss,
            inner_loss=outcome.inner_loss,
            grad_norm=grad_norm,
            skipped=self.skipped,
            validation=scores.get(self.config.validation.selected),
            best_validation=self.best_validation,
            seconds=self.seconds,
            details=details
            | {"unroll/truncation": outcome.truncation}
            | {f"estimator/{name}": value for name, value in outcome.report.items()},
        )

    def _validate(self) -> dict[str, float]:
        """Scores of the averaged weights on all suites; keeps them if they are the best so far."""
        scores = {name: suite.score(self.averaged) for name, suite in self.suites.items()}
        self._keep_best(scores[self.config.validation.selected])
        return scores

    @cpu_by_default()
    def validate(self, rule: UpdateRule, split: Split = "validation") -> float:
        """Score of ``rule`` on the suite that chooses the best weights: see :meth:`ValidationSuite.score`."""
        return self.suites[self.config.validation.selected].score(rule, split)

    def _evaluate(self, curriculum: Curriculum) -> float:
        suite = self.suites[self.config.validation.selected]
        score = suite.score(self.averaged, horizon=curriculum.next_horizon)
        curriculum.record(score, self.meta_step)
        return score

    # What is logged beside the headline of a step

    @property
    def detail_names(self) -> list[str]:
        """All names that a :attr:`Progress.details` may have."""
        names = ["meta_optimizer/lr", "unroll/truncation"]
        names += [f"estimator/{name}" for name in self.config.estimator.reports]
        names += ["estimator/agreement"] if self.config.unroll.windows_per_step > 1 else []
        names += [f"validation/{name}" for name in self.suites] if len(self.suites) > 1 else []
        return names + (["curriculum/horizon", "curriculum/score"] if self.curriculum is not None else [])

    # Checkpoints

    def _state(self) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Tensor]]]:
        members, pool_tensors = self.pool.state()
        curriculum = None if self.curriculum is None else self.curriculum.state()
        parts = {"estimator": self.pool.learned, "pool": pool_tensors}
        baselines = {name: finite_or_none(score) for name, score in self.baselines.items()}
        entries = {"pool": members, "spread": self.pool.spread, "curriculum": curriculum, "baselines": baselines}
        return entries, parts

    def provenance(self, meta_step: int) -> dict[str, Any]:
        """How the weights after ``meta_step`` came about, with the scores of the baselines where there are any."""
        baselines = {name: finite_or_none(score) for name, score in self.baselines.items()}
        return super().provenance(meta_step) | ({"baselines": baselines} if baselines else {})

    def save_weights(self, module: UpdateRule, path: Path, meta_step: int) -> None:
        """Write a version of the rule, as it was after ``meta_step``, for use."""
        save_rule(module, path, self.provenance(meta_step))

    @classmethod
    @cpu_by_default()
    def resume(cls, folder: Path, device: torch.device | str = "cpu", world: World | None = None) -> "Trainer":
        """Go on from the checkpoint in ``folder``, which alone is read: the file in ``start_from`` may be gone.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or not a meta-training checkpoint.
        """
        checkpoint = read_checkpoint(folder)
        config = config_from_tables(checkpoint.config, str(folder / CHECKPOINT_FILE), resuming=True)
        trainer = cls(config, folder, device, rule=config.rule.fresh(config.seed), world=world)
        with restoring(folder):
            trainer._restore(checkpoint.progress, checkpoint.tensors)
        return trainer

    def _restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super()._restore(progress, tensors)
        learned = below("estimator.", tensors)
        # Earlier versions called the output gradient of an experience of output-es "asked".
        learned = {re.sub(r"^(\d+)\.asked$", r"\1.output_gradient", name): tensor for name, tensor in learned.items()}
        self.config.estimator.check_learned(learned)
        self.pool.learned = {name: tensor.to(self.device) for name, tensor in learned.items()}
        self.pool.restore(progress["pool"], below("pool.", tensors))
        self.pool.spread = [(weight, total) for weight, total in progress.get("spread", self.pool.spread)]
        if self.curriculum is not None:
            self.curriculum.restore(progress["curriculum"])
        baselines = progress.get("baselines", {})  # runs of earlier versions have none
        self.baselines = {name: math.nan if score is None else score for name, score in baselines.items()}
