"""A convolutional network with batch norm on MNIST, its rate scaled down by a cosine.

    learned-optim data fetch mnist
    python examples/mnist_conv_net.py
    python examples/mnist_conv_net.py --adam 1e-3    # the same with Adam, to compare

Prints the loss every 100 steps and, at the end, the share of test images that are classified correctly. The default
rule was not meta-trained on convolutional networks.
"""

import argparse

import torch
from torch import nn

from learned_optim import LearnedOptimizer
from learned_optim.meta_train.data.datasets import load


def network() -> nn.Module:
    """19,466 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--adam", type=float, metavar="RATE", help="train with Adam at this rate instead")
    options = parser.parse_args()
    torch.manual_seed(0)
    train, test = load("mnist", "train"), load("mnist", "test")
    model = network()
    if options.adam is None:
        optimizer = LearnedOptimizer(model.parameters())
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=options.adam)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.steps)
    for step in range(1, options.steps + 1):
        rows = torch.randint(len(train.images), (128,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(train.images[rows] / 255), train.labels[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.4f}")
    model.eval()
    with torch.no_grad():
        correct = (model(test.images / 255).argmax(1) == test.labels).float().mean()
    print(f"test accuracy: {correct:.1%}")


if __name__ == "__main__":
    main()
