"""LearnedOptimizer in Lightning's Trainer, which steps through a closure, against a plain loop."""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from integration.regression import (
    Batch,
    Make,
    Net,
    assert_same,
    assert_trained,
    batches,
    each_optimizer,
    ignore_warnings_of_frameworks,
    plain_loop,
)

EPOCHS = 10
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning: the extra 'frameworks'"),
    *ignore_warnings_of_frameworks,
]


@functools.cache
def lightning() -> Any:
    """The framework. Its import takes seconds, which collecting tests need not spend."""
    return importlib.import_module("lightning.pytorch")


@functools.cache
def module_type() -> Any:
    class Module(lightning().LightningModule):  # type: ignore[misc]  # imported as Any: may be missing
        def __init__(self, make: Make, configure: Callable[[Optimizer], dict[str, Any]] | None = None) -> None:
            super().__init__()
            self.net = Net()
            self.make = make
            self.configure = configure

        def training_step(self, batch: Batch) -> Tensor:
            loss = self.net.loss(batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            if self.configure is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": self.configure(optimizer)}

    return Module


def trainer(folder: Path, epochs: int = EPOCHS, **options: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, **quiet, **options}
    return lightning().Trainer(max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, **options)


@each_optimizer
def test_lightning_matches_a_plain_loop(make: Make, tmp_path: Path) -> None:
    module, net = module_type()(make), Net()
    trainer(tmp_path).fit(module, batches())
    assert_same(module.net.parameters(), plain_loop(net, make(net.parameters()), EPOCHS))
    assert_trained(module.net)


@each_optimizer
def test_lightning_applies_schedule_accumulation_clipping_and_autocast(make: Make, tmp_path: Path) -> None:
    def cosine(optimizer: Optimizer) -> CosineAnnealingLR:
        return CosineAnnealingLR(optimizer, T_max=2 * EPOCHS)

    module, net = module_type()(make, lambda optimizer: {"scheduler": cosine(optimizer), "interval": "step"}), Net()
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
    trainer(tmp_path, **options).fit(module, batches())
    optimizer = make(net.parameters())
    scheduler = cosine(optimizer)
    expected = plain_loop(net, optimizer, EPOCHS, scheduler=scheduler, accumulate=2, clip=0.5, autocast=True)
    assert_same(module.net.parameters(), expected)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@each_optimizer
def test_lightning_plateau_scheduler_lowers_the_learning_rate(make: Make, tmp_path: Path) -> None:
    def on_plateau(optimizer: Optimizer) -> dict[str, Any]:
        # No loss is lower by 100, so that each epoch after the first is a plateau.
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=100.0, threshold_mode="abs")
        return {"scheduler": scheduler, "monitor": "loss"}

    module = module_type()(make, on_plateau)
    trainer(tmp_path, epochs=3).fit(module, batches())
    group = module.trainer.optimizers[0].param_groups[0]
    assert group["lr"] == 0.25 * make(Net().parameters()).param_groups[0]["lr"]


@each_optimizer
def test_lightning_weight_averaging_trains_the_model(make: Make, tmp_path: Path) -> None:
    module = module_type()(make)
    rate = 0.5 * make(Net().parameters()).param_groups[0]["lr"]
    averaging = lightning().callbacks.StochasticWeightAveraging(rate, swa_epoch_start=0.5, annealing_epochs=1)
    trainer(tmp_path, callbacks=[averaging]).fit(module, batches())
    assert_trained(module.net)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)  # its scheduler took over


@each_optimizer
def test_lightning_manual_optimization_matches_a_plain_loop(make: Make, tmp_path: Path) -> None:
    class Manual(module_type()):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Batch) -> Tensor:
            optimizer = self.optimizers()
            loss: Tensor = self.net.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return loss

    module, net = Manual(make), Net()
    trainer(tmp_path).fit(module, batches())
    assert_same(module.net.parameters(), plain_loop(net, make(net.parameters()), EPOCHS))


@each_optimizer
def test_lightning_resume_is_bit_exact(make: Make, tmp_path: Path) -> None:
    def module() -> Any:
        return module_type()(make, lambda optimizer: {"scheduler": CosineAnnealingLR(optimizer, T_max=EPOCHS)})

    whole, first, second = module(), module(), module()
    trainer(tmp_path).fit(whole, batches())
    earlier = trainer(tmp_path, epochs=EPOCHS // 2)
    earlier.fit(first, batches())
    earlier.save_checkpoint(tmp_path / "half.ckpt")
    later = trainer(tmp_path)
    later.fit(second, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same(second.net.parameters(), whole.net.parameters())
    states = [each.trainer.optimizers[0].state_dict()["state"] for each in (second, whole)]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert all(one[entry].dtype == other[entry].dtype for entry in other)
        assert_same(one.values(), other.values())
