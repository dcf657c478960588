"""The meta-training loop: a pool of inner trainings, a meta-optimizer, validation, checkpoints, logs."""

import contextlib
import copy
import json
import math
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learned_optim import __version__
from learned_optim.checkpoint import save_rule
from learned_optim.meta_train.config import Config, config_from_tables
from learned_optim.meta_train.estimators import Estimate, Trajectory
from learned_optim.meta_train.run_checkpoint import (
    RunCheckpoint,
    below,
    finite_or_none,
    flatten,
    read_checkpoint,
    unflatten,
    write_checkpoint,
)
from learned_optim.meta_train.run_log import Progress, RunLog
from learned_optim.meta_train.seeds import derive_seed, fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.tasks import Split
from learned_optim.meta_train.tasks.sampling import log_uniform_integer
from learned_optim.meta_train.unroll import InnerState, start, unroll
from learned_optim.meta_train.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule

CHECKPOINT_SECONDS = 60.0  # at most this much work is lost to a kill; a checkpoint takes milliseconds
DIVERGED = 10.0  # initial losses: a final loss counts as at most so much, and a training that stays above is given up
SOLVED = 1e-3  # initial losses: a final loss counts as at least so much


@dataclass
class InnerTraining:
    """A member of the pool: B instances of one task on their way to their horizon."""

    draw: int
    """Counts the tasks drawn in this run; with the seed it determines the task."""
    horizon: int
    task: VectorizedTask
    state: Trajectory
    diverged: bool = False
    """Whether an instance's loss was far above its initial one for a whole window."""

    @property
    def finished(self) -> bool:
        """Whether the horizon is reached, or nothing is left to learn from."""
        return int(self.state.step) >= self.horizon or self.lost

    @property
    def lost(self) -> bool:
        """Whether an instance has diverged, to infinity or just far off: its meta-gradients would drown the others."""
        return self.diverged or not bool(self.state.inner.parameters.isfinite().all())

    def advance(self, state: Trajectory, losses: Tensor) -> None:
        """Go on to ``state``; ``losses`` are those of the window that led there, ``(steps, B)``."""
        self.state = state
        initial_loss = state.inner.initial_loss.flatten()[: losses.shape[1]]  # particles repeat it
        far_off = (losses > DIVERGED * initial_loss) & (initial_loss > 0)
        self.diverged = bool(far_off.all(dim=0).any())


class Trainer:
    """Meta-trains one rule.

    Everything random follows from the configuration's seed and counters, so a run that is interrupted and resumed
    takes bit by bit the course of one that was not (on the same machine and number of threads).

    Args:
        config: the run's configuration.
        folder: where checkpoints, weights and logs go; None keeps everything in memory.
        device: where inner training runs.
        rule: what is meta-trained, from its present weights; None: the configuration's.
    """

    def __init__(
        self,
        config: Config,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        rule: UpdateRule | None = None,
    ) -> None:
        self.config, self.folder, self.device = config, folder, torch.device(device)
        self.rule = (config.rule.build(config.seed) if rule is None else rule).to(self.device)
        self.averaged = copy.deepcopy(self.rule).requires_grad_(False)
        self.best = copy.deepcopy(self.averaged)
        self.families = [task.build() for task in config.tasks]
        self.estimator = config.estimator.build()
        self.meta_optimizer = torch.optim.Adam(self.rule.parameters(), lr=config.meta_optimizer.lr)
        self.pool: list[InnerTraining | None] = [None] * config.unroll.pool
        self.meta_step = 0
        self.draws = 0
        self.skipped = 0
        self.best_validation = math.inf
        self.best_meta_step = 0
        self.seconds = 0.0

    def run(self) -> Generator[Progress]:
        """Meta-train to the configured number of steps, one :class:`Progress` for each.

        With a folder, a checkpoint is written now and then, at the end, and when the loop is left early for whatever
        reason (Ctrl-C included).
        """
        log = RunLog(self.folder, self.meta_step)
        consistent = True
        last_checkpoint = last_clock = time.monotonic()
        try:
            while self.meta_step < self.config.steps:
                with uninterrupted():
                    consistent = False
                    progress = self._step()
                    consistent = True
                    clock = time.monotonic()
                    self.seconds += clock - last_clock
                    last_clock = clock
                    progress = replace(progress, seconds=self.seconds)
                    log.write(progress)
                if clock - last_checkpoint > CHECKPOINT_SECONDS:
                    log.flush()
                    self.save_checkpoint()
                    last_checkpoint = clock
                yield progress
        finally:
            with uninterrupted():
                log.close()
                if consistent:
                    self.save_checkpoint()

    # One meta-step

    def _step(self) -> Progress:
        first = self.meta_step * self._per_step
        with fixed_global_state(derive_seed(self.config.seed, "dropout", self.meta_step), self.device):
            windows = [self._advance((first + index) % len(self.pool)) for index in range(self._per_step)]
        grads = [torch.stack(parts).mean(0) for parts in zip(*(window.grads for window in windows), strict=True)]
        grad_norm = float(torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads])))
        if not all(is_finite(window) for window in windows):
            grad_norm = math.nan  # a meta-gradient through a sample of the coordinates may not show it
        if math.isfinite(grad_norm):
            self._update(grads, grad_norm)
        else:
            self.skipped += 1
        self.meta_step += 1
        validation = None
        if self.meta_step % self.config.validation.every == 0 or self.meta_step == self.config.steps:
            validation = self.validate(self.averaged)
            if validation <= self.best_validation:
                self.best_validation, self.best_meta_step = validation, self.meta_step
                self.best.load_state_dict(self.averaged.state_dict())
        return Progress(
            meta_step=self.meta_step,
            meta_loss=sum(float(window.meta_loss) for window in windows) / len(windows),
            inner_loss=sum(float(window.losses[-1].mean()) for window in windows) / len(windows),
            grad_norm=grad_norm,
            skipped=self.skipped,
            validation=validation,
            best_validation=self.best_validation,
            seconds=self.seconds,
        )

    @property
    def _per_step(self) -> int:
        return self.config.unroll.windows_per_step

    def _advance(self, index: int) -> Estimate:
        """Take one window of a member of the pool."""
        member = self.pool[index]
        if member is None or member.finished:
            member = self.pool[index] = self._draw(first=member is None)
        generator = torch_generator(self.config.seed, "window", member.draw, int(member.state.step))
        result = self.estimator.window(self.rule, member.task, member.state, self.config.unroll.truncation, generator)
        member.advance(result.state, result.losses)
        return result

    def _update(self, grads: list[Tensor], grad_norm: float) -> None:
        settings = self.config.meta_optimizer
        scale = 1.0 if settings.clip_norm is None else min(1.0, settings.clip_norm / max(grad_norm, 1e-30))
        for parameter, grad in zip(self.rule.parameters(), grads, strict=True):
            parameter.grad = grad * scale
        fraction = self.meta_step / self.config.steps
        decay = 0.5 * (1 + math.cos(math.pi * fraction)) if settings.schedule == "cosine" else 1.0
        for group in self.meta_optimizer.param_groups:
            group["lr"] = settings.lr * decay
        self.meta_optimizer.step()
        keep = min(settings.average, self.meta_step / (self.meta_step + 10))  # short memory at the start
        with torch.no_grad():
            for average, parameter in zip(self.averaged.parameters(), self.rule.parameters(), strict=True):
                average.lerp_(parameter, 1 - keep)

    # Tasks

    def _draw(self, first: bool) -> InnerTraining:
        """A new task, at its start; the first ones of a staggered pool are under way."""
        self.draws += 1
        settings = self.config.unroll
        rng = numpy_generator(self.config.seed, "horizon", self.draws)
        task = self._build_task(self.draws)
        with torch.no_grad():
            inner = start(self.rule, task, torch_generator(self.config.seed, "first batch", self.draws))
        if self.config.estimator.meta_loss == "log":
            check_positive(task, inner, 'meta_loss = "log" takes the logarithm of the loss over its initial value')
        if first and settings.stagger and len(self.pool) > 1:
            # As in a pool that has run for long: log-uniform horizons, met in proportion to their length, are uniform.
            horizon = int(rng.integers(*settings.horizon, endpoint=True))
            windows = int(rng.integers(math.ceil(horizon / settings.truncation)))
        else:
            horizon, windows = log_uniform_integer(rng, settings.horizon), 0
        member = InnerTraining(self.draws, horizon, task, Trajectory(inner, {}))
        self._fast_forward(member, windows)
        generator = torch_generator(self.config.seed, "estimator", self.draws)
        member.state = self.estimator.start(self.rule, task, member.state.inner, generator)
        return member

    @torch.no_grad()
    def _fast_forward(self, member: InnerTraining, windows: int) -> None:
        """Take a new member to a later stage, without a meta-gradient; back to its start if it is lost on the way."""
        beginning = member.state
        generator = torch_generator(self.config.seed, "fast forward", member.draw)
        for _ in range(windows):
            ahead = unroll(self.rule, member.task, member.state.inner, self.config.unroll.truncation, generator)
            member.advance(Trajectory(ahead.state, {}), ahead.losses)
            if member.lost:
                member.state, member.diverged = beginning, False
                return

    def _build_task(self, draw: int) -> VectorizedTask:
        settings = self.config.unroll
        rng = numpy_generator(self.config.seed, "task", draw)
        weights = torch.tensor([task.weight for task in self.config.tasks], dtype=torch.float64)
        family = self.families[int(rng.choice(len(self.families), p=(weights / weights.sum()).numpy()))]
        scale = None
        if rng.random() < settings.rescale:
            low, high = (math.log(bound) for bound in settings.rescale_range)
            scale = torch.from_numpy(rng.uniform(low, high, (settings.instances, 1))).exp().float()
        return VectorizedTask(
            family.sample(rng, "train"),
            settings.instances,
            derive_seed(self.config.seed, "instances", draw),
            device=self.device,
            scale=scale,
            random_signs=settings.random_signs,
        )

    # Validation

    @torch.no_grad()
    def validate(self, rule: UpdateRule, split: Split = "validation") -> float:
        """Geometric mean over held-out tasks of the final loss relative to the initial one.

        The final loss is the mean over instances and the last tenth of the steps. A task counts as at least a
        thousandth, or a few noiseless ones would decide, and as ten if its loss grew further or is not finite.
        The tasks and their batches are the same at every call.
        """
        settings = self.config.validation
        logarithms = []
        for number, (task, seed) in enumerate(self._validation_tasks(split)):
            generator = torch_generator(seed, "validation", number)
            with fixed_global_state(derive_seed(seed, "validation dropout"), self.device):
                state = start(rule, task, generator)
                check_positive(task, state, "a validation score is relative to the initial loss")
                losses = unroll(rule, task, state, settings.horizon, generator).losses
            final = losses[-max(1, settings.horizon // 10) :].mean(0)
            final = torch.minimum(final.nan_to_num(math.inf), DIVERGED * state.initial_loss)
            logarithms.append(math.log(max(float(final.mean() / state.initial_loss.mean()), SOLVED)))
        return math.exp(sum(logarithms) / len(logarithms))

    def _validation_tasks(self, split: Split) -> Iterator[tuple[VectorizedTask, int]]:
        settings = self.config.validation
        for family_index, family in enumerate(self.families):
            for index in range(settings.tasks):
                seed = derive_seed(self.config.seed, split, family_index, index)
                task = family.sample(numpy_generator(seed, "task"), split)
                yield VectorizedTask(task, settings.instances, seed, device=self.device), seed

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Write everything that a resumed run needs, the latest weights as a rule, and the best once there are any."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        for prefix, rule in (("rule", self.rule), ("averaged", self.averaged), ("best", self.best)):
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in rule.state_dict().items()}
        for index, entry in self.meta_optimizer.state_dict()["state"].items():
            tensors |= {f"meta_optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
        tensors |= {f"estimator.{name}": tensor for name, tensor in self.estimator.state_dict().items()}
        members: list[dict[str, Any] | None] = []
        for index, member in enumerate(self.pool):
            if member is None:
                members.append(None)
                continue
            members.append({"draw": member.draw, "horizon": member.horizon, "diverged": member.diverged})
            tensors |= {f"pool.{index}.{name}": tensor for name, tensor in flatten(member.state).items()}
        progress = {
            "meta_step": self.meta_step,
            "draws": self.draws,
            "skipped": self.skipped,
            "best_validation": finite_or_none(self.best_validation),
            "best_meta_step": self.best_meta_step,
            "seconds": self.seconds,
            "pool": members,
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
    def resume(cls, folder: Path, device: torch.device | str = "cpu") -> "Trainer":
        """Go on from the checkpoint in ``folder``, which alone is read: the file in ``start_from`` may be gone.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or not a meta-training checkpoint.
        """
        checkpoint = read_checkpoint(folder)
        config = config_from_tables(checkpoint.config, resuming=True)
        trainer = cls(config, folder, device, rule=config.rule.fresh(config.seed))
        trainer._restore(checkpoint.progress, checkpoint.tensors)
        return trainer

    def _restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.meta_step, self.draws = progress["meta_step"], progress["draws"]
        self.skipped, self.seconds = progress["skipped"], progress["seconds"]
        best = progress["best_validation"]
        self.best_validation = math.inf if best is None else best
        self.best_meta_step = progress.get("best_meta_step", 0)  # older runs did not record it
        self.rule.load_state_dict(below("rule.", tensors))
        self.averaged.load_state_dict(below("averaged.", tensors))
        self.best.load_state_dict(below("best.", tensors))
        optimizer_state = self.meta_optimizer.state_dict()
        for name, tensor in below("meta_optimizer.", tensors).items():
            index, _, entry = name.partition(".")
            optimizer_state["state"].setdefault(int(index), {})[entry] = tensor
        self.meta_optimizer.load_state_dict(optimizer_state)
        learned = below("estimator.", tensors)
        self.estimator.load_state_dict({name: tensor.to(self.device) for name, tensor in learned.items()})
        for place, member in enumerate(progress["pool"]):
            if member is not None:
                state = unflatten(below(f"pool.{place}.", tensors), self.device)
                self.pool[place] = InnerTraining(task=self._build_task(member["draw"]), state=state, **member)


def is_finite(window: Estimate) -> bool:
    """Whether nothing that is known of a window is NaN or infinite."""
    values = (window.losses, window.state.inner.parameters, window.state.inner.grad, *window.grads)
    return bool(torch.stack([tensor.isfinite().all() for tensor in values]).all())


def check_positive(task: VectorizedTask, state: InnerState, reason: str) -> None:
    """Raise ``ValueError`` if a loss at the start is zero or negative."""
    if bool((state.initial_loss <= 0).any()):
        lowest = float(state.initial_loss.min())
        raise ValueError(
            f"{reason}, which must be positive; {type(task.task).__name__} starts at {lowest:g}: "
            "add a constant to its loss"
        )


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
