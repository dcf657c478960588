"""A small transformer that learns to write Python, character by character, with gradient clipping and weight decay.

    python examples/character_transformer.py
    python examples/character_transformer.py --text book.txt --steps 2000

Reads the source of Python's own argparse unless told otherwise. Prints the loss in nats a character every 100 steps
(guessing evenly: the logarithm of the number of characters), and a few lines that the model writes. The default rule
was not meta-trained on transformers.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer

CONTEXT = 64


class Transformer(nn.Module):
    """Two causal blocks of width 64 before a linear layer; logits ``(batch, time, characters)``."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, 64)
        self.places = nn.Embedding(CONTEXT, 64)
        block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=False)
        self.output = nn.Linear(64, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the character after each of ``text``, integers ``(batch, time)``."""
        time = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time)
        return self.output(self.blocks(self.characters(text) + self.places(torch.arange(time)), mask, is_causal=True))


@torch.no_grad()
def write(model: nn.Module, text: Tensor, length: int) -> Tensor:
    """``text`` ``(1, time)`` and ``length`` more characters, drawn one after the other."""
    for _ in range(length):
        probabilities = model(text[:, -CONTEXT:])[:, -1].softmax(-1)
        text = torch.cat([text, torch.multinomial(probabilities, 1)], 1)
    return text


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__))
    options = parser.parse_args()
    torch.manual_seed(0)
    text = options.text.read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(character) for character in text])

    model = Transformer(len(alphabet))
    optimizer = LearnedOptimizer(model.parameters(), weight_decay=1e-2)
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(data) - CONTEXT, (32, 1))
        windows = data[starts + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.4f}")
    written = write(model, data[None, :8], min(200, 20 * options.steps))[0]
    print("".join(alphabet[character] for character in written.tolist()))


if __name__ == "__main__":
    main()
