"""Responses of a rule to synthetic gradients, compared with rules whose response is known and the optimizer."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from learned_optim import LearnedOptimizer, load_rule, save_rule
from learned_optim.meta_train.reports.responses import (
    ADAM_RATE,
    MAGNITUDES,
    PRESENT,
    STOP,
    Responses,
    adam_updates,
    portrait,
    updates_of,
)
from learned_optim.rules import RuleSettings, RuleState, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule


class Descent(UpdateRule):
    """Gradient descent at the rate 0.1: every response follows from that."""

    name = "descent"

    @property
    def settings(self) -> RuleSettings:
        return {}

    @property
    def state_features(self) -> Mapping[str, int]:
        return {"nothing": 1}

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        return -0.1 * grad, state

    def reset_parameters(self, seed: int) -> None:
        pass


def test_portrait_of_gradient_descent_matches_its_formula() -> None:
    curves = portrait(Descent(), steps=30, scale=2.0).rule
    np.testing.assert_allclose(curves.constant, np.full(30, 0.2), rtol=1e-6)
    np.testing.assert_allclose(curves.flipping, np.full(30, 0.2), rtol=1e-6)
    np.testing.assert_allclose(curves.stopped, np.repeat([0.2, 0.0], STOP), rtol=1e-6)
    assert curves.noisy.mean() == pytest.approx(0.2 * 0.3, abs=4 * 0.2 / np.sqrt(curves.noisy.size))
    assert curves.noisy.std() == pytest.approx(0.2, rel=0.1)
    np.testing.assert_allclose(
        curves.magnitudes / MAGNITUDES, np.full(len(MAGNITUDES), curves.magnitudes[6]), rtol=1e-5
    )
    np.testing.assert_allclose(curves.map, np.tile(0.2 * PRESENT, (21, 1)), rtol=1e-5, atol=1e-7)


def test_portrait_of_the_untrained_scale_free_lstm_is_adams() -> None:
    found = portrait(ScaleFreeLSTM(2, rate=3 * ADAM_RATE), steps=200)
    for name in Responses._fields:
        rule, adam = getattr(found.rule, name), getattr(found.adam, name)
        kept = slice(2, None) if name == "magnitudes" else slice(None)  # Adam's eps acts on the smallest gradients
        np.testing.assert_allclose(rule[kept], 3 * adam[kept], rtol=2e-3, atol=2e-8, err_msg=name)
    for rates in found.effective_rates().values():
        np.testing.assert_allclose(rates, np.full(200, 3 * ADAM_RATE), rtol=2e-3)


def test_adam_updates_match_pytorch() -> None:
    grads = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter])
    for grad in grads:
        parameter.grad = grad.double()
        optimizer.step()
    torch.testing.assert_close(adam_updates(grads).double().sum(0), parameter.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["default", "lstm-l2l-mnist"])
def test_updates_are_those_of_the_optimizer(name: str) -> None:
    grads = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    optimizer = LearnedOptimizer([parameter := torch.nn.Parameter(torch.zeros(3))], name, state_dtype=torch.float32)
    for update, grad in zip(updates_of(load_rule(name), grads), grads, strict=True):
        with torch.no_grad():
            parameter.zero_()
        parameter.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), update, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["default", ScheduleFreeLSTM(2)], ids=["default", "schedule-free-lstm"])
def test_portrait_of_a_scale_free_rule_is_independent_of_gradient_scale(rule: UpdateRule | str) -> None:
    small, large = (portrait(rule, steps=20, scale=scale).rule for scale in (1.0, 1024.0))
    np.testing.assert_allclose(small.noisy, large.noisy, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(small.map, large.map, rtol=1e-3, atol=1e-6)


def test_portrait_has_a_name_and_is_reproducible(tmp_path: object) -> None:
    rule = ScaleFreeLSTM(2)
    save_rule(rule, f"{tmp_path}/mine.safetensors")
    found = portrait(f"{tmp_path}/mine.safetensors", steps=10)
    assert (found.name, portrait(rule, steps=10).name, portrait(rule, steps=10, name="x").name) == (
        "mine",
        "scale-free-lstm",
        "x",
    )
    np.testing.assert_array_equal(found.rule.noisy, portrait(rule, steps=10).rule.noisy)
    assert found.rule.noisy.shape[0] == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 9}, "at least 10, got 9"), ({"scale": 0.0}, "got 0.0"), ({"scale": float("inf")}, "got inf")],
    ids=["steps", "zero", "infinite"],
)
def test_invalid_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        portrait("default", **settings)  # type: ignore[arg-type]
