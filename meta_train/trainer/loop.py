"""The loop of a meta-training run: steps, checkpoints, logs, and interruptions that lose nothing."""

import atexit
import contextlib
import copy
import json
import math
import signal
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from learned_optim import __version__
from learned_optim.files import finite_or_none
from learned_optim.meta_train.common.seeds import cpu_by_default
from learned_optim.meta_train.config.load import Recorded
from learned_optim.meta_train.config.settings import MetaOptimizerConfig
from learned_optim.meta_train.inner.distributed import World, recorded
from learned_optim.meta_train.trainer.checkpoint import RunCheckpoint, below, write_checkpoint
from learned_optim.meta_train.trainer.log import Progress, RunLog
from learned_optim.meta_train.trainer.meta_optimizer import MetaOptimizer, norm_of
from learned_optim.meta_train.trainer.record import record_session

CHECKPOINT_SECONDS = 60.0  # at most this much work is lost to a kill; a checkpoint takes milliseconds

Trained = TypeVar("Trained", bound=nn.Module)
ConfigType = TypeVar("ConfigType", bound="RunConfig")


class RunConfig(Recorded, Protocol):
    """The part of a configuration that the loop reads."""

    @property
    def steps(self) -> int:
        """Meta-steps."""
        ...

    @property
    def meta_optimizer(self) -> MetaOptimizerConfig:
        """The settings of the meta-optimizer."""
        ...


class MetaTraining(ABC, Generic[ConfigType, Trained]):
    """A run that improves a module step by step, and keeps its average and the best version of this.

    Sub-classes say what a step is and what belongs into a checkpoint beside the weights.

    Args:
        config: configuration of the run.
        folder: folder of checkpoints, weights and logs; None keeps everything in memory.
        device: device of the run.
        module: the module that is meta-trained.
        world: the processes of the run.
    """

    module_name: ClassVar[str]
    """The name of the module in checkpoints."""

    def __init__(
        self, config: ConfigType, folder: Path | None, device: torch.device, module: Trained, world: World
    ) -> None:
        self.config, self.folder, self.device, self.world = config, folder, device, world
        self.module = module.to(device)
        self.averaged = copy.deepcopy(self.module).requires_grad_(False)
        self.best = copy.deepcopy(self.averaged)
        self.meta_optimizer = MetaOptimizer(self.module, config.meta_optimizer, config.steps)
        self.meta_step = 0
        self.skipped = 0
        self.best_validation = math.inf
        self.best_meta_step = 0
        self.seconds = 0.0
        self.tell: Callable[[str], None] = _nothing
        """Is told what there is to say beside the figures of a step, line by line."""

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
            if self.meta_step == 0 and not self.finished:
                consistent = False  # nothing is lost if this does not come to its end
                with uninterrupted() if self.world.size > 1 else contextlib.nullcontext(), cpu_by_default():
                    self._before_first_step()
                consistent = True
            while not self.finished:
                with uninterrupted(), cpu_by_default():
                    consistent = False
                    progress = self._step()
                    consistent = True
                    clock = time.monotonic()
                    self.seconds += clock - last_clock
                    last_clock = clock
                    progress = replace(progress, seconds=self.seconds)
                    log.write(progress)
                due = clock - last_checkpoint > CHECKPOINT_SECONDS
                save, stop = self.world.agree(due, list(self.module.parameters()))
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
        """Whether all meta-steps are done."""
        return self.meta_step >= self.config.steps

    def _before_first_step(self) -> None:
        """What is done once, before meta-training."""

    @abstractmethod
    def _step(self) -> Progress:
        """One meta-step."""

    @property
    @abstractmethod
    def detail_names(self) -> list[str]:
        """All names that a :attr:`Progress.details` may have."""

    def _update(self, grads: Sequence[Tensor], finite: bool) -> float:
        """Step along a meta-gradient, unless something in it is not finite; returns its norm, else NaN."""
        grad_norm = norm_of(grads) if finite else math.nan
        if math.isfinite(grad_norm):
            self.meta_optimizer.step(grads, self.meta_step)
            self._average()
        else:
            self.skipped += 1
        self.meta_step += 1
        return grad_norm

    def _average(self) -> None:
        keep = min(self.config.meta_optimizer.average, self.meta_step / (self.meta_step + 10))  # short memory at first
        with torch.no_grad():
            for average, parameter in zip(self.averaged.parameters(), self.module.parameters(), strict=True):
                average.lerp_(parameter, 1 - keep)

    def _keep_best(self, score: float) -> None:
        """Keep the averaged weights if their validation ``score`` is the lowest so far.

        Of equals the latest are kept, but not in place of the start.
        """
        if score < self.best_validation or (score == self.best_validation and self.best_meta_step > 0):
            self.best_validation, self.best_meta_step = score, self.meta_step
            self.best.load_state_dict(self.averaged.state_dict())

    # Checkpoints

    @abstractmethod
    def _state(self) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Tensor]]]:
        """All that is kept beside the weights: counters and scores for JSON; tensors by part and name."""

    @abstractmethod
    def save_weights(self, module: Trained, path: Path, meta_step: int) -> None:
        """Write a version of the module, as it was after ``meta_step``, for use."""

    @cpu_by_default()
    def save_checkpoint(self) -> None:
        """Write everything that a resumed run needs, the latest weights for use, and the best once there are any.

        All processes of the run call it together; the leader writes.
        """
        if self.folder is None:
            return
        progress, parts = self._state()
        if not self.world.leads:
            return
        versions = {self.module_name: self.module, "averaged": self.averaged, "best": self.best}
        parts = {
            **{name: version.state_dict() for name, version in versions.items()},
            "meta_optimizer": self.meta_optimizer.tensors(),
            **parts,
        }
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        progress = {
            "meta_step": self.meta_step,
            "skipped": self.skipped,
            "best_validation": finite_or_none(self.best_validation),
            "best_meta_step": self.best_meta_step,
            "seconds": self.seconds,
            **progress,
        }
        write_checkpoint(self.folder, RunCheckpoint(json.loads(self.config.to_json()), progress, tensors))
        if self.best_validation < math.inf:
            self.save_weights(self.best, self.folder / "best.safetensors", self.best_meta_step)
        self.save_weights(self.averaged, self.folder / "latest.safetensors", self.meta_step)

    def provenance(self, meta_step: int) -> dict[str, Any]:
        """The origin of the weights after ``meta_step``, which their file records."""
        return {
            "config": json.loads(self.config.to_json()),
            "meta_step": meta_step,
            "best_validation": finite_or_none(self.best_validation),
            "seconds": self.seconds,
            "learned_optim": __version__,
            "torch": torch.__version__,
        }

    def _restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.meta_step, self.skipped, self.seconds = progress["meta_step"], progress["skipped"], progress["seconds"]
        best = progress["best_validation"]
        self.best_validation = math.inf if best is None else best
        self.best_meta_step = progress.get("best_meta_step", 0)  # older runs did not record it
        self.module.load_state_dict(below(f"{self.module_name}.", tensors))
        self.averaged.load_state_dict(below("averaged.", tensors))
        self.best.load_state_dict(below("best.", tensors))
        self.meta_optimizer.restore(below("meta_optimizer.", tensors))


def _nothing(line: str) -> None:
    """Say nothing."""


def close_if_alive(loop: weakref.ref[Generator[Progress]]) -> None:
    """End a loop that a script has left open."""
    if (steps := loop()) is not None:
        steps.close()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block, so that it is done whole. Main thread only; else no-op."""
    received: list[int] = []
    with recorded(received):
        yield
    if received:
        signal.raise_signal(received[0])
