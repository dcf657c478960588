"""Meta-train a rule for one kind of task, and say honestly whether it is better there than the default.

The three lines of use::

    from learned_optim.meta_train.specialise import specialise

    outcome = specialise("my_tasks.py:MyFamily", minutes=20)
    optimizer = LearnedOptimizer(model.parameters(), outcome.weights)
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from learned_optim import load_rule
from learned_optim.files import json_object, write_atomically
from learned_optim.meta_train.common.strict import ConfigError, check_shape
from learned_optim.meta_train.config.load import Config, config_from_tables
from learned_optim.meta_train.reports.gain import Gain, compare_with_default
from learned_optim.meta_train.tasks import FAMILIES, TaskFamily
from learned_optim.meta_train.trainer.checkpoint import CHECKPOINT_FILE
from learned_optim.meta_train.trainer.family_check import check_family
from learned_optim.meta_train.trainer.progress import amount, run_with_progress
from learned_optim.meta_train.trainer.record import search_modules_of
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.rules import UpdateRule
from learned_optim.terminal import say

RECORD = "specialise.json"
"""What was asked for, in the run's folder: so that it can be resumed, comparison included."""
WEIGHTS = "specialised.safetensors"
MINUTES, STEPS = 20.0, 1_000
"""Defaults: minutes of meta-training, and inner steps that the rule is made for."""
RATE_OF_CONSTANTS = 5e-3  # of biases of the outputs; five times that of all other weights
WINDOW = 50  # inner steps: long enough that a window shows what a rate does
VALIDATION_SHARE = 0.15  # of the time, at most, apart from very short runs
FEWEST_VALIDATIONS = 10
MEASURED = 3  # meta-steps whose median is taken for the length of all


class Request(TypedDict):
    """What a specialised rule was asked for."""

    task: str
    options: dict[str, Any]
    steps: int
    minutes: float
    rule: str
    device: NotRequired[str]


@dataclass(frozen=True)
class Specialised:
    """A rule for one kind of task."""

    weights: Path
    """The file to give to ``LearnedOptimizer``. It holds the start if nothing validated better."""
    gain: Gain
    """What it gains over the default rule, on draws that played no part in meta-training."""


def specialise(
    task: str | type[TaskFamily] | TaskFamily,
    *,
    minutes: float = MINUTES,
    steps: int = STEPS,
    rule: str = "default",
    options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Specialised:
    """Meta-train a rule for a task, save it as ``specialised.safetensors``, and compare it with the default.

    Leaving it early (Ctrl-C) saves the run; :func:`resume` continues it.

    Args:
        task: name of a shipped family, ``FILE.py:Class``, a file with functions ``model()``, ``batch(generator)`` and
            ``loss(model, batch)``, or a family's class or instance that a file defines.
        minutes: of meta-training, by the time that the first meta-steps take. The comparison comes on top.
        steps: length of the trainings that the rule is for.
        rule: name or file of the rule to start from.
        options: of the family.
        folder: of the run; None: ``runs/specialise-NAME``.
        seed: everything random follows from it.
        device: where inner training runs.

    Raises:
        ConfigError: the task cannot be found or trained; nothing is spent on it then.
        ValueError: the folder holds a run already, or a number is out of range.
    """
    if not (minutes > 0 and steps >= 2):
        raise ValueError(f"minutes must be positive and steps at least 2, got {minutes} and {steps}")
    name, own_options = name_of(task)
    request = Request(
        task=name,
        options={**own_options, **(options or {})},
        steps=steps,
        minutes=minutes,
        rule=rule if rule == "default" or not Path(rule).is_file() else str(Path(rule).resolve()),
        device=device,
    )
    folder = default_folder(name) if folder is None else Path(folder)
    if (folder / CHECKPOINT_FILE).exists():
        raise ValueError(f"{folder} holds a run already; continue it (--resume {folder}), or choose another folder")
    draft = recipe(request, seed, steps=FEWEST_VALIDATIONS, every=1)
    check_family(config_from_tables(draft), name)
    config = within_minutes(request, seed)
    write_atomically(folder / RECORD, json.dumps(request, indent=2) + "\n")
    return _finish(Trainer(config, folder, device), request, folder)


def resume(folder: str | Path) -> Specialised:
    """Continue what :func:`specialise` has begun in a folder, bit-exactly, or compare once more if it is finished.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: a file is damaged.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"no run of specialise in {folder}: it has no {RECORD}")
    request = json_object((folder / RECORD).read_bytes(), str(folder / RECORD))
    check_shape(Request, request, str(folder / RECORD))
    search_modules_of(folder)
    trainer = Trainer.resume(folder, request.get("device", "cpu"))
    say(f"continuing {folder} at meta-step {trainer.meta_step} of {trainer.config.steps}")
    return _finish(trainer, request, folder)


def _finish(trainer: Trainer, request: Any, folder: Path) -> Specialised:
    """Meta-train to the end, save the best weights, and compare."""
    run_with_progress(trainer)
    weights = folder / WEIGHTS
    trainer.save_weights(trainer.best, weights, trainer.best_meta_step)
    gain = compare_with_default(
        request["task"],
        request["options"],
        request["steps"],
        weights,
        folder / "comparison",
        request.get("device", "cpu"),
    )
    say(f"\n{gain.verdict}")
    say(f'use it: LearnedOptimizer(model.parameters(), "{weights}")')
    return Specialised(weights, gain)


# What is meta-trained on


def name_of(task: str | type[TaskFamily] | TaskFamily) -> tuple[str, dict[str, Any]]:
    """The name of a task as it stands in configurations, wherever they are read, and the options of an instance."""
    if isinstance(task, str):
        file, colon, attribute = task.partition(":")
        if file.endswith(".py"):
            return f"{Path(file).resolve()}:{attribute if colon else 'model'}", {}
        return task, {}
    cls = task if isinstance(task, type) else type(task)
    options = {} if isinstance(task, type) else changed_fields(task)
    shipped = {family: name for name, family in FAMILIES.items()}
    if cls in shipped:
        return shipped[cls], options
    if cls.__module__ != "__main__":
        return f"{cls.__module__}:{cls.__qualname__}", options
    import __main__

    program: str | None = getattr(__main__, "__file__", None)
    if program is None:
        raise ConfigError(f"{cls.__name__} is defined in no file, so that a run cannot be resumed: write it into one")
    return f"{Path(program).resolve()}:{cls.__qualname__}", options


def changed_fields(family: TaskFamily) -> dict[str, Any]:
    """The options of a family that are not at their defaults."""
    return {
        field.name: value
        for field in fields(family)  # type: ignore[arg-type]  # families are dataclasses
        if (value := getattr(family, field.name)) != field.default
    }


def default_folder(name: str) -> Path:
    """``runs/specialise-NAME`` for a task's name."""
    file, _, attribute = name.partition(":")
    short = attribute if attribute not in ("", "model") else Path(file).stem
    return Path("runs") / f"specialise-{short}"


# The recipe


def recipe(request: Request, seed: int, *, steps: int, every: int) -> dict[str, Any]:
    """The configuration of the run as nested tables: ES-Single on all weights, from the given rule.

    Args:
        request: what is asked for.
        seed: of the run.
        steps: meta-steps.
        every: meta-steps between validations.
    """
    start = load_rule(request["rule"])
    inner = request["steps"]
    return {
        "description": f"specialised to {request['task']}",
        "steps": steps,
        "seed": seed,
        "rule": {"architecture": start.name, "settings": dict(start.settings), "start_from": request["rule"]},
        "tasks": [{"family": request["task"], "options": request["options"]}],
        "unroll": {
            "truncation": min(WINDOW, inner),
            "horizon": [max(1, min(inner, max(WINDOW, inner // 10))), 2 * inner],
            "instances": 16,
            "pool": 4,
        },
        "estimator": {"name": "es-single", "meta_loss": "log-of-mean", "sigma": 0.02},
        "meta_optimizer": {"lr": 1e-3, "rates": rates_of(start), "schedule": "cosine", "average": 0.98},
        "validation": {"every": every, "horizon": inner, "tasks": 2, "instances": 16, "solved": 1e-8},
    }


def rates_of(rule: UpdateRule) -> dict[str, float]:
    """Rates for single parameters: the biases of the outputs, constants that all coordinates share, go first."""
    return {name: RATE_OF_CONSTANTS for name, _ in rule.named_parameters() if name == "output_bias"}


def within_minutes(request: Request, seed: int, tell: Callable[[str], None] = say) -> Config:
    """The recipe with as many meta-steps as the minutes allow, by the time that some take on this machine."""
    tables = recipe(request, seed, steps=MEASURED + 1, every=MEASURED + 1)
    tables["unroll"] |= {"stagger": False}  # members that run ahead at the start would be measured too
    tables["validation"] |= {"baselines": False}
    trainer = Trainer(config_from_tables(tables), None, request.get("device", "cpu"))
    began = time.monotonic()
    clock = [progress.seconds for progress in trainer.run()]
    total = time.monotonic() - began
    durations = [later - earlier for earlier, later in zip([0.0, *clock], clock, strict=False)]
    step = statistics.median(durations[1:-1])  # the first one allocates, the last one validates
    validation = max(total - sum(durations[:-1]) - step, 0.0)
    steps, every = plan(60 * request["minutes"], step, validation)
    tell(
        f"a meta-step takes {step:.2g} s, a validation {validation:.2g} s: {steps:,} meta-steps with a validation "
        f"every {every:,} take about {amount(steps * (step + validation / every))}; Ctrl-C saves"
    )
    return config_from_tables(recipe(request, seed, steps=steps, every=every))


def plan(seconds: float, step: float, validation: float) -> tuple[int, int]:
    """Meta-steps, and meta-steps between validations, for the seconds that there are.

    Args:
        seconds: for all.
        step: that a meta-step takes.
        validation: that a validation takes.
    """
    every = max(1, math.ceil(validation / (VALIDATION_SHARE * step)))
    validations = int(seconds / (every * step + validation))
    if validations < FEWEST_VALIDATIONS:
        validations = FEWEST_VALIDATIONS
        every = max(1, int((seconds / validations - validation) / step))
    return validations * every, every  # so that the last step is validated
