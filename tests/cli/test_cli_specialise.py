"""The command ``specialise``: what it refuses, what it writes, interruption, and its exit status."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.commands import error_of, run
from helpers.small_runs import weights
from learned_optim import load_rule
from learned_optim.meta_train import specialise as module
from learned_optim.meta_train.config.load import config_from_tables
from learned_optim.meta_train.reports.gain import Gain
from learned_optim.meta_train.specialise import changed_fields, default_folder, name_of, plan, recipe
from learned_optim.meta_train.tasks import QuadraticFamily
from learned_optim.meta_train.trainer.trainer import Trainer

REQUEST = module.Request(task="quadratic", options={}, steps=10, minutes=1.0, rule="default")


@dataclass
class Compared:
    """A comparison that is not run: what it was asked for, and what it finds."""

    gain: Gain
    weights: Path | None = None

    def __call__(self, task: str, options: Any, steps: int, weights: Path, out: Path, device: str) -> Gain:
        assert weights.is_file()
        self.weights = weights
        return self.gain


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Compared]:
    """Meta-training of six steps, whatever the minutes, and no comparison: its lower end is given."""

    def within(request: module.Request, seed: int) -> Any:
        return config_from_tables(recipe(request, seed, steps=6, every=3))

    def use(low: float) -> Compared:
        compared = Compared(Gain(low + 0.1, low, low + 0.2, 0.9))
        monkeypatch.setattr(module, "within_minutes", within)
        monkeypatch.setattr(module, "compare_with_default", compared)
        return compared

    return use


class TestCommand:
    def test_rule_and_request_are_in_the_run_folder(
        self, short: Callable[[float], Compared], capsys: pytest.CaptureFixture[str]
    ) -> None:
        compared = short(1.1)
        options = ("--set", "dimensions=[2, 3]", "--steps", "10", "--output", "mine", "--require-gain")
        assert run("specialise", "quadratic", *options) == 0
        assert compared.weights == Path("mine/specialised.safetensors")
        request = json.loads(Path("mine/specialise.json").read_text())
        assert (request["task"], request["options"], request["steps"]) == ("quadratic", {"dimensions": [2, 3]}, 10)
        assert "the specialised rule is better" in capsys.readouterr().out

    def test_rule_that_is_not_better_fails_where_a_gain_is_required(
        self, short: Callable[[float], Compared], capsys: pytest.CaptureFixture[str]
    ) -> None:
        short(0.95)
        assert run("specialise", "quadratic", "--steps", "10", "--output", "mine") == 0
        assert "not shown to be better" in capsys.readouterr().out
        assert run("specialise", "--resume", "mine", "--require-gain") == 1
        assert "no gain: the specialised rule is not shown" in capsys.readouterr().err

    def test_interrupted_run_is_resumed_bit_exactly(
        self, short: Callable[[float], Compared], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        short(1.1)
        assert run("specialise", "quadratic", "--steps", "10", "--output", "whole") == 0
        step = Trainer._step

        def interrupted(trainer: Trainer) -> Any:
            if trainer.meta_step == 4:
                raise KeyboardInterrupt
            return step(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", interrupted)
            patch.setattr("learned_optim.meta_train.trainer.loop.CHECKPOINT_SECONDS", -1.0)
            assert run("specialise", "quadratic", "--steps", "10", "--output", "cut") == 130
        assert "learned-optim specialise --resume cut" in capsys.readouterr().err
        assert not Path("cut/specialised.safetensors").exists()
        assert run("specialise", "--resume", "cut") == 0
        for name in ("latest", "specialised"):
            whole, cut = (weights(load_rule(f"{folder}/{name}.safetensors")) for folder in ("whole", "cut"))
            assert torch.equal(whole, cut)


class TestRefusals:
    def test_broken_family_is_refused_before_anything_is_written(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = error_of(capsys, "specialise", "helpers.odd_families:OddFamily", "--set", "fault=zero")
        assert "the loss must be positive before the first step" in line
        assert not Path("runs").exists()

    def test_task_or_run_is_needed_and_not_both(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "name a task, or a run to continue" in error_of(capsys, "specialise")
        assert "name a task, or a run to continue" in error_of(capsys, "specialise", "mlp", "--resume", "runs/mine")

    def test_run_that_has_begun_keeps_its_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--steps cannot change a run" in error_of(capsys, "specialise", "--resume", "runs/mine", "--steps", "9")

    def test_folder_that_holds_a_run_is_not_overwritten(
        self, short: Callable[[float], Compared], capsys: pytest.CaptureFixture[str]
    ) -> None:
        short(1.1)
        assert run("specialise", "quadratic", "--steps", "10", "--output", "mine") == 0
        capsys.readouterr()
        assert "mine holds a run already; continue it" in error_of(
            capsys, "specialise", "quadratic", "--output", "mine"
        )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("specialise", "nonsense"), "nonsense"),
            (("specialise", "absent.py:Family"), "no file"),
            (("specialise", "quadratic", "--set", "dimension=3"), "dimension"),
            (("specialise", "quadratic", "--minutes", "-1"), "minutes must be positive"),
            (("specialise", "--resume", "absent"), "no run of specialise in absent"),
        ],
        ids=["family", "file", "option", "minutes", "run"],
    )
    def test_mistake_is_named_in_one_line(
        self, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert words in error_of(capsys, *arguments)


class TestPlan:
    @pytest.mark.parametrize("seconds", [10.0, 60.0, 1200.0])
    @pytest.mark.parametrize(("step", "validation"), [(0.1, 0.5), (1.0, 30.0), (0.05, 0.01)])
    def test_steps_and_validations_fit_into_the_time(self, seconds: float, step: float, validation: float) -> None:
        steps, every = plan(seconds, step, validation)
        assert steps % every == 0  # the last weights are validated
        assert steps // every >= 10
        if every > 1:
            assert steps * (step + validation / every) <= seconds
        if steps // every > 10:
            assert validation / every <= 0.15 * step

    def test_recipe_trains_and_validates_at_the_length_asked_for(self) -> None:
        config = config_from_tables(recipe(REQUEST, 3, steps=20, every=2))
        low, high = config.unroll.horizon
        assert low <= config.validation.horizon == 10 <= high
        assert (config.seed, config.steps, config.rule.start_from) == (3, 20, "default")


class TestNames:
    def test_files_are_named_by_their_whole_path(self, tmp_path: Path) -> None:
        assert name_of("tasks.py:Mine") == (f"{tmp_path}/tasks.py:Mine", {})
        assert name_of("tasks.py") == (f"{tmp_path}/tasks.py:model", {})
        assert name_of("mlp") == ("mlp", {})

    def test_families_are_named_with_their_options(self) -> None:
        assert name_of(QuadraticFamily) == ("quadratic", {})
        assert name_of(QuadraticFamily(dimensions=(2, 3))) == ("quadratic", {"dimensions": (2, 3)})
        assert changed_fields(QuadraticFamily()) == {}

    def test_folders_are_named_after_the_task(self) -> None:
        assert default_folder("/a/tasks.py:Mine") == Path("runs/specialise-Mine")
        assert default_folder("/a/my_model.py:model") == Path("runs/specialise-my_model")
        assert default_folder("mlp") == Path("runs/specialise-mlp")
