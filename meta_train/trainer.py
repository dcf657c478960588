"""The meta-training loop: a pool of inner trainings, a meta-optimizer, validation, checkpoints, logs."""

import contextlib
import csv
import io
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from learned_optim import __version__
from learned_optim.checkpoint import save_rule
from learned_optim.files import write_atomically
from learned_optim.meta_train.config import Config, config_from_tables
from learned_optim.meta_train.estimators import Estimate, Trajectory
from learned_optim.meta_train.seeds import derive_seed, fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.tasks import Split
from learned_optim.meta_train.tasks.sampling import log_uniform_integer
from learned_optim.meta_train.unroll import start, unroll
from learned_optim.meta_train.vectorize import VectorizedTask
from learned_optim.rules import UpdateRule

CHECKPOINT_SECONDS = 60.0  # at most this much work is lost to a kill; a checkpoint takes milliseconds
DIVERGED = 10.0  # a final loss counts as at most this many initial losses,
SOLVED = 1e-3  # and as at least this fraction of one


@dataclass
class InnerTraining:
    """A member of the pool: B instances of one task on their way to their horizon."""

    draw: int
    """Counts the tasks drawn in this run; with the seed it determines the task."""
    horizon: int
    task: VectorizedTask
    state: Trajectory

    @property
    def finished(self) -> bool:
        """Whether the horizon is reached, or nothing is left to learn from."""
        return int(self.state.step) >= self.horizon or not bool(self.state.inner.parameters.isfinite().all())


@dataclass(frozen=True)
class Progress:
    """What happened in one meta-step."""

    meta_step: int
    meta_loss: float
    """Mean over the windows of this step."""
    inner_loss: float
    """Mean inner loss at the end of the windows."""
    grad_norm: float
    """Norm of the meta-gradient before clipping; not finite means that the step was skipped."""
    skipped: int
    """Meta-steps skipped so far."""
    validation: float | None
    """Validation score, where there was a validation: see :meth:`Trainer.validate`."""
    best_validation: float
    seconds: float
    """Time spent on meta-training so far, resumed parts included."""


class Trainer:
    """Meta-trains one rule.

    Everything random follows from the configuration's seed and counters, so a run that is interrupted and resumed
    takes bit by bit the course of one that was not (on the same machine and number of threads).

    Args:
        config: the run's configuration.
        folder: where checkpoints, weights and logs go; None keeps everything in memory.
        device: where inner training runs.
    """

    def __init__(self, config: Config, folder: Path | None = None, device: torch.device | str = "cpu") -> None:
        self.config, self.folder, self.device = config, folder, torch.device(device)
        self.rule = config.rule.build(config.seed).to(self.device)
        self.averaged = config.rule.build(config.seed).to(self.device).requires_grad_(False)
        self.best = config.rule.build(config.seed).to(self.device).requires_grad_(False)
        self.families = [task.build() for task in config.tasks]
        self.estimator = config.estimator.build()
        self.meta_optimizer = torch.optim.Adam(self.rule.parameters(), lr=config.meta_optimizer.lr)
        self.pool: list[InnerTraining | None] = [None] * config.unroll.pool
        self.meta_step = 0
        self.draws = 0
        self.skipped = 0
        self.best_validation = math.inf
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
        if math.isfinite(grad_norm):
            self._update(grads, grad_norm)
        else:
            self.skipped += 1
        self.meta_step += 1
        validation = None
        if self.meta_step % self.config.validation.every == 0 or self.meta_step == self.config.steps:
            validation = self.validate(self.averaged)
            if validation <= self.best_validation:
                self.best_validation = validation
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
            member = self.pool[index] = self._draw(stagger=member is None)
        generator = torch_generator(self.config.seed, "window", member.draw, int(member.state.step))
        result = self.estimator.window(self.rule, member.task, member.state, self.config.unroll.truncation, generator)
        member.state = result.state
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

    def _draw(self, stagger: bool) -> InnerTraining:
        """A new task, at its start. The first ones end early at random, so that the pool is spread over all stages."""
        self.draws += 1
        settings = self.config.unroll
        rng = numpy_generator(self.config.seed, "horizon", self.draws)
        horizon = log_uniform_integer(rng, settings.horizon)
        if stagger and len(self.pool) > 1:
            horizon = max(settings.truncation, int(horizon * rng.random()))
        task = self._build_task(self.draws)
        state = self.estimator.start(self.rule, task, torch_generator(self.config.seed, "first batch", self.draws))
        return InnerTraining(self.draws, horizon, task, state)

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
        """Write everything that a resumed run needs, and the best and latest weights as rules."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        for prefix, rule in (("rule", self.rule), ("averaged", self.averaged), ("best", self.best)):
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in rule.state_dict().items()}
        for index, entry in self.meta_optimizer.state_dict()["state"].items():
            tensors |= {f"meta_optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
        tensors |= {f"estimator.{name}": tensor for name, tensor in self.estimator.state_dict().items()}
        members = []
        for index, member in enumerate(self.pool):
            members.append(None if member is None else {"draw": member.draw, "horizon": member.horizon})
            if member is not None:
                tensors |= {f"pool.{index}.{name}": tensor for name, tensor in member.state.tensors().items()}
        progress = {
            "meta_step": self.meta_step,
            "draws": self.draws,
            "skipped": self.skipped,
            "best_validation": self.best_validation,
            "seconds": self.seconds,
            "pool": members,
        }
        metadata = {"config": self.config.to_json(), "progress": json.dumps(progress)}
        contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(self.folder / "checkpoint.safetensors", save(contents, metadata))
        save_rule(self.best, self.folder / "best.safetensors", self.provenance())
        save_rule(self.averaged, self.folder / "latest.safetensors", self.provenance())

    def provenance(self) -> dict[str, Any]:
        """How the weights came about: what their file records."""
        return {
            "config": json.loads(self.config.to_json()),
            "meta_steps": self.meta_step,
            "best_validation": self.best_validation,
            "seconds": self.seconds,
            "learned_optim": __version__,
            "torch": torch.__version__,
        }

    @classmethod
    def resume(cls, folder: Path, device: torch.device | str = "cpu") -> "Trainer":
        """Go on from the checkpoint in ``folder``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or not a meta-training checkpoint.
        """
        path = folder / "checkpoint.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"nothing to resume: no {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except SafetensorError as error:
            raise ValueError(f"cannot resume: {path} is damaged: {error}") from error
        if not {"config", "progress"} <= metadata.keys():
            raise ValueError(f"cannot resume: {path} is not a meta-training checkpoint")
        trainer = cls(config_from_tables(json.loads(metadata["config"])), folder, device)
        trainer._restore(json.loads(metadata["progress"]), tensors)
        return trainer

    def _restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.meta_step, self.draws = progress["meta_step"], progress["draws"]
        self.skipped, self.seconds = progress["skipped"], progress["seconds"]
        self.best_validation = progress["best_validation"]
        self.rule.load_state_dict(_below("rule.", tensors))
        self.averaged.load_state_dict(_below("averaged.", tensors))
        self.best.load_state_dict(_below("best.", tensors))
        optimizer_state = self.meta_optimizer.state_dict()
        for name, tensor in _below("meta_optimizer.", tensors).items():
            index, _, entry = name.partition(".")
            optimizer_state["state"].setdefault(int(index), {})[entry] = tensor
        self.meta_optimizer.load_state_dict(optimizer_state)
        learned = _below("estimator.", tensors)
        self.estimator.load_state_dict({name: tensor.to(self.device) for name, tensor in learned.items()})
        for place, member in enumerate(progress["pool"]):
            if member is not None:
                saved = _below(f"pool.{place}.", tensors)
                state = Trajectory.from_tensors({name: tensor.to(self.device) for name, tensor in saved.items()})
                task = self._build_task(member["draw"])
                self.pool[place] = InnerTraining(member["draw"], member["horizon"], task, state)


class RunLog:
    """Metrics of a run as CSV and TensorBoard; rows after ``meta_step`` (of a run cut off) are dropped at the start."""

    def __init__(self, folder: Path | None, meta_step: int) -> None:
        self.file: io.TextIOWrapper | None = None
        self.add_scalar: Callable[[str, float, int], None] = lambda name, value, step: None
        self.close_board: Callable[[], None] = lambda: None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.csv"
        fields = list(Progress.__dataclass_fields__)
        kept = []
        if path.is_file():
            with path.open(newline="") as file:
                whole = [row for row in csv.DictReader(file) if None not in row.values()]  # a kill can cut the last
                kept = [row for row in whole if int(row["meta_step"]) <= meta_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, text.getvalue())
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, fields, lineterminator="\n")
        board = SummaryWriter(str(folder / "tensorboard"), purge_step=meta_step + 1)
        self.add_scalar, self.close_board = board.add_scalar, board.close

    def write(self, progress: Progress) -> None:
        """Add one meta-step."""
        if self.file is None:
            return
        row = {name: "" if value is None else value for name, value in vars(progress).items()}
        self.writer.writerow(row)
        for name, value in vars(progress).items():
            if value is not None and name != "meta_step":
                self.add_scalar(name, float(value), progress.meta_step)

    def flush(self) -> None:
        """Bring all rows to the disk."""
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        """Finish the files."""
        if self.file is not None:
            self.file.close()
        self.close_board()


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


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries whose name starts with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
