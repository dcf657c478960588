"""LearnedOptimizer under Hugging Face Accelerate against a plain loop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from integration.regression import (
    Make,
    Net,
    assert_same,
    assert_trained,
    batches,
    copies,
    each_optimizer,
    ignore_warnings_of_frameworks,
    plain_loop,
)

accelerate: Any = pytest.importorskip("accelerate", reason="needs accelerate: the extra 'frameworks'")
state: Any = pytest.importorskip("accelerate.state", reason="needs accelerate: the extra 'frameworks'")

EPOCHS = 10
pytestmark = ignore_warnings_of_frameworks


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its choice of device and precision for the whole process."""
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


class Run:
    """All that a training script has, after ``prepare``."""

    def __init__(self, make: Make, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.net = Net()
        optimizer = make(self.net.parameters())
        steps = EPOCHS * len(batches()) // self.accelerator.gradient_accumulation_steps
        scheduler = CosineAnnealingLR(optimizer, T_max=steps)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            self.net, optimizer, batches(), scheduler
        )

    def train(self, epochs: int = EPOCHS, clip: float | None = None) -> list[Tensor]:
        for _ in range(epochs):
            for inputs, targets in self.loader:
                with self.accelerator.accumulate(self.model):
                    with self.accelerator.autocast():
                        loss = self.net.loss((inputs, targets))
                    self.accelerator.backward(loss)
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return copies(self.net.parameters())


@each_optimizer
def test_accelerate_matches_a_plain_loop(make: Make) -> None:
    run, net = Run(make), Net()
    optimizer = make(net.parameters())
    scheduler = CosineAnnealingLR(optimizer, T_max=EPOCHS * len(batches()))
    assert_same(run.train(), plain_loop(net, optimizer, EPOCHS, scheduler=scheduler))
    assert_trained(run.net)


@each_optimizer
def test_accelerate_applies_accumulation_clipping_and_autocast(make: Make) -> None:
    run, net = Run(make, gradient_accumulation_steps=2, mixed_precision="bf16"), Net()
    optimizer = make(net.parameters())
    scheduler = CosineAnnealingLR(optimizer, T_max=EPOCHS * len(batches()) // 2)
    expected = plain_loop(net, optimizer, EPOCHS, scheduler=scheduler, accumulate=2, clip=0.5, autocast=True)
    assert_same(run.train(clip=0.5), expected)


@each_optimizer
def test_accelerate_resume_is_bit_exact(make: Make, tmp_path: Path) -> None:
    run = Run(make)
    run.train(EPOCHS // 2)
    run.accelerator.save_state(tmp_path)
    expected = run.train(EPOCHS // 2)
    entries = [tensor for state in run.optimizer.optimizer.state.values() for tensor in state.values()]
    other = Run(make)
    other.accelerator.load_state(tmp_path)
    assert_same(other.train(EPOCHS // 2), expected)
    restored = [tensor for state in other.optimizer.optimizer.state.values() for tensor in state.values()]
    assert [tensor.dtype for tensor in restored] == [tensor.dtype for tensor in entries]
    assert_same(restored, entries)
