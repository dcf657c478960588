"""Plain PyTorch: a perceptron on scikit-learn's digits, with nothing to tune and nothing to download.

    pip install 'learned-optim[demo]'    # for scikit-learn
    python examples/digits.py

Prints the loss every 100 steps and, at the end, the share of test images that are classified correctly.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from learned_optim import LearnedOptimizer

TEST_IMAGES = 360


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    train_images, test_images = images.split([len(images) - TEST_IMAGES, TEST_IMAGES])
    train_labels, test_labels = labels.split([len(images) - TEST_IMAGES, TEST_IMAGES])

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = LearnedOptimizer(model.parameters())  # instead of torch.optim.Adam(model.parameters(), lr=...)
    for step in range(1, steps + 1):
        rows = torch.randint(len(train_images), (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(train_images[rows]), train_labels[rows])
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.4f}")
    correct = (model(test_images).argmax(1) == test_labels).float().mean()
    print(f"test accuracy: {correct:.1%}")


if __name__ == "__main__":
    main()
