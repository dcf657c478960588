"""The meta-training loop: a pool of inner trainings, a meta-optimizer, validation, checkpoints, logs."""

import atexit
import contextlib
import copy
import json
import math
import signal
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learned_optim import __version__
from learned_optim.checkpoint import save_rule
from learned_optim.meta_train.config import Config, config_from_tables
from learned_optim.meta_train.curriculum import Curriculum
from learned_optim.meta_train.distributed import World
from learned_optim.meta_train.divided_pool import DividedPool
from learned_optim.meta_train.meta_optimizer import MetaOptimizer, norm_of
from learned_optim.meta_train.pool import Pool
from learned_optim.meta_train.run_checkpoint import (
    RunCheckpoint,
    below,
    finite_or_none,
    read_checkpoint,
    write_checkpoint,
)
from learned_optim.meta_train.run_log import Progress, RunLog
from learned_optim.meta_train.run_record import record_session
from learned_optim.meta_train.tasks import Split
from learned_optim.meta_train.validation import Suite
from learned_optim.rules import UpdateRule

CHECKPOINT_SECONDS = 60.0  # at most this much work is lost to a kill; a checkpoint takes milliseconds


class Trainer:
    """Meta-trains one rule.

    Everything random follows from the configuration's seed and counters, so a run that is interrupted and resumed
    takes bit by bit the course of one that was not (on the same machine and number of threads).

    Args:
        config: the run's configuration.
        folder: where checkpoints, weights and logs go; None keeps everything in memory.
        device: where inner training runs.
        rule: what is meta-trained, from its present weights; None: the configuration's.
        world: the processes of the run, each with a trainer of its own; None: this one alone. All hold the same
            meta-parameters, to the bit; the leader writes.
    """

    def __init__(
        self,
        config: Config,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        rule: UpdateRule | None = None,
        world: World | None = None,
    ) -> None:
        self.config, self.folder, self.device = config, folder, torch.device(device)
        self.world = world = World() if world is None else world
        self.rule = (config.rule.build(config.seed) if rule is None else rule).to(self.device)
        self.averaged = copy.deepcopy(self.rule).requires_grad_(False)
        self.best = copy.deepcopy(self.averaged)
        self.estimator = config.estimator.build()
        if world.size == 1:
            self.pool = Pool(config, self.estimator, self.device)
        else:
            self.pool = DividedPool(config, self.estimator, self.device, world)
        self.suites = {suite.name: Suite(config, suite, self.device, world) for suite in config.validation.suites}
        self.meta_optimizer = MetaOptimizer(self.rule, config.meta_optimizer, config.steps)
        self.curriculum = None if config.curriculum is None else Curriculum(config.curriculum)
        self.meta_step = 0
        self.skipped = 0
        self.best_validation = math.inf
        self.best_meta_step = 0
        self.seconds = 0.0

    def run(self) -> Generator[Progress]:
        """Meta-train to the configured number of steps, one :class:`Progress` for each.

        With a folder, a checkpoint is written now and then, at the end, and when the loop is left early for whatever
        reason (Ctrl-C included). Of several processes all must have the same one: they save when the run ends, or all
        have agreed to stop.

        Raises:
            ProcessLostError: another process of the run has ended, or does not answer.
        """
        steps = self._run()
        atexit.register(close_if_alive, weakref.ref(steps))  # while the interpreter shuts down nothing can be saved
        return steps

    def _run(self) -> Generator[Progress]:
        if self.folder is not None and self.world.leads and not self.finished:
            record_session(self.folder, self.config, self.meta_step, self.device)
        log = RunLog(self.folder if self.world.leads else None, self.meta_step, self.detail_names)
        consistent, together = True, self.world.size == 1
        last_checkpoint = last_clock = time.monotonic()
        try:
            while not self.finished:
                with uninterrupted():
                    consistent = False
                    progress = self._step()
                    consistent = True
                    clock = time.monotonic()
                    self.seconds += clock - last_clock
                    last_clock = clock
                    progress = replace(progress, seconds=self.seconds)
                    log.write(progress)
                due = clock - last_checkpoint > CHECKPOINT_SECONDS
                save, stop = self.world.agree(due, list(self.rule.parameters()))
                if stop:
                    together = True
                    raise KeyboardInterrupt
                if save:
                    log.flush()
                    self.save_checkpoint()
                    last_checkpoint = clock
                yield progress
            together = True
        finally:
            with uninterrupted():
                log.close()
                if consistent and together:
                    self.save_checkpoint()

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
        outcome = self.pool.meta_gradient(self.rule, self.meta_step, horizon)
        grad_norm = norm_of(outcome.grads) if outcome.finite else math.nan
        if math.isfinite(grad_norm):
            self.meta_optimizer.step(outcome.grads, self.meta_step)
            self._average()
        else:
            self.skipped += 1
        self.meta_step += 1
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

    def _average(self) -> None:
        keep = min(self.config.meta_optimizer.average, self.meta_step / (self.meta_step + 10))  # short memory at first
        with torch.no_grad():
            for average, parameter in zip(self.averaged.parameters(), self.rule.parameters(), strict=True):
                average.lerp_(parameter, 1 - keep)

    def _validate(self) -> dict[str, float]:
        """Scores of the averaged weights on all suites; keeps them if they are the best so far."""
        scores = {name: suite.score(self.averaged) for name, suite in self.suites.items()}
        score = scores[self.config.validation.selected]
        if score <= self.best_validation:
            self.best_validation, self.best_meta_step = score, self.meta_step
            self.best.load_state_dict(self.averaged.state_dict())
        return scores

    def validate(self, rule: UpdateRule, split: Split = "validation") -> float:
        """Score of ``rule`` on the suite that chooses the best weights: see :meth:`Suite.score`."""
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
        names += [f"estimator/{name}" for name in self.estimator.reports]
        names += [f"validation/{name}" for name in self.suites] if len(self.suites) > 1 else []
        return names + (["curriculum/horizon", "curriculum/score"] if self.curriculum is not None else [])

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Write everything that a resumed run needs, the latest weights as a rule, and the best once there are any.

        All processes of the run call it together; the leader writes.
        """
        if self.folder is None:
            return
        members, pool_tensors = self.pool.state()
        if not self.world.leads:
            return
        tensors: dict[str, Tensor] = {}
        for prefix, rule in (("rule", self.rule), ("averaged", self.averaged), ("best", self.best)):
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in rule.state_dict().items()}
        parts = {
            "meta_optimizer": self.meta_optimizer.tensors(),
            "estimator": self.estimator.state_dict(),
            "pool": pool_tensors,
        }
        for prefix, part in parts.items():
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in part.items()}
        progress = {
            "meta_step": self.meta_step,
            "skipped": self.skipped,
            "best_validation": finite_or_none(self.best_validation),
            "best_meta_step": self.best_meta_step,
            "seconds": self.seconds,
            "pool": members,
            "curriculum": None if self.curriculum is None else self.curriculum.state(),
        }
        write_checkpoint(self.folder, RunCheckpoint(json.loads(self.config.to_json()), progress, tensors))
        if self.best_validation < math.inf:
            save_rule(self.best, self.folder / "best.safetensors", self.provenance(self.best_meta_step))
        save_rule(self.averaged, self.folder / "latest.safetensors", self.provenance(self.meta_step))

    def provenance(self, meta_step: int) -> dict[str, Any]:
        """How the weights after ``meta_step`` came about: what their file records."""
        return {
            "config": json.loads(self.config.to_json()),
            "meta_step": meta_step,
            "best_validation": finite_or_none(self.best_validation),
            "seconds": self.seconds,
            "learned_optim": __version__,
            "torch": torch.__version__,
        }

    @classmethod
    def resume(cls, folder: Path, device: torch.device | str = "cpu", world: World | None = None) -> "Trainer":
        """Go on from the checkpoint in ``folder``, which alone is read: the file in ``start_from`` may be gone.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or not a meta-training checkpoint.
        """
        checkpoint = read_checkpoint(folder)
        config = config_from_tables(checkpoint.config, resuming=True)
        trainer = cls(config, folder, device, rule=config.rule.fresh(config.seed), world=world)
        trainer._restore(checkpoint.progress, checkpoint.tensors)
        return trainer

    def _restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.meta_step, self.skipped, self.seconds = progress["meta_step"], progress["skipped"], progress["seconds"]
        best = progress["best_validation"]
        self.best_validation = math.inf if best is None else best
        self.best_meta_step = progress.get("best_meta_step", 0)  # older runs did not record it
        self.rule.load_state_dict(below("rule.", tensors))
        self.averaged.load_state_dict(below("averaged.", tensors))
        self.best.load_state_dict(below("best.", tensors))
        self.meta_optimizer.restore(below("meta_optimizer.", tensors))
        learned = below("estimator.", tensors)
        self.estimator.load_state_dict({name: tensor.to(self.device) for name, tensor in learned.items()})
        self.pool.restore(progress["pool"], below("pool.", tensors))
        if self.curriculum is not None:
            self.curriculum.restore(progress["curriculum"])


def close_if_alive(loop: weakref.ref[Generator[Progress]]) -> None:
    """End a loop that a script has left open."""
    if (steps := loop()) is not None:
        steps.close()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block, so that it is done whole. Main thread only; else no-op."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
