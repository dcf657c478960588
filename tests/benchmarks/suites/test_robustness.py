"""Disturbances of benchmarks/suites/robustness.py are what their names say."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.suites import robustness
from benchmarks.suites.robustness import CONDITIONS, Condition, Disturbed

GRADIENT = torch.linspace(-1, 1, 4_000).view(4, 1_000)
NAMED = {condition.name: condition for condition in CONDITIONS}


def gradients_seen(condition: Condition, steps: int) -> list[Tensor]:
    """Gradients that the inner optimizer receives under a condition, where the true one is the same at each step."""
    parameter = torch.zeros_like(GRADIENT, requires_grad=True)
    optimizer, seen = Disturbed(torch.optim.SGD([parameter], lr=0.0), condition), []
    for _ in range(steps):
        parameter.grad = GRADIENT.clone()
        optimizer.step()
        seen.append(parameter.grad)
    return seen


def test_undisturbed_gradients_are_unchanged() -> None:
    assert all(torch.equal(seen, GRADIENT) for seen in gradients_seen(NAMED["undisturbed"], 3))


def test_one_gradient_in_a_hundred_is_huge() -> None:
    seen = gradients_seen(NAMED["one gradient in 100 times 10,000"], 200)
    huge = [place for place, grad in enumerate(seen) if torch.equal(grad, 1e4 * GRADIENT)]
    assert huge == [99, 199]
    assert sum(torch.equal(grad, GRADIENT) for grad in seen) == 198


def test_noise_is_as_large_as_the_gradient_and_differs_from_step_to_step() -> None:
    first, second = (grad - GRADIENT for grad in gradients_seen(NAMED["noise as large as the gradient"], 2))
    sizes = GRADIENT.square().mean(1).sqrt()  # of each training by itself
    torch.testing.assert_close(first.square().mean(1).sqrt(), sizes, rtol=0.1, atol=0)
    assert not torch.equal(first, second)


def test_disturbance_is_the_same_for_tensors_and_one_vector() -> None:
    condition, parts = NAMED["noise as large as the gradient"], GRADIENT.flatten().split([300, 700] * 4)
    parameters = [torch.zeros_like(part, requires_grad=True) for part in parts]
    optimizer = Disturbed(torch.optim.SGD(parameters, lr=0.0), condition)
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.clone()
    optimizer.step()
    (whole,) = gradients_seen(condition, 1)
    assert torch.equal(torch.cat([parameter.grad for parameter in parameters]), whole.flatten())  # type: ignore[misc]


def test_nineteen_of_twenty_gradients_are_zero_the_others_unchanged() -> None:
    (seen,) = gradients_seen(NAMED["19 of 20 gradients are zero"], 1)
    kept = seen != 0
    assert 0.03 < kept.float().mean() < 0.07
    assert torch.equal(seen[kept], GRADIENT[kept])


def test_rate_follows_its_schedule_from_the_rate_of_the_optimizer() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    condition = replace(NAMED["rate falls to a tenth halfway"], steps=4)
    inner = torch.optim.SGD([parameter], lr=2.0)
    optimizer, rates = Disturbed(inner, condition), []
    for _ in range(4):
        parameter.grad = torch.ones(1)
        optimizer.step()
        rates.append(inner.param_groups[0]["lr"])
    assert rates == pytest.approx([2.0, 2.0, 0.2, 0.2])


def test_parameter_scale_keeps_the_network_function() -> None:
    plain, scaled = (robustness.task(NAMED[name], seed=0) for name in ("undisturbed", "parameters times 100"))
    torch.testing.assert_close(scaled.initial_parameters, 100 * plain.initial_parameters)
    batch = plain.batch(torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        scaled.losses(scaled.initial_parameters, batch), plain.losses(plain.initial_parameters, batch)
    )


def test_rows_hold_a_tuned_adam_beside_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "RESULTS", tmp_path)
    monkeypatch.setattr(robustness, "CONDITIONS", (Condition("undisturbed", steps=5), Condition("another", steps=5)))
    robustness.main(["--conditions", "undisturbed"])
    with (tmp_path / "robustness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["condition"], row["optimizer"]) for row in rows] == [
        ("undisturbed", "Adam"),
        ("undisturbed", "default"),
    ]
    assert float(rows[0]["rate"]) > 0
    assert rows[1]["rate"] == ""
