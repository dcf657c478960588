"""The record of a run: what is written down to repeat it."""

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.small_runs import configuration, run, weights
from learned_optim import __version__
from learned_optim.meta_train.config.load import config_from_tables
from learned_optim.meta_train.trainer.record import read_record
from learned_optim.meta_train.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_record_suffices_to_repeat_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/learned-optim", "meta-train", "my rule.toml"])
    trainer = Trainer(configuration(seed=4), tmp_path / "first")
    run(trainer)
    record = read_record(tmp_path / "first")
    (session,) = record["sessions"]
    assert shlex.split(session["command"]) == ["learned-optim", "meta-train", "my rule.toml"]
    assert session["meta_step"] == 0
    assert (session["learned_optim"], session["torch"], session["numpy"]) == (
        __version__,
        torch.__version__,
        np.__version__,
    )
    assert {"date", "python", "commit", "processor", "cores", "threads", "machine", "device"} <= session.keys()

    repeated = Trainer(config_from_tables(record["config"]), tmp_path / "second")
    run(repeated)
    assert torch.equal(weights(repeated.best), weights(trainer.best))


def test_record_lists_each_session_that_trained(tmp_path: Path) -> None:
    for stop in (3, 7, 99, 99):  # the last has nothing left to do
        trainer = Trainer.resume(tmp_path) if stop > 3 else Trainer(configuration(), tmp_path)
        for progress in trainer.run():
            if progress.meta_step == stop:
                break
    assert [session["meta_step"] for session in read_record(tmp_path)["sessions"]] == [0, 3, 7]


def test_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        read_record(tmp_path)
