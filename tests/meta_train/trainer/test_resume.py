"""Interrupted runs take the course of uninterrupted ones, and what a run leaves on disk is whole."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.small_runs import (
    QUADRATIC,
    STEPS,
    assert_same_outcome,
    configuration,
    contents,
    metrics,
    plain,
    run,
    weights,
)
from helpers.user_tasks import Failing
from learned_optim import load_rule
from learned_optim.checkpoint import read_provenance, save_rule
from learned_optim.meta_train.config.load import config_from_tables
from learned_optim.meta_train.trainer import loop
from learned_optim.meta_train.trainer.checkpoint import read_checkpoint
from learned_optim.meta_train.trainer.log import RunLog
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.rules import LSTML2L

SGD_WITH_MOMENTUM = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.01, "clip_value": 0.1}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("run")
    progress = run(Trainer(configuration(), folder))
    assert [entry.meta_step for entry in progress] == list(range(1, STEPS + 1))
    assert [entry.validation is not None for entry in progress] == [step % 4 == 0 for step in range(1, STEPS + 1)]
    return folder


class TestResume:
    @pytest.mark.slow
    @pytest.mark.parametrize("stops", [(1,), (4,), (7,), (2, 3, 11)], ids=str)
    def test_resume_after_leaving_the_loop_is_bit_exact(
        self, stops: tuple[int, ...], uninterrupted: Path, tmp_path: Path
    ) -> None:
        trainer = Trainer(configuration(), tmp_path)
        for stop in stops:
            for progress in trainer.run():
                if progress.meta_step == stop:
                    break
            assert [int(row["meta_step"]) for row in metrics(tmp_path)] == list(range(1, stop + 1))
            trainer = Trainer.resume(tmp_path)
            assert trainer.meta_step == stop
        run(trainer)
        assert_same_outcome(tmp_path, uninterrupted)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {"name": "reparameterization", "replay_coordinates": 3},
            {"name": "es", "pairs": 2, "groups": 1},
            {"name": "combined", "variance_decay": 0.5},
            {"name": "pes", "pairs": 2},
            {"name": "es-single"},
        ],
        ids=lambda options: options["name"],
    )
    def test_resume_restores_particles_and_estimator_state(self, options: dict[str, Any], tmp_path: Path) -> None:
        estimator = {"replay_coordinates": None, "sigma": 0.1, **options}
        run(Trainer(configuration(estimator=estimator), tmp_path / "whole"))
        for progress in Trainer(configuration(estimator=estimator), tmp_path / "parts").run():
            if progress.meta_step == 7:
                break
        run(Trainer.resume(tmp_path / "parts"))
        assert_same_outcome(tmp_path / "parts", tmp_path / "whole")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "changes",
        [
            {"curriculum": {"horizons": [2, 4, 8], "every": 2, "evaluations": 1}, "meta_optimizer": {"lr": 0.1}},
            {"unroll": {"truncation_growth": {"to": 6, "over": 10}}, "meta_optimizer": SGD_WITH_MOMENTUM},
            {"unroll": {"truncation_up_to": 7}, "meta_optimizer": {"name": "adamw", "weight_decay": 0.1, "warmup": 5}},
            {"validation": {"suites": [{"name": "far", "horizon": 8}, {"name": "near", "families": [QUADRATIC]}]}},
            {
                "tasks": [QUADRATIC],
                "estimator": {"outer_batches": 2, "outer_split": "validation", "bounded": True},
                "meta_optimizer": {"schedule": "exponential", "final_fraction": 0.1, "clip_value": 0.1},
            },
        ],
        ids=["curriculum", "growth-and-momentum", "random-windows-and-adamw", "suites", "outer-batches"],
    )
    def test_resume_restores_all_other_state(self, changes: dict[str, Any], tmp_path: Path) -> None:
        changes = dict(changes)
        if "curriculum" in changes:
            changes["unroll"] = {"horizon": [100, 100]}
        run(Trainer(configuration(**changes), tmp_path / "whole"))
        trainer = Trainer(configuration(**changes), tmp_path / "parts")
        while not trainer.finished:
            for progress in trainer.run():
                if progress.meta_step % 3 == 0:
                    break
            trainer = Trainer.resume(tmp_path / "parts")
        assert_same_outcome(tmp_path / "parts", tmp_path / "whole")
        ends = [read_checkpoint(tmp_path / folder).progress for folder in ("parts", "whole")]
        assert ends[0]["curriculum"] == ends[1]["curriculum"]

    def test_resume_of_a_finished_run_changes_nothing(self, uninterrupted: Path) -> None:
        before = contents(uninterrupted / "checkpoint.safetensors"), metrics(uninterrupted)
        assert run(Trainer.resume(uninterrupted)) == []
        assert (contents(uninterrupted / "checkpoint.safetensors"), metrics(uninterrupted)) == before

    def test_run_is_independent_of_the_global_random_state(self, uninterrupted: Path, tmp_path: Path) -> None:
        torch.manual_seed(12345)
        state = torch.get_rng_state()
        run(Trainer(configuration(), tmp_path))
        assert torch.equal(torch.get_rng_state(), state)
        assert_same_outcome(tmp_path, uninterrupted)

    def test_another_seed_gives_another_run(self, uninterrupted: Path, tmp_path: Path) -> None:
        run(Trainer(configuration(seed=1), tmp_path))
        assert contents(tmp_path / "latest.safetensors") != contents(uninterrupted / "latest.safetensors")

    def test_failure_within_a_step_keeps_the_last_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = configuration(
            tasks=[{"family": "helpers.user_tasks:FailingFamily"}], estimator={"replay_coordinates": None}
        )
        run(Trainer(config, tmp_path / "whole"))

        folder = tmp_path / "failed"
        monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # one at every step
        monkeypatch.setattr(Failing, "batches", 0)
        monkeypatch.setattr(Failing, "fail_at", 21)
        trainer = Trainer(config, folder)
        with pytest.raises(OSError, match="disk gone"):
            run(trainer)
        monkeypatch.setattr(Failing, "fail_at", 0)
        resumed = Trainer.resume(folder)
        assert 1 <= resumed.meta_step < STEPS
        assert len(metrics(folder)) == resumed.meta_step
        run(resumed)
        assert_same_outcome(folder, tmp_path / "whole")

    @pytest.mark.slow
    def test_rows_after_the_checkpoint_are_dropped(self, tmp_path: Path) -> None:
        """A kill leaves rows that were written after the checkpoint, the last of them only in part."""
        trainer = Trainer(plain(steps=200, validation={"every": 1000}), tmp_path)
        for progress in trainer.run():
            if progress.meta_step == 123:
                break
        lines = (tmp_path / "metrics.csv").read_text().splitlines(keepends=True)
        rows = metrics(tmp_path)
        row_after = lines[-1].replace("123,", "124,", 1)
        for cut_short in ("12", "1", "125", "125,0.5,0.25", row_after.replace("124,", "125,")[:-3]):
            (tmp_path / "metrics.csv").write_text("".join([*lines, row_after, cut_short]))
            RunLog(tmp_path, 123, trainer.detail_names).close()
            assert metrics(tmp_path) == rows

    def test_resume_needs_the_checkpoint_alone(self, tmp_path: Path) -> None:
        """The weights that a run started from may have been moved, or replaced by others."""
        first = Trainer(plain(seed=5))
        run(first)
        save_rule(first.module, tmp_path / "start.safetensors")
        config = plain(rule={"start_from": str(tmp_path / "start.safetensors")})
        run(Trainer(config, tmp_path / "whole"))
        folder = tmp_path / "interrupted"
        for progress in Trainer(config, folder).run():
            if progress.meta_step == 5:
                break
        (tmp_path / "start.safetensors").unlink()
        resumed = Trainer.resume(folder)
        assert resumed.config == config
        run(resumed)
        assert_same_outcome(folder, tmp_path / "whole")

    def test_resume_without_a_checkpoint_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nothing to resume: no .*checkpoint\.safetensors"):
            Trainer.resume(tmp_path)

    def test_resume_of_another_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.safetensors"
        save_rule(LSTML2L(2), path)
        with pytest.raises(ValueError, match="is not a meta-training checkpoint"):
            Trainer.resume(tmp_path)
        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="is not a meta-training checkpoint"):
            Trainer.resume(tmp_path)

    def test_resume_of_a_damaged_checkpoint_is_refused(self, tmp_path: Path) -> None:
        trainer = Trainer(plain(), tmp_path)
        trainer.save_checkpoint()
        path = tmp_path / "checkpoint.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
            Trainer.resume(tmp_path)


class TestCheckpoint:
    def test_checkpoint_is_written_atomically(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = Trainer(plain(), tmp_path)
        steps = trainer.run()
        next(steps)
        trainer.save_checkpoint()
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
        next(steps)

        def no_space(descriptor: int) -> None:
            raise OSError("no space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", no_space)
            with pytest.raises(OSError, match="no space"):
                trainer.save_checkpoint()
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before
        assert {path.name for path in tmp_path.iterdir()} == {*before, "metrics.csv", "run.json", "tensorboard"}
        steps.close()
        assert Trainer.resume(tmp_path).meta_step == 2

    def test_checkpoint_is_written_every_minute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(0, 10_000, 25))  # seconds: a step takes 25 of the 60 between checkpoints
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        saved = []
        for progress in Trainer(plain(steps=7), tmp_path).run():
            path = tmp_path / "checkpoint.safetensors"
            saved.append(Trainer.resume(tmp_path).meta_step if path.exists() else 0)
            assert progress.seconds == 25 * progress.meta_step
        assert saved == [0, 0, 3, 3, 3, 6, 6]
        assert Trainer.resume(tmp_path).meta_step == 7
        assert Trainer.resume(tmp_path).seconds == 7 * 25

    def test_weights_are_rules_with_their_provenance(self, tmp_path: Path) -> None:
        config = configuration()
        trainer = Trainer(config, tmp_path)
        run(trainer)
        assert torch.equal(weights(load_rule(tmp_path / "best.safetensors")), weights(trainer.best))
        assert torch.equal(weights(load_rule(tmp_path / "latest.safetensors")), weights(trainer.averaged))
        provenance = read_provenance(tmp_path / "best.safetensors")
        assert config_from_tables(provenance["config"]) == config
        assert provenance["meta_step"] == trainer.best_meta_step > 0
        assert read_provenance(tmp_path / "latest.safetensors")["meta_step"] == STEPS

    def test_best_weights_are_written_from_the_first_validation_on(self, tmp_path: Path) -> None:
        trainer = Trainer(plain(steps=4, validation={"every": 3, "baselines": False}), tmp_path)
        written = []
        for _ in trainer.run():
            trainer.save_checkpoint()
            written.append((tmp_path / "best.safetensors").exists())
        assert written == [False, False, True, True]

    def test_metadata_is_valid_json_before_the_first_validation(self, tmp_path: Path) -> None:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        trainer = Trainer(plain(steps=4, validation={"baselines": False}), tmp_path)
        next(trainer.run())
        trainer.save_checkpoint()
        for name in ("checkpoint", "latest"):
            with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
                metadata = file.metadata()
            for entry in metadata.keys() & {"config", "progress", "provenance"}:
                json.loads(metadata[entry], parse_constant=refuse)
        assert read_provenance(tmp_path / "latest.safetensors")["best_validation"] is None
        assert Trainer.resume(tmp_path).best_validation == math.inf
