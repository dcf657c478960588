"""The contract of test_contract.py, for schedulers of the rate and averages of the parameters."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer, lr_scheduler, swa_utils

from helpers.contract import Make, Net, each_optimizer, train
from learned_optim import LearnedOptimizer

SCHEDULERS: Mapping[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=8, cycle_momentum=False),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_checked() -> None:
    others = {"LRScheduler", "ReduceLROnPlateau"}  # the base class; a test of its own
    assert {name for name in SCHEDULERS if name != "SWALR"} == set(lr_scheduler.__all__) - others


def test_cycle_momentum_is_refused() -> None:
    for make_scheduler in (
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=8),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0),
    ):
        with pytest.raises(ValueError, match="cycle_momentum"):
            make_scheduler(LearnedOptimizer(Net().parameters()))


def scheduled(make: Make, make_scheduler: Callable[[Optimizer], Any], lr: float | Tensor) -> list[float]:
    net = Net()
    optimizer = make(net.parameters(), lr=lr)
    scheduler, rates = make_scheduler(optimizer), []
    for _ in range(5):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        train(net, optimizer, 1, scheduler)
    return rates


@pytest.mark.slow
@each_optimizer
@pytest.mark.parametrize("tensor", [False, True], ids=["float-lr", "tensor-lr"])
def test_schedulers_set_the_rates_as_for_sgd(make: Make, tensor: bool) -> None:
    for name, make_scheduler in SCHEDULERS.items():
        with warnings.catch_warnings():  # SequentialLR steps its parts in a way that LRScheduler itself warns of
            warnings.filterwarnings("ignore", message="(Detected call of|The epoch parameter)", category=UserWarning)
            rates = scheduled(make, make_scheduler, torch.tensor(0.5) if tensor else 0.5)
            expected = scheduled(SGD, make_scheduler, 0.5)
        assert rates == pytest.approx(expected, rel=1e-6), name  # a tensor's rate is a float32


@each_optimizer
def test_plateau_scheduler_lowers_the_learning_rate(make: Make) -> None:
    optimizer = make(Net().parameters(), lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for loss in (1.0, 1.0, 1.0):
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@each_optimizer
@pytest.mark.parametrize("average", ["mean", "ema"])
def test_averaged_model_follows_every_step(make: Make, average: str) -> None:
    net = Net()
    optimizer = make(net.parameters())
    averaging = {"avg_fn": None} if average == "mean" else {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}
    averaged = swa_utils.AveragedModel(net, **averaging)
    snapshots = []
    for _ in range(3):
        snapshots.append(train(net, optimizer, steps=1))
        averaged.update_parameters(net)
    for index, value in enumerate(averaged.module.parameters()):
        first, second, third = (snapshot[index] for snapshot in snapshots)
        expected = (first + second + third) / 3 if average == "mean" else 0.81 * first + 0.09 * second + 0.1 * third
        torch.testing.assert_close(value.detach(), expected)
