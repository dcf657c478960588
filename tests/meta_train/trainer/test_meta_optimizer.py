"""The meta-optimizer: schedules, clipping, and PyTorch's optimizers with the configured settings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from learned_optim.meta_train.config.settings import MetaOptimizerConfig
from learned_optim.meta_train.trainer.meta_optimizer import MetaOptimizer
from learned_optim.rules import LSTML2L

STEPS = 10


def grads_of(rule: LSTML2L, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator) for parameter in rule.parameters()]


def optimizer(**settings: Any) -> MetaOptimizer:
    return MetaOptimizer(LSTML2L(2), MetaOptimizerConfig(**settings), STEPS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, lambda step: 1.0),
        ({"schedule": "cosine"}, lambda step: (1 + math.cos(math.pi * step / 10)) / 2),
        ({"schedule": "cosine", "final_fraction": 0.2}, lambda step: 0.6 + 0.4 * math.cos(math.pi * step / 10)),
        ({"schedule": "exponential", "final_fraction": 0.01}, lambda step: 10 ** (-step / 5)),
        ({"warmup": 4}, lambda step: min(1.0, (step + 1) / 4)),
        (
            {"warmup": 4, "schedule": "cosine"},
            lambda step: (step + 1) / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 6)) / 2,
        ),
        ({"warmup": 10, "schedule": "cosine"}, lambda step: (step + 1) / 10),  # to the end
    ],
    ids=["constant", "cosine", "cosine-to-a-fifth", "exponential", "warm-up", "warm-up-and-cosine", "warm-up-alone"],
)
def test_rate_follows_the_schedule(settings: dict[str, Any], expected: Any) -> None:
    stepped = optimizer(lr=0.5, **settings)
    for step in range(STEPS):
        stepped.step([torch.zeros_like(parameter) for parameter in stepped.parameters], step)
        rate = stepped.optimizer.param_groups[0]["lr"]
        assert rate == stepped.rate(step) == pytest.approx(0.5 * expected(step), abs=1e-15)


def test_parameters_with_rates_of_their_own_follow_the_same_schedule() -> None:
    stepped = optimizer(lr=0.5, rates={"output_bias": 2.0}, schedule="cosine")
    names = [name for name, _ in LSTML2L(2).named_parameters()]
    for step in range(3):
        stepped.step([torch.ones_like(parameter) for parameter in stepped.parameters], step)
        rates = dict(zip(names, (group["lr"] for group in stepped.optimizer.param_groups), strict=True))
        assert rates.pop("output_bias") == pytest.approx(4 * stepped.rate(step))
        assert set(rates.values()) == {stepped.rate(step)}


def test_rate_of_no_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"meta_optimizer\.rates: no parameter 'bias'; there are .*output_bias"):
        optimizer(rates={"bias": 0.1})


@pytest.mark.parametrize(
    ("settings", "build"),
    [
        ({"name": "adam", "betas": (0.5, 0.9)}, lambda p: torch.optim.Adam(p, 0.01, betas=(0.5, 0.9))),
        (
            {"name": "adamw", "weight_decay": 0.3, "betas": (0.5, 0.9)},
            lambda p: torch.optim.AdamW(p, 0.01, betas=(0.5, 0.9), weight_decay=0.3),
        ),
        (
            {"name": "sgd", "momentum": 0.5, "weight_decay": 0.3},
            lambda p: torch.optim.SGD(p, 0.01, momentum=0.5, weight_decay=0.3),
        ),
    ],
    ids=["adam", "adamw", "sgd"],
)
def test_settings_reach_the_optimizer(settings: dict[str, Any], build: Any) -> None:
    ours, theirs = LSTML2L(2), LSTML2L(2)
    theirs.load_state_dict(ours.state_dict())
    stepped, reference = (
        MetaOptimizer(ours, MetaOptimizerConfig(lr=0.01, **settings), STEPS),
        build(theirs.parameters()),
    )
    for step in range(3):
        grads = grads_of(ours, step)
        stepped.step(grads, step)
        for parameter, grad in zip(theirs.parameters(), grads, strict=True):
            parameter.grad = grad
        reference.step()
    assert torch.equal(parameters_to_vector(ours.parameters()), parameters_to_vector(theirs.parameters()))


@pytest.mark.parametrize("clip_value", [None, 0.5])
@pytest.mark.parametrize("clip_norm", [None, 0.1, 1e6])
def test_entries_are_clipped_before_the_norm(clip_value: float | None, clip_norm: float | None) -> None:
    stepped = optimizer(clip_value=clip_value, clip_norm=clip_norm)
    grads = grads_of(LSTML2L(2), 0)
    before = torch.cat([grad.flatten() for grad in grads])
    assert float(before.abs().max()) > 1
    after = torch.cat([grad.flatten() for grad in stepped.clipped(grads)])
    expected = before if clip_value is None else before.clamp(-clip_value, clip_value)
    if clip_norm == 0.1:
        expected = expected * (0.1 / expected.norm())
    torch.testing.assert_close(after, expected)


def test_clipped_zero_gradient_stays_zero() -> None:
    stepped = optimizer(clip_norm=0.1)
    assert all(bool((grad == 0).all()) for grad in stepped.clipped([torch.zeros(3)]))
