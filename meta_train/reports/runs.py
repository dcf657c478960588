"""Runs as things to look at: what a run folder holds, read back."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learned_optim.meta_train.common.strict import check_shape
from learned_optim.meta_train.reports.settings import settings_of
from learned_optim.meta_train.trainer.checkpoint import CHECKPOINT_FILE, read_checkpoint
from learned_optim.meta_train.trainer.kind import RULE, RunKind, kind_of
from learned_optim.meta_train.trainer.log import read_metrics
from learned_optim.meta_train.trainer.record import read_record


@dataclass(frozen=True)
class Run:
    """A meta-training run on disk, without its tensors."""

    folder: Path
    kind: RunKind
    config: dict[str, Any]
    """Nested tables."""
    progress: dict[str, Any]
    """Counters and scores of the latest checkpoint."""
    sessions: list[dict[str, Any]]
    """The start of the run, and each time that it was resumed: see :func:`record_session`."""

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
            **self.kind.summary(self.config),
            "meta_steps": self.progress["meta_step"],
            "of": self.config["steps"],
            "best_validation": self.progress["best_validation"],
            "validated_on": self.validated_on(),
            **({"baselines": self.baselines} if self.baselines else {}),
            "best_meta_step": self.progress.get("best_meta_step"),
            "skipped": self.progress["skipped"],
            "seconds": self.progress["seconds"],
            "state": "finished" if self.finished else "unfinished",
        }

    @property
    def baselines(self) -> dict[str, float]:
        """Validation scores before the first meta-step, of the start and others, by name; those that are numbers."""
        scores = self.progress.get("baselines") or {}
        return {name: score for name, score in scores.items() if score is not None}

    def validated_on(self) -> str:
        """The tasks of validation, and their length: scores on other ones are not to be compared."""
        return self.kind.validated_on(self.config)

    @property
    def meta_loss(self) -> str:
        """A name for the scale of the meta-loss: numbers under different names are not to be compared."""
        return self.kind.meta_loss(self.config)

    def settings(self) -> dict[str, Any]:
        """The configuration by dotted names; what an older version did not know is at its default."""
        return {setting.name: setting.value for setting in settings_of(self.config, self.kind)}

    def changed_settings(self) -> dict[str, Any]:
        """Settings that are not at their defaults, by dotted names, and those that have none."""
        return {
            setting.name: setting.value
            for setting in settings_of(self.config, self.kind)
            if setting.value != setting.default
        }

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


def read_run(folder: Path, kinds: Iterable[RunKind] = (RULE,)) -> Run:
    """The run in ``folder``, which is of one of these kinds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one of its files is damaged.
    """
    if not (folder / CHECKPOINT_FILE).is_file():
        raise FileNotFoundError(f"no run in {folder}: it has no {CHECKPOINT_FILE}")
    checkpoint = read_checkpoint(folder, with_tensors=False)
    kind = kind_of(checkpoint.config, kinds)
    check_shape(kind.shape, checkpoint.config, str(folder / CHECKPOINT_FILE))
    config = kind.without_former_options(checkpoint.config)
    return Run(folder, kind, config, checkpoint.progress, read_record(folder).get("sessions", []))


def find_runs(folders: Iterable[Path], kinds: Sequence[RunKind] = (RULE,)) -> list[Run]:
    """Runs of these kinds in these folders, each a run's own or one with runs directly below, by name.

    Raises:
        FileNotFoundError: a folder does not exist, or holds no run.
        ValueError: a file is damaged.
    """
    return [read_run(folder, kinds) for folder in find_run_folders(folders)]


def find_run_folders(folders: Iterable[Path]) -> list[Path]:
    """The folders of the runs that :func:`find_runs` reads, each once; ``FileNotFoundError`` as there."""
    found = []
    for folder in folders:
        own = (
            [folder]
            if (folder / CHECKPOINT_FILE).is_file()
            else sorted(path.parent for path in folder.glob(f"*/{CHECKPOINT_FILE}"))
        )
        if not own:
            raise FileNotFoundError(f"no runs in {folder}" if folder.is_dir() else f"no folder {folder}")
        found += own
    return list(dict.fromkeys(found))


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
