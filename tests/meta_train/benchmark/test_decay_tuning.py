"""AdamW with weight decay that is tuned as well as its rate."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from helpers.benchmarks import run, suite
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import (
    DECAYS,
    baselines,
)
from learned_optim.meta_train.benchmark.evaluation import DECAYED, Problem, final_loss
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.report import problem_table


@pytest.mark.slow
def test_decay_is_tuned_with_the_rate_and_shown() -> None:
    name = "AdamW-linear+decay"
    _, found = run(suite(), names=(name,))["noisy"]
    assert found.setting in [f"decay {decay:g}" for decay in DECAYS]
    assert found.is_tuned
    assert f"{found.rate:g}" in problem_table([found, _])
    assert found.setting in problem_table([found, _])
    scores = {
        decay: min(
            float(
                final_loss(
                    Problem(suite().problems[0].build(), 3, 5, 1).run(partial(decayed, name, rate, decay))
                ).mean()
            )
            for rate in found.tuning
        )
        for decay in DECAYS
    }
    assert found.setting == f"decay {min(scores, key=lambda decay: scores[decay]):g}"


def decayed(name: str, rate: float, decay: float, parameters: Any) -> Optimizer:
    return DECAYED[name](parameters, rate, 5, decay=decay)


@pytest.mark.parametrize(("name", "end"), [("AdamW-cosine+decay", 0.5), ("AdamW-linear+decay", 0.5)])
def test_rate_falls_to_zero_at_the_last_step(name: str, end: float) -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = DECAYED[name]([parameter], 0.4, 10, decay=0.3)
    rates = []
    for _ in range(10):
        parameter.grad = torch.ones(1)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    assert rates[0] == 0.4
    assert rates[5] == pytest.approx(0.4 * end)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_planned_steps_count_every_decay() -> None:
    chosen = suite()
    harness = Harness(chosen, baselines(["AdamW-cosine+decay"]), [], cache=Cache(None))
    rates = len(chosen.rates)
    assert harness.planned_steps() == 5 * ((rates + 1) + (rates * len(DECAYS) + 1))
