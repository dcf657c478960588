"""Lightning: the digits of examples/digits.py, with a schedule and clipping left to the Trainer.

    pip install 'learned-optim[demo,frameworks]'
    python examples/lightning_digits.py

Prints the training loss at the end and the share of test images that are classified correctly.
"""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from learned_optim import LearnedOptimizer

Batch = tuple[Tensor, Tensor]


class Digits(lightning.LightningModule):
    """Nothing here but ``configure_optimizers`` knows which optimizer it is."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: Batch) -> Tensor:
        """Loss of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Batch) -> None:
        """Share of correct answers."""
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict:
        """The learned rule; a cosine scales it down to nothing."""
        optimizer = LearnedOptimizer(self.parameters())
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    lightning.seed_everything(0, verbose=False)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    train, test = random_split(TensorDataset(images.float() / 16, labels), [0.8, 0.2])
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, gradient_clip_val=1.0, logger=False, enable_checkpointing=False
    )
    model = Digits()
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss']:.4f} after {trainer.global_step} steps")
    trainer.test(model, DataLoader(test, batch_size=len(test)), verbose=False)
    print(f"test accuracy: {trainer.callback_metrics['accuracy']:.1%}")


if __name__ == "__main__":
    main()
