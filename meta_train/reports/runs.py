"""Runs as things to look at: what a run folder holds, read back."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from learned_optim.meta_train.common.strict import check_shape
from learned_optim.meta_train.config.settings import ValidationConfig
from learned_optim.meta_train.few_shot.settings import is_few_shot
from learned_optim.meta_train.run_settings import settings_of
from learned_optim.meta_train.trainer.checkpoint import FILE, read_checkpoint
from learned_optim.meta_train.trainer.log import read_metrics
from learned_optim.meta_train.trainer.record import read_record

Count = Annotated[int, Field(ge=1)]


class _Named(TypedDict):
    name: str


class _Architecture(TypedDict):
    architecture: str


class _Family(TypedDict):
    family: str


class _Suite(TypedDict):
    name: str
    horizon: NotRequired[Count | None]
    families: NotRequired[list[_Family]]


class _Validation(TypedDict):
    horizon: NotRequired[Count]
    suites: NotRequired[list[_Suite]]
    select: NotRequired[str | None]


class _RuleRun(TypedDict):
    """What is read of a rule's configuration, of whatever version."""

    steps: Count
    description: NotRequired[str]
    rule: _Architecture
    tasks: list[_Family]
    estimator: _Named
    validation: NotRequired[_Validation]


class _Algorithm(_Named):
    steps: NotRequired[Count]


class _FewShotValidation(TypedDict):
    steps: NotRequired[Count | None]


class _FewShotRun(TypedDict):
    """The same of a few-shot run."""

    steps: Count
    description: NotRequired[str]
    algorithm: _Algorithm
    task: _Family
    validation: NotRequired[_FewShotValidation]


@dataclass(frozen=True)
class Run:
    """A meta-training run on disk, without its tensors."""

    folder: Path
    config: dict[str, Any]
    """Nested tables."""
    progress: dict[str, Any]
    """Counters and scores of the latest checkpoint."""
    sessions: list[dict[str, Any]]
    """From its start, and each time that it was gone on with: see :func:`record_session`."""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        curriculum = self.progress.get("curriculum") or {}
        return self.progress["meta_step"] >= self.config["steps"] or bool(curriculum.get("finished"))

    def summary(self) -> dict[str, Any]:
        """One line of a table of runs; for JSON."""
        return {
            "run": str(self.folder),
            "description": self.config.get("description", ""),
            **(self._few_shot() if self.few_shot else self._rule()),
            "meta_steps": self.progress["meta_step"],
            "of": self.config["steps"],
            "best_validation": self.progress["best_validation"],
            "validated_on": self.validated_on(),
            "best_meta_step": self.progress.get("best_meta_step"),
            "skipped": self.progress["skipped"],
            "seconds": self.progress["seconds"],
            "state": "finished" if self.finished else "unfinished",
        }

    @property
    def few_shot(self) -> bool:
        """Whether a few-shot algorithm was trained, not a rule."""
        return is_few_shot(self.config)

    def validated_on(self) -> str:
        """What the scores of validation are of; those of other tasks or lengths are not to be compared with them."""
        validation = self.config.get("validation", {})
        if self.few_shot:
            steps = validation.get("steps") or self.config["algorithm"].get("steps", 1)
            return f"{steps:,} steps of {self.config['task']['family']}"
        suites = validation.get("suites") or [{"name": "mixture"}]
        suite = next((suite for suite in suites if suite["name"] == validation.get("select")), suites[0])
        horizon = suite.get("horizon") or validation.get("horizon", ValidationConfig.horizon)
        families = Counter(task["family"] for task in suite.get("families") or self.config["tasks"])
        names = (name if count == 1 else f"{count} {name}" for name, count in families.items())
        return f"{horizon:,} steps of {', '.join(names)}"

    @property
    def meta_loss(self) -> str:
        """What kind of number the meta-loss is."""
        return "few-shot" if self.few_shot else str(self.config["estimator"].get("meta_loss", "mean"))

    def _rule(self) -> dict[str, Any]:
        return {
            "rule": self.config["rule"]["architecture"],
            "families": dict(Counter(task["family"] for task in self.config["tasks"])),
            "estimator": self.config["estimator"]["name"],
        }

    def _few_shot(self) -> dict[str, Any]:
        algorithm, family = self.config["algorithm"]["name"], self.config["task"]["family"]
        return {"rule": algorithm, "families": {family: 1}, "estimator": algorithm}

    def settings(self) -> dict[str, Any]:
        """The configuration by dotted names; what an older version did not know is at its default."""
        return {setting.name: setting.value for setting in settings_of(self.config)}

    def changed_settings(self) -> dict[str, Any]:
        """Settings that are not at their defaults, by dotted names, and those that have none."""
        return {setting.name: setting.value for setting in settings_of(self.config) if setting.value != setting.default}

    def metrics(self) -> dict[str, list[float]]:
        """Columns of ``metrics.csv`` up to the checkpoint, each as long as ``meta_step``; NaN where nothing was known.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged.
        """
        path = self.folder / "metrics.csv"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: nothing to show")
        names, rows = read_metrics(path)
        rows = [row for row in rows if int(row["meta_step"]) <= self.progress["meta_step"]]
        return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in names}


def read_run(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one of its files is damaged.
    """
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"no run in {folder}: it has no {FILE}")
    checkpoint = read_checkpoint(folder, with_tensors=False)
    shape = _FewShotRun if is_few_shot(checkpoint.config) else _RuleRun
    check_shape(shape, checkpoint.config, str(folder / FILE))
    return Run(folder, checkpoint.config, checkpoint.progress, read_record(folder).get("sessions", []))


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Runs in these folders, each a run's own or one with runs directly below, by name.

    Raises:
        FileNotFoundError: a folder does not exist, or holds no run.
        ValueError: a file is damaged.
    """
    found = []
    for folder in folders:
        own = [folder] if (folder / FILE).is_file() else sorted(path.parent for path in folder.glob(f"*/{FILE}"))
        if not own:
            raise FileNotFoundError(f"no runs in {folder}" if folder.is_dir() else f"no folder {folder}")
        found += own
    return [read_run(folder) for folder in dict.fromkeys(found)]


def different_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings in which runs differ, by dotted names: the value in each run, None where it is not set."""
    tables = [{**run.settings(), "description": ""} for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    values = {name: [table.get(name) for table in tables] for name in names}
    return {name: row for name, row in sorted(values.items()) if any(value != row[0] for value in row)}


def duration(seconds: float) -> str:
    """Seconds as ``hours:minutes:seconds``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
