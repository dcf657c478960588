"""Few-shot runs from configuration to prediction: trainer, files, command line."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_few_shot import write_omniglot
from helpers.small_runs import contents, metrics, plain
from learned_optim import cli
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.config.load import load_tables
from learned_optim.meta_train.config.settings import MetaOptimizerConfig
from learned_optim.meta_train.few_shot.evaluation import evaluate, mean_and_interval
from learned_optim.meta_train.few_shot.images import ImageClasses
from learned_optim.meta_train.few_shot.model import FewShotModel
from learned_optim.meta_train.few_shot.omniglot import TRAINING_CHARACTERS, Omniglot
from learned_optim.meta_train.few_shot.settings import FewShotConfig, few_shot_config, shipped_few_shot_configs
from learned_optim.meta_train.few_shot.trainer import FewShotTrainer
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.trainer.meta_optimizer import MetaOptimizer
from learned_optim.meta_train.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

TABLES: dict[str, Any] = {
    "task": {"family": "sinusoid", "shots": 4, "queries": 4, "hidden": [8]},
    "steps": 6,
    "episodes": 3,
    "meta_optimizer": {"lr": 0.01, "average": 0.9},
    "validation": {"every": 3, "episodes": 4, "steps": 2},
}
SMALL = {"architecture": "scale-free-lstm", "settings": {"hidden_size": 2, "momentum_decays": [0.9]}}
RULE = {"optimizer": "rule", "rule": SMALL}


def config(algorithm: Mapping[str, Any] | None = None, **changes: Any) -> FewShotConfig:
    return few_shot_config({**TABLES, "algorithm": dict(algorithm or {"name": "maml"}), **changes})


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "maml"},
        {"name": "meta-sgd"},
        {"name": "reptile", "steps": 3, "batch_size": 2, "optimizer": "adam"},
        {"name": "meta-lstm", "steps": 2},
        {"name": "maml", "steps": 2, **RULE, "train_rule": True},
        {"name": "fomaml", "steps": 2, **RULE},
    ],
    ids=["maml", "meta-sgd", "reptile", "meta-lstm", "rule", "frozen rule"],
)
def test_few_shot_resume_is_bit_exact(algorithm: dict[str, Any], tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for _ in FewShotTrainer(config(algorithm), whole).run():
        pass
    run = FewShotTrainer(config(algorithm), stopped).run()
    for _ in range(4):
        next(run)
    run.close()
    for _ in FewShotTrainer.resume(stopped).run():
        pass
    assert metrics(stopped) == metrics(whole)
    assert len(metrics(whole)) == 6
    for name in ("checkpoint", "best", "latest"):
        assert contents(stopped / f"{name}.safetensors") == contents(whole / f"{name}.safetensors")


ADAPTING = ("maml", "fomaml", "meta-sgd", "reptile", "leap", "meta-lstm", "pretraining")
COMPARING = ("prototypical", "matching")


@pytest.mark.parametrize("shipped", ["maml-sinusoid", "maml-omniglot-mlp", "maml-omniglot"])
@pytest.mark.parametrize("name", [*ADAPTING, *COMPARING])
def test_every_algorithm_trains_on_the_shipped_tasks(name: str, shipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shipped == "maml-sinusoid" and name in COMPARING:
        pytest.skip("these classify")
    images, classes = (
        torch.randint(256, (20, 1, 28, 28), dtype=torch.uint8),
        torch.zeros(TRAINING_CHARACTERS, dtype=torch.int64),
    )
    monkeypatch.setattr(Omniglot, "classes", lambda *_: ImageClasses(images, classes, classes + 20))  # all the same
    changes = ["steps=1", "episodes=1", "validation.episodes=2", "validation.steps=1"]
    tables = load_tables(shipped, changes, shipped_few_shot_configs())
    progress = next(FewShotTrainer(few_shot_config({**tables, "algorithm": {"name": name}})).run())
    assert progress.skipped == 0


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ADAPTING)
def test_every_algorithm_trains_with_few_or_many_rows_and_units(name: str, steps: int) -> None:
    batch_sizes = (None,) if name == "pretraining" else (None, 1, 3, 50)
    for shots, batch_size, hidden in itertools.product((1, 4), batch_sizes, ([1], [40, 40])):
        task = {**TABLES["task"], "shots": shots, "hidden": hidden}
        algorithm = {"name": name, "steps": steps} | ({} if batch_size is None else {"batch_size": batch_size})
        progress = next(FewShotTrainer(config(algorithm, task=task, steps=1, episodes=2)).run())
        assert progress.skipped == 0


@pytest.mark.parametrize(("train_rule", "moves"), [(True, True), (False, False)])
def test_rule_is_trained_only_if_asked(train_rule: bool, moves: bool) -> None:
    trainer = FewShotTrainer(config({"name": "maml", "steps": 2, **RULE, "train_rule": train_rule}))
    before = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    for _ in trainer.run():
        pass
    changed = {name for name, value in trainer.module.state_dict().items() if not torch.equal(value, before[name])}
    assert "initial" in changed
    assert any(name.startswith("inner.") for name in changed) == moves


def test_maml_learns_waves() -> None:
    """After one inner step, three quarters of the error before meta-training at most."""
    tables: dict[str, Any] = {"task": {"family": "sinusoid", "shots": 10}, "meta_optimizer": {"lr": 5e-3}}
    trainer = FewShotTrainer(config(None, steps=250, episodes=10, validation={"every": 250, "episodes": 50}, **tables))
    before = trainer.evaluate(trainer.averaged).losses[:, -1].mean()
    *_, last = trainer.run()
    assert last.validation is not None
    assert last.validation < 0.75 * before


def test_step_with_non_finite_loss_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = FewShotTrainer(config())
    with torch.no_grad():
        trainer.module.get_parameter("initial").fill_(torch.inf)
    progress = next(trainer.run())
    assert progress.skipped == 1


def test_linear_schedule_falls_to_its_final_fraction() -> None:
    settings = MetaOptimizerConfig("sgd", lr=1.0, schedule="linear", final_fraction=0.2)
    optimizer = MetaOptimizer(torch.nn.Linear(1, 1), settings, 10)
    assert [optimizer.rate(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.6, 0.2])


@pytest.mark.parametrize("name", shipped_few_shot_configs())
def test_shipped_configuration_loads_and_says_what_it_is(name: str) -> None:
    loaded = few_shot_config(load_tables(name, shipped=shipped_few_shot_configs()), name)
    assert loaded.description
    assert few_shot_config(json.loads(loaded.to_json())) == loaded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"family": "sinusoids"}}, r"unknown name 'sinusoids' \(did you mean 'sinusoid'\?\)"),
        ({"task": {"family": "sinusoid", "shot": 3}}, r"unknown key 'shot' \(did you mean 'shots'\?\)"),
        ({"algorithm": {"name": "meta-sgd", "optimizer": "adam"}}, "algorithm 'meta-sgd' has no option 'optimizer'"),
        ({"algorithm": {"name": "maml", "combination": [1.0]}}, "algorithm 'maml' has no option 'combination'"),
        ({"algorithm": {"name": "maml", "optimizer": "rule"}}, "belong together"),
        ({"algorithm": {"name": "leap", **RULE, "train_rule": True}}, "algorithm 'leap' has no option 'train_rule'"),
        ({"algorithm": {"name": "reptile", "steps": 2, "combination": [1.0]}}, "a factor for each of 2 inner steps"),
        ({"algorithm": {"name": "prototypical"}}, "'prototypical' classifies; the task is a regression"),
        ({"algorithm": {"name": "maml"}, "stepps": 3}, r"unknown key 'stepps' \(did you mean 'steps'\?\)"),
    ],
)
def test_configuration_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        few_shot_config({**TABLES, "algorithm": {"name": "maml"}, **changes})


def test_runs_of_another_kind_are_refused(tmp_path: Path) -> None:
    Trainer(plain(steps=1), tmp_path).save_checkpoint()
    with pytest.raises(ValueError, match="holds the run of a rule"):
        FewShotTrainer.resume(tmp_path)
    with pytest.raises(ValueError, match="learns nothing across tasks"):
        FewShotTrainer(config({"name": "scratch"}))
    world = World()
    world.size = 2
    with pytest.raises(ValueError, match="takes one process, got 2"):
        FewShotTrainer(config(), world=world)


class TestModel:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        for _ in FewShotTrainer(config({"name": "maml", "lr": 0.05}), tmp_path / "run").run():
            pass
        return tmp_path / "run"

    def test_three_lines_adapt_a_learner(self, run: Path) -> None:
        inputs = torch.linspace(-3, 3, 4)[:, None]
        targets = inputs.sin()
        model = FewShotModel.load(run / "best.safetensors")
        adapted = model.adapt(inputs, targets, steps=20)
        predictions = adapted.predict(inputs)
        before = model.adapt(inputs, targets, steps=0).predict(inputs)
        assert (predictions - targets).square().mean() < (before - targets).square().mean()
        torch.testing.assert_close(adapted.module()(inputs), predictions)

    def test_saved_model_predicts_as_before(self, run: Path, tmp_path: Path) -> None:
        inputs = torch.linspace(-3, 3, 4)[:, None]
        model = FewShotModel.load(run / "latest.safetensors")
        model.save(tmp_path / "copy.safetensors")
        again = FewShotModel.load(tmp_path / "copy.safetensors")
        assert again.provenance["meta_step"] == 6
        assert torch.equal(again.adapt(inputs, inputs).predict(inputs), model.adapt(inputs, inputs).predict(inputs))

    def test_learner_loads_without_the_file_of_its_rule(self, tmp_path: Path) -> None:
        from learned_optim import load_rule, save_rule

        save_rule(load_rule("default"), tmp_path / "mine.safetensors")
        rule = {"start_from": str(tmp_path / "mine.safetensors")}
        algorithm = {"name": "maml", "optimizer": "rule", "rule": rule}
        for _ in FewShotTrainer(config(algorithm, steps=1), tmp_path / "run").run():
            pass
        (tmp_path / "mine.safetensors").unlink()
        loaded = FewShotModel.load(tmp_path / "run" / "latest.safetensors")
        for name, value in load_rule("default").state_dict().items():
            assert torch.equal(loaded.algorithm.state_dict()[f"inner.{name}"], value)
        assert FewShotTrainer.resume(tmp_path / "run").finished

    def test_inputs_of_another_shape_are_refused(self) -> None:
        omniglot = FewShotModel.of(config({"name": "maml"}, task={"family": "omniglot", "ways": 3, "network": "mlp"}))
        images, labels = torch.rand(3, 1, 28, 28), torch.arange(3)
        for wrong in (images.expand(-1, 3, -1, -1), images[0], images.flatten(1)):
            with pytest.raises(ValueError, match=r"takes inputs of shape \(n, 1, 28, 28\), got"):
                omniglot.adapt(wrong, labels[: len(wrong)])
            with pytest.raises(ValueError, match=r"takes inputs of shape \(n, 1, 28, 28\), got"):
                omniglot.adapt(images, labels).predict(wrong)
        wave = FewShotModel.of(config({"name": "maml"}, task={"family": "sinusoid"}))
        with pytest.raises(ValueError, match=r"takes inputs of shape \(n, 1\), got \(5,\)"):
            wave.adapt(torch.rand(5), torch.rand(5))

    def test_labels_out_of_range_and_missing_targets_are_refused(self) -> None:
        task = {"family": "omniglot", "ways": 3, "network": "mlp"}
        model = FewShotModel.of(config({"name": "prototypical"}, task=task))
        images = torch.rand(3, 1, 28, 28)
        with pytest.raises(ValueError, match="labels must run from 0 to 2, got 1 to 3"):
            model.adapt(images, torch.tensor([1, 2, 3]))
        with pytest.raises(ValueError, match="each input needs a target, got 3 and 2"):
            model.adapt(images, torch.tensor([1, 2]))
        with pytest.raises(TypeError, match="adapts no parameters"):
            model.adapt(images, torch.arange(3)).module()

    def test_files_that_hold_no_learner_are_refused(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "cut.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:200])
        with pytest.raises(ValueError, match="is not a whole"):
            FewShotModel.load(tmp_path / "cut.safetensors")
        with pytest.raises(ValueError, match="holds no few-shot learner"):
            FewShotModel.load(run / "checkpoint.safetensors")
        with pytest.raises(FileNotFoundError, match="no file"):
            FewShotModel.load(tmp_path / "missing.safetensors")


def test_evaluation_is_reproducible_with_confidence_intervals() -> None:
    model = FewShotModel.of(config())
    first, second = (evaluate(model.algorithm, model.learner, 60, 1) for _ in range(2))
    assert torch.equal(first.losses, second.losses)
    assert first.losses.shape == (60, 2)
    assert len(first.losses[:, 0].unique()) == 60
    mean, interval = mean_and_interval(torch.tensor([[1.0], [3.0], [5.0], [7.0]]))
    assert (float(mean), float(interval)) == pytest.approx((4.0, 1.96 * (20 / 3) ** 0.5 / 2))
    with pytest.raises(ValueError, match="at least 2 episodes"):
        evaluate(model.algorithm, model.learner, 1, 1)


class TestCommandLine:
    CONFIG = """
steps = 4
episodes = 2
[task]
family = "omniglot"
ways = 3
network = "mlp"
[algorithm]
name = "fomaml"
[validation]
every = 2
episodes = 2
"""

    def test_run_is_trained_resumed_listed_and_evaluated(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_omniglot(tmp_path, characters=60)
        monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        Path("mine.toml").write_text(self.CONFIG)
        assert cli.main(["meta-train", "mine.toml", "--output", "run"]) == 0
        assert cli.main(["meta-train", "mine.toml", "--output", "run", "--resume"]) == 0
        assert "continuing run at meta-step 4 of 4" in capsys.readouterr().out
        changed = ["meta-train", "mine.toml", "--output", "run", "--resume", "--set", "algorithm.lr=0.5"]
        assert cli.main(changed) == 1
        assert "algorithm.lr: 0.01, not 0.5" in capsys.readouterr().err
        assert cli.main(["runs", "list", "run"]) == 0
        assert "fomaml" in capsys.readouterr().out
        assert cli.main(["runs", "show", "run"]) == 0
        capsys.readouterr()

        evaluate = ["few-shot", "run", "--episodes", "3", "--steps", "2"]
        assert cli.main([*evaluate, "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["batch_norm"] == "transductive"
        assert [row["step"] for row in summary["steps"]] == [0, 1, 2]
        assert cli.main([*evaluate, "--one-by-one"]) == 0
        printed = capsys.readouterr().out
        assert "3 test tasks, not transductive" in printed
        assert printed.count("accuracy") == 3

    def test_untrained_baseline_is_evaluated_from_its_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        text = 'steps = 1\n[task]\nfamily = "sinusoid"\n[algorithm]\nname = "scratch"\n'
        Path("scratch.toml").write_text(text)
        assert cli.main(["few-shot", "scratch.toml", "--episodes", "3"]) == 0
        assert "no batch norm" in capsys.readouterr().out
        assert cli.main(["meta-train", "scratch.toml"]) == 1
        assert "learns nothing across tasks" in capsys.readouterr().err
