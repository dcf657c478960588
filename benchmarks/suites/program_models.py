"""Models of benchmarks/suites/program_list.py, in PyTorch's own layers and with its own initial weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.suites.program_loop import perceptron
from learned_optim.meta_train.tasks.language_model import VOCABULARY_SIZE


class VariationalAutoencoder(nn.Module):
    """784-200-16 and back (Kingma and Welling 2014)."""

    LATENT = 16

    def __init__(self) -> None:
        super().__init__()
        self.encoder = perceptron(784, 200, 2 * self.LATENT)
        self.decoder = perceptron(self.LATENT, 200, 784)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(images, 784)`` of a sample, mean and log variance ``(images, 16)`` of its distribution."""
        mean, log_variance = self.encoder(pixels).chunk(2, 1)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(latent), mean, log_variance


def negative_evidence(outputs: tuple[Tensor, Tensor, Tensor], pixels: Tensor) -> Tensor:
    """Minus the evidence lower bound in nats an image; ``pixels`` in 0..1."""
    logits, mean, log_variance = outputs
    reconstruction = F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
    return (reconstruction + divergence) / len(pixels)


class CharacterLSTM(nn.Module):
    """Tokens ``(batch, length)`` to logits ``(batch, length, vocabulary)``."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY_SIZE, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.output = nn.Linear(width, VOCABULARY_SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the character that follows each token."""
        logits: Tensor = self.output(self.lstm(self.embedding(tokens))[0])
        return logits


def character_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of tokens ``(batch, length)``."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def conv_net(width: int = 16, size: int = 32, classes: int = 10) -> nn.Sequential:
    """Two convolutions with pooling and a hidden layer, for colour pictures of ``size`` pixels a side."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(2 * width * (size // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, classes)),
    )


class Residual(nn.Module):
    """Two convolutions with batch norm beside a short cut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)),
        )
        same = inputs == outputs and stride == 1
        self.short_cut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, signal: Tensor) -> Tensor:
        """Map ``(images, inputs, size, size)`` to ``(images, outputs, size / stride, size / stride)``."""
        return F.relu(self.inner(signal) + self.short_cut(signal))


def residual_net(width: int = 12) -> nn.Sequential:
    """Three residual blocks, for colour pictures of 16 pixels a side."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(Residual(width, width), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


class PatchTransformer(nn.Module):
    """Patches of 7 x 7 pixels of a grey picture, two blocks, the mean over the patches (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(2)
            )
        )
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(images, 10)``."""
        tokens = self.patches(images).flatten(2).mT + self.places
        logits: Tensor = self.output(self.blocks(tokens).mean(1))
        return logits
