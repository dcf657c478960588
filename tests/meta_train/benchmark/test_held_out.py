"""Losses on data held out from a benchmark's trainings: disjoint from the training rows, stored with the run."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import baselines
from learned_optim.meta_train.benchmark.evaluation import Problem
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.held_out import LOOKS, HeldOut, HoldOut, hold_out_of, look_steps
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.report import as_json, problem_table, save_results
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import SuiteProblem, suite_from_tables
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.tasks import (
    ClassificationTask,
    DataTask,
    FactorizationFamily,
    MLPFamily,
    QuadraticFamily,
    Split,
    Task,
    TaskFamily,
)
from learned_optim.meta_train.tasks.mlp import image_rows

STEPS, ROWS = 60, 30
DIGITS = MLPFamily(dataset="digits", width=(8, 8), batch_size=(4, 4), initial="torch")
ENTRY = {
    "name": "digits",
    "family": "mlp",
    "steps": STEPS,
    "seeds": 2,
    "tuning_seeds": 1,
    "dataset": "digits",
    "width": [8, 8],
    "batch_size": [4, 4],
}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(cache: Path | None = None, **others: Any) -> list[Result]:
    suite = suite_from_tables({"name": "test", "rates": [0.01], "problems": [{**ENTRY, **others}]})
    harness = Harness(suite, baselines(["Adam@0.01"]), [], cache=Cache(cache))
    with Bar(0) as bar:
        (group,) = harness.results(bar)
    return group


def test_held_out_rows_are_disjoint_from_training_rows() -> None:
    problem = Problem(DIGITS, seeds=2, steps=STEPS, seed=0, split="train", held_out=ROWS)
    trained, outer = problem.task.task, problem.task.outer
    assert isinstance(trained, DataTask)
    assert isinstance(outer, DataTask)
    assert len(trained.data[0]) == 800
    held_out = HeldOut(problem)
    assert held_out.batch[0].shape == (2, ROWS, 64)
    kept = {tuple(row) for row in trained.data[0].tolist()}
    assert not kept & {tuple(row) for row in held_out.batch[0].flatten(0, 1).tolist()}


def by_hand(network: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a perceptron with one sigmoid layer, in NumPy and float64."""
    first, out = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    weights = [each.detach().double().numpy() for each in (first.weight, first.bias, out.weight, out.bias)]
    hidden = 1 / (1 + np.exp(-(inputs.double().numpy() @ weights[0].T + weights[1])))
    logits = hidden @ weights[2].T + weights[3]
    likelihoods = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = np.arange(len(logits))
    return float(-np.log(likelihoods[rows, labels]).mean()), float((logits.argmax(1) == labels.numpy()).mean())


def test_held_out_losses_and_accuracies_are_those_computed_by_hand() -> None:
    problem = Problem(DIGITS, seeds=2, steps=STEPS, seed=0, held_out=ROWS)
    held_out = HeldOut(problem)
    seen: dict[int, Tensor] = {}

    def look(step: int, parameters: Tensor) -> None:
        seen[step] = parameters.detach().clone()
        held_out.look(step, parameters)

    losses = problem.run(adam, look=look)
    assert look_steps(STEPS) == held_out.steps
    assert (held_out.steps[0], held_out.steps[-1], len(held_out.steps)) == (0, STEPS, LOOKS + 1)
    assert list(seen) == list(range(STEPS + 1))
    network = problem.task.task.module()
    for number, step in enumerate(held_out.steps):
        for seed in range(2):
            vector_to_parameters(seen[step][seed], network.parameters())
            loss, accuracy = by_hand(network, *(tensor[seed] for tensor in held_out.batch))
            assert held_out.losses[number, seed] == pytest.approx(loss, rel=1e-5)
            assert held_out.accuracies is not None
            assert held_out.accuracies[number, seed] == pytest.approx(accuracy, abs=1e-6)
    assert np.array_equal(problem.run(adam), losses)  # looking changes nothing


@dataclass(frozen=True)
class DropoutFamily(TaskFamily):
    """Digits behind dropout."""

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        return DropoutTask(image_rows("digits", split, 4), 8)


class DropoutTask(ClassificationTask):
    """A linear layer that sees half of the pixels in training, and all of them in evaluation."""

    def module(self) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 10))


def test_looks_are_in_evaluation_mode_and_leave_training_as_it_is() -> None:
    problem = Problem(DropoutFamily(), seeds=2, steps=10, seed=0, held_out=ROWS)
    held_out = HeldOut(problem)
    start = problem.task.initial_parameters
    held_out.look(0, start)
    inputs, labels = held_out.batch
    for seed in range(2):
        weight, bias = start[seed, :160].view(10, 16), start[seed, 160:]
        logits = inputs[seed] @ weight.T + bias  # nothing is dropped
        assert held_out.losses[0, seed] == pytest.approx(float(F.cross_entropy(logits, labels[seed])), rel=1e-5)
    assert np.array_equal(problem.run(adam, look=held_out.look), problem.run(adam))
    assert len(np.unique(problem.run(adam)[0])) == 2


def test_looks_after_divergence_are_infinite() -> None:
    problem = Problem(DIGITS, seeds=2, steps=STEPS, seed=0, held_out=ROWS)
    held_out = HeldOut(problem)
    problem.run(lambda parameters: torch.optim.SGD(parameters, lr=1e38), look=held_out.look)
    assert np.isfinite(held_out.losses[0]).all()
    assert np.isinf(held_out.losses[-1]).all()


def test_tasks_without_a_finite_data_set_hold_nothing_out() -> None:
    assert not Problem(QuadraticFamily(), seeds=2, steps=2, seed=0, held_out=ROWS).has_held_out
    assert not Problem(DIGITS, seeds=2, steps=2, seed=0).has_held_out
    with pytest.raises(ValueError, match="FactorizationTask holds no data out"):
        Problem(FactorizationFamily(), seeds=2, steps=2, seed=0, held_out=ROWS)


class TestWhatIsHeldOut:
    @staticmethod
    def of(**entry: Any) -> HoldOut:
        (problem,) = suite_from_tables({"name": "test", "problems": [{**ENTRY, **entry}]}).problems
        return hold_out_of(problem, problem.build())

    def test_data_are_held_out_unless_the_suite_says_otherwise(self) -> None:
        assert (self.of().rows, self.of().absent) == (500, "")
        assert self.of(held_out=7).rows == 7
        assert (self.of(held_out=0).rows, self.of(held_out=0).absent) == (0, "switched off (held_out = 0)")

    @pytest.mark.parametrize(
        ("family", "reason"),
        [("quadratic", "every batch is new data"), ("factorization", "FactorizationTask holds no data out")],
    )
    def test_reason_is_given_where_nothing_can_be_held_out(self, family: str, reason: str) -> None:
        problem = SuiteProblem("p", family, 10)
        found = hold_out_of(problem, problem.build())
        assert found.rows == 0
        assert reason in found.absent

    def test_rows_that_a_task_does_not_have_are_refused(self) -> None:
        problem = SuiteProblem("p", "factorization", 10, held_out=5)
        with pytest.raises(
            ConfigError, match=r"problem 'p': held_out = 5: FactorizationTask holds .* set held_out = 0"
        ):
            hold_out_of(problem, problem.build())


def test_stored_run_keeps_its_held_out_losses_and_seconds(tmp_path: Path) -> None:
    first, again = (run(tmp_path / "cache", held_out=ROWS)[-1] for _ in range(2))
    for found in (first, again):
        assert found.held_out is not None
        assert found.accuracy is not None
        assert found.held_out.shape == found.accuracy.shape == (LOOKS + 1, 2)
    assert np.array_equal(first.held_out, again.held_out)  # type: ignore[arg-type]
    assert np.array_equal(first.accuracy, again.accuracy)  # type: ignore[arg-type]
    assert first.seconds == again.seconds > 0


@pytest.mark.slow
def test_runs_with_and_without_held_out_data_are_stored_apart(tmp_path: Path) -> None:
    without, with_it, default = (run(tmp_path, **rows)[-1] for rows in ({"held_out": 0}, {"held_out": ROWS}, {}))
    assert without.held_out is None
    assert without.not_held_out
    assert default.held_out is not None
    assert not np.array_equal(with_it.losses, without.losses)  # it trains on all rows
    assert np.array_equal(with_it.losses, default.losses)
    assert not np.array_equal(with_it.held_out, default.held_out)  # type: ignore[arg-type]  # of other rows


def test_report_has_held_out_columns(tmp_path: Path) -> None:
    group = run(held_out=ROWS)
    table = problem_table(group)
    assert "held out, end  held out, best  at step  accuracy, end  best" in table
    row = next(line for line in table.splitlines() if line.startswith("Adam@0.01")).split()
    shown = [f"{group[1].held_out_end:.4g}", f"{group[1].held_out_best:.4g}", f"{group[1].held_out_best_step:.0f}"]
    assert row[-5:] == [*shown, f"{group[1].accuracy_end:.1%}", f"{group[1].accuracy_best:.1%}"]
    whole = run(name="whole", held_out=0)
    lines = problem_table(whole).splitlines()
    assert [line.split()[-1] for line in lines[2:-1]] == ["none", "none"]
    assert lines[-1] == "held out: none; switched off (held_out = 0)"
    assert "held_out" in save_results({"digits": group, "whole": whole}, tmp_path, {})
    rows = read(tmp_path / "summary.csv")
    found = [(row["held_out_end"], row["held_out_best"], row["accuracy_end"]) for row in rows]
    assert found[0] == tuple(
        f"{value:.6g}" for value in (group[0].held_out_end, group[0].held_out_best, group[0].accuracy_end)
    )
    assert found[-1] == ("", "", "")
    looks = [row for row in read(tmp_path / "held_out.csv") if row["optimizer"] == "Adam"]
    assert [int(row["step"]) for row in looks] == look_steps(STEPS)
    assert float(looks[-1]["mean_loss"]) == pytest.approx(group[0].held_out_end, rel=1e-5)
    assert float(looks[-1]["mean_accuracy"]) == pytest.approx(group[0].accuracy_end, rel=1e-5)
    document = json.loads(as_json({"digits": group, "whole": whole}, {}))["problems"]
    assert document["digits"][0]["accuracy_best"] == group[0].accuracy_best
    assert document["whole"][0]["not_held_out"] == "switched off (held_out = 0)"


USER = """
import torch
inputs = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
labels = (inputs.sum(1) > 0).long()
def build():
    return torch.nn.Linear(2, 2)
def batch(generator):
    rows = torch.randint(40, (8,), generator=generator)
    return inputs[rows], labels[rows]
def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
"""
HELD_OUT = """
def held_out(generator):
    return inputs[40:], labels[40:]
"""
ACCURACY = """
def accuracy(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float().mean().item()
"""


class TestFileOfAUser:
    @staticmethod
    def run(folder: Path, text: str) -> Result:
        (folder / "mine.py").write_text(text)
        entry = {"name": "mine", "family": f"{folder}/mine.py:build", "steps": 25, "seeds": 2, "tuning_seeds": 1}
        suite = suite_from_tables({"name": "test", "rates": [0.01], "problems": [entry]})
        with Bar(0) as bar:
            ((found,),) = Harness(suite, baselines(["Adam"]), [], cache=Cache(None)).results(bar)
        return found

    def test_held_out_data_and_accuracy_are_measured_where_the_file_has_them(self, tmp_path: Path) -> None:
        whole = self.run(tmp_path, USER + HELD_OUT + ACCURACY)
        assert whole.held_out is not None
        assert whole.accuracy is not None
        assert set(np.round(10 * whole.accuracy, 6).flatten()) <= set(range(11))  # shares of ten rows
        only = self.run(tmp_path, USER + HELD_OUT)
        assert np.array_equal(only.held_out, whole.held_out)  # type: ignore[arg-type]
        assert only.accuracy is None
        neither = self.run(tmp_path, USER)
        assert neither.held_out is None
        assert neither.not_held_out == "no function held_out(generator) beside batch(generator)"
        assert np.array_equal(neither.losses, whole.losses)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (ACCURACY.replace(".mean()", ".sum()"), "share of right predictions, between 0 and 1, got"),
            ("def accuracy(logits, labels):\n    return logits.argmax(1)", "cannot be evaluated: AttributeError"),
            ("def held_out(generator):\n    return inputs[40:, :1], labels[40:]", "cannot be evaluated: RuntimeError"),
        ],
        ids=["count", "other-arguments", "other-inputs"],
    )
    def test_mistakes_are_found_before_training(
        self, more: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            self.run(tmp_path, USER + HELD_OUT + more)
        assert "tuning" not in capsys.readouterr().err
