"""PyTorch's own wrappers of optimizers and models: averaged weights, steps inside backward, accumulation."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from integration.regression import (
    Make,
    Net,
    assert_same,
    assert_trained,
    batches,
    copies,
    data,
    each_optimizer,
    plain_loop,
)
from learned_optim import LearnedOptimizer

EPOCHS = 10


class NormalisedNet(Net):
    """With statistics that an average of weights must compute anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.insert(1, nn.BatchNorm1d(8))


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


class AveragedTraining:
    """A model, its average, its optimizer and its schedule, as one saves and resumes them together."""

    def __init__(self, make: Make, average: str) -> None:
        self.net = NormalisedNet()
        self.optimizer = make(self.net.parameters())
        ema = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}
        self.averaged = AveragedModel(self.net, **(ema if average == "ema" else {}))
        rate = 0.5 * self.optimizer.param_groups[0]["lr"]
        self.scheduler = SWALR(self.optimizer, swa_lr=rate, anneal_epochs=EPOCHS)

    def parts(self) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer, "averaged": self.averaged, "scheduler": self.scheduler}

    def train(self, epochs: int) -> list[Tensor]:
        for _ in range(epochs):
            plain_loop(self.net, self.optimizer, epochs=1)
            self.averaged.update_parameters(self.net)
            self.scheduler.step()
        return copies([*self.net.parameters(), *self.averaged.parameters()])


@each_optimizer
@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_model_trains(make: Make, average: str) -> None:
    training = AveragedTraining(make, average)
    before = float(NormalisedNet().loss(data()).detach())
    training.train(2 * EPOCHS)
    update_bn(((inputs,) for inputs, _ in batches()), training.averaged)
    inputs, targets = data()
    training.averaged.eval()
    with torch.no_grad():
        assert (training.averaged(inputs) - targets).square().mean() < 0.5 * before


@each_optimizer
@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_training_resume_is_bit_exact(make: Make, average: str) -> None:
    training, other = AveragedTraining(make, average), AveragedTraining(make, average)
    training.train(3)
    for name, part in other.parts().items():
        part.load_state_dict(through_file(training.parts()[name].state_dict()))
    assert_same(other.train(3), training.train(3))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on import
@each_optimizer
def test_optimizer_in_backward_matches_a_plain_loop(make: Make) -> None:
    from torch.distributed.optim.apply_optimizer_in_backward import (
        _apply_optimizer_in_backward,
        _get_in_backward_optimizers,
    )

    net, other = Net(), Net()
    options = {"lr": make(net.parameters()).param_groups[0]["lr"]}
    kind: type[Optimizer] = Adam if make is not LearnedOptimizer else LearnedOptimizer
    _apply_optimizer_in_backward(kind, net.parameters(), options)
    for _ in range(EPOCHS):
        for inputs, targets in batches():
            net.loss((inputs, targets)).backward()  # steps, and frees each gradient
            assert all(parameter.grad is None for parameter in net.parameters())
    assert len(_get_in_backward_optimizers(net)) == 4
    assert_same(net.parameters(), plain_loop(other, make(other.parameters()), EPOCHS))


@each_optimizer
def test_step_in_gradient_hooks_matches_a_plain_loop(make: Make) -> None:
    net, other = Net(), Net()
    optimizers: dict[Tensor, Optimizer] = {parameter: make([parameter]) for parameter in net.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(EPOCHS):
        for inputs, targets in batches():
            net.loss((inputs, targets)).backward()
    assert_same(net.parameters(), plain_loop(other, make(other.parameters()), EPOCHS))


@each_optimizer
def test_accumulated_gradients_match_one_large_batch(make: Make) -> None:
    net, other = Net(), Net()
    plain_loop(net, make(net.parameters()), EPOCHS, accumulate=4, clip=1.0)
    optimizer = make(other.parameters())
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        other.loss(data()).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    # Sums in another order; a gradient that was lost would be a difference of a step, of order 1e-2.
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@each_optimizer
def test_one_cycle_trains_the_model(make: Make) -> None:
    net = Net()
    optimizer = make(net.parameters())
    steps = 2 * EPOCHS * len(batches())
    rate = optimizer.param_groups[0]["lr"]
    scheduler = OneCycleLR(optimizer, max_lr=rate, total_steps=steps + 1, cycle_momentum=False)
    plain_loop(net, optimizer, 2 * EPOCHS, scheduler=scheduler)
    assert_trained(net)
    assert optimizer.param_groups[0]["lr"] < 1e-3 * rate


@each_optimizer
def test_deepcopy_of_model_and_optimizer_is_independent(make: Make) -> None:
    net = Net()
    optimizer = make(net.parameters())
    plain_loop(net, optimizer, epochs=1)
    other, copied = copy.deepcopy((net, optimizer))
    before = copies(net.parameters())
    expected = plain_loop(other, copied, epochs=1)
    assert_same(net.parameters(), before)
    assert_same(plain_loop(net, optimizer, epochs=1), expected)
