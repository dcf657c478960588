"""Losses on data held out from a benchmark's trainings: disjoint from the training rows, stored with the run."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import baselines
from learned_optim.meta_train.benchmark.evaluation import Problem
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.held_out import LOOKS, HeldOut, look_steps
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.report import problem_table, save_results
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import suite_from_tables
from learned_optim.meta_train.tasks import DataTask, FactorizationFamily, MLPFamily, QuadraticFamily

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


def test_held_out_losses_are_those_of_the_parameters_at_each_look() -> None:
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
    expected = [problem.task.losses(seen[step], held_out.batch).numpy() for step in held_out.steps]
    assert np.array_equal(held_out.losses, np.array(expected, np.float64))
    assert np.array_equal(problem.run(adam), losses)  # looking changes nothing


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


def test_stored_run_keeps_its_held_out_losses_and_seconds(tmp_path: Path) -> None:
    first, again = (run(tmp_path / "cache", held_out=ROWS)[-1] for _ in range(2))
    assert first.held_out is not None
    assert again.held_out is not None
    assert first.held_out.shape == (LOOKS + 1, 2)
    assert np.array_equal(first.held_out, again.held_out)
    assert first.seconds == again.seconds > 0
    assert again.held_out_end == again.held_out[-1].mean()
    assert again.held_out_best == again.held_out.min(0).mean() <= again.held_out_end


def test_runs_with_and_without_held_out_data_are_stored_apart(tmp_path: Path) -> None:
    with_it, without = (run(tmp_path, held_out=rows)[-1] for rows in (ROWS, 0))
    assert without.held_out is None
    assert not np.array_equal(with_it.losses, without.losses)  # it trains on all rows


def test_report_has_held_out_columns(tmp_path: Path) -> None:
    group = run(held_out=ROWS)
    assert "held out, end  held out, best" in problem_table(group)
    assert f"{group[0].held_out_best:.4g}" in problem_table(group)
    assert "held out" not in problem_table(run())
    save_results({"digits": group, "whole": run(name="whole")}, tmp_path, {})
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = [(row["held_out_end"], row["held_out_best"]) for row in rows]
    assert shown[0] == (f"{group[0].held_out_end:.6g}", f"{group[0].held_out_best:.6g}")
    assert shown[-1] == ("", "")
