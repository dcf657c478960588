"""Small character models, recurrent or transformers, of the text of Python's standard library: code or prose."""

import copy
import functools
import math
import re
import sysconfig
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta_train.data.datasets import DataNotFoundError
from learned_optim.meta_train.tasks.base import HELD_OUT_SHARE, Batch, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.sampling import check_choices, check_range, choose, log_uniform_integer

Model = Literal["rnn", "gru", "lstm", "transformer"]
MODELS = ("rnn", "gru", "lstm", "transformer")
Text = Literal["code", "prose"]
TEXTS = ("code", "prose")
HEADS = 2  # of the attention; widths are rounded up to a multiple

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))  # index 0 is every other character
VOCABULARY_SIZE = 1 + len(VOCABULARY)
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__"}
"""Folders that are not on every machine, or repeat others."""


@dataclass(frozen=True)
class LanguageModelFamily(TaskFamily):
    """Predict the next character of Python's own source text; the loss is the mean cross-entropy in nats.

    The text is that of the standard library of the Python that runs, so every machine has it; another release of
    Python has another text. Files are divided by a hash of their names: eight tenths for training, one each for
    validation and test. Ranges ``(low, high)`` are drawn log-uniformly for every task, layers uniformly.

    Args:
        text: "code": whole files; "prose": what stands between triple quotation marks in them, English for the most
            part, about a fifth as long.
        models: one is drawn. "rnn" (tanh), "gru" and "lstm" unroll by hand; "transformer" is causal, with two heads,
            learned positions and layer norm before each sub-layer. PyTorch's initialisation.
        width: range of the units of embedding and hidden layers; a transformer's is rounded up to an even number.
        layers: range of the number of recurrent layers or transformer blocks.
        length: range of the number of characters that are predicted in a row.
        batch_size: range of the number of such rows.
    """

    text: Text = "code"
    models: tuple[Model, ...] = ("gru",)
    width: tuple[int, int] = (16, 64)
    layers: tuple[int, int] = (1, 2)
    length: tuple[int, int] = (16, 32)
    batch_size: tuple[int, int] = (8, 32)

    def __post_init__(self) -> None:
        check_choices("text", (self.text,), TEXTS)
        check_choices("models", self.models, MODELS)
        check_range("width", self.width, 1)
        check_range("layers", self.layers, 1)
        check_range("length", self.length, 1)
        check_range("batch_size", self.batch_size, 1)

    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        """Draw an architecture; ``split`` chooses the files."""
        return LanguageModelTask(
            corpus(split, self.text),
            choose(rng, self.models),
            width=log_uniform_integer(rng, self.width),
            layers=int(rng.integers(self.layers[0], self.layers[1] + 1)),
            length=log_uniform_integer(rng, self.length),
            batch_size=log_uniform_integer(rng, self.batch_size),
        )


class LanguageModelTask(Task):
    """Models of one architecture.

    Args:
        text: indices into the vocabulary, ``(characters,)``, uint8.
        model: one of :data:`MODELS`.
        width, layers, length, batch_size: as drawn by the family.
    """

    def __init__(self, text: Tensor, model: str, width: int, layers: int, length: int, batch_size: int) -> None:
        self.text, self.model = text, model
        self.width, self.layers, self.length, self.batch_size = width, layers, length, batch_size

    @property
    def loss_bound(self) -> float:
        """Half as much again as that of a model that finds all characters equally likely."""
        return 1.5 * math.log(VOCABULARY_SIZE)

    def hold_out(self) -> tuple[Task, Task]:
        """The first four fifths of the text, and the rest."""
        kept = round((1 - HELD_OUT_SHARE) * len(self.text))
        inner, outer = copy.copy(self), copy.copy(self)
        inner.text, outer.text = self.text[:kept], self.text[kept:]
        return inner, outer

    def module(self) -> nn.Module:
        """A model with fresh weights."""
        if self.model == "transformer":
            return Transformer(self.width, self.layers, self.length)
        return Recurrent(self.model, self.width, self.layers)

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        """Pieces of the text from random places, ``(instances, batch, length + 1)``."""
        starts = torch.randint(len(self.text) - self.length, (instances, self.batch_size, 1), generator=generator)
        return self.text[starts + torch.arange(self.length + 1)].long()

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of each character given those before it in its piece, in nats."""
        logits = module(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def accuracy(self, module: nn.Module, batch: Batch) -> Tensor:
        """Share of characters that were the likeliest, given those before them in their piece."""
        right: Tensor = module(batch[:, :-1]).argmax(-1) == batch[:, 1:]
        return right.float().mean()


# Recurrent models. torch.nn.GRU and LSTM call cuDNN, which torch.func.vmap cannot look into.


class Recurrent(nn.Module):
    """Embedding, recurrent layers, output layer: tokens ``(batch, length)`` to logits ``(..., vocabulary)``."""

    def __init__(self, cell: str, width: int, layers: int) -> None:
        super().__init__()
        self.cell, self.width = cell, width
        self.embedding = nn.Embedding(VOCABULARY_SIZE, width)
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[cell]
        self.inputs = nn.ModuleList(nn.Linear(width, gates * width) for _ in range(layers))
        self.recurrences = nn.ModuleList(nn.Linear(width, gates * width) for _ in range(layers))
        self.output = nn.Linear(width, VOCABULARY_SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the character that follows each token."""
        features = self.embedding(tokens)
        for inputs, recurrence in zip(self.inputs, self.recurrences, strict=True):
            hidden = features.new_zeros(features.shape[0], self.width)
            state = (hidden, hidden)
            outputs = []
            for driven in inputs(features).unbind(1):  # the product with the inputs of all positions at once
                state = CELLS[self.cell](driven, recurrence(state[0]), *state)
                outputs.append(state[0])
            features = torch.stack(outputs, 1)
        logits: Tensor = self.output(features)
        return logits


Cell = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(driven, recurrent, hidden, cell) -> (hidden, cell)``: gates ``(batch, gates * width)`` from the input and from the
hidden state, and the two states ``(batch, width)``; only the LSTM uses the second."""


def rnn_step(driven: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Elman 1990."""
    return torch.tanh(driven + recurrent), cell


def gru_step(driven: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Cho et al. 2014, in the order of gates and the form of ``torch.nn.GRU``."""
    reset_in, update_in, new_in = driven.chunk(3, -1)
    reset, update, new = recurrent.chunk(3, -1)
    candidate = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
    return candidate + torch.sigmoid(update_in + update) * (hidden - candidate), cell


def lstm_step(driven: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter and Schmidhuber 1997 with a forget gate, in the order of gates of ``torch.nn.LSTM``."""
    input_gate, forget_gate, candidate, output_gate = (driven + recurrent).chunk(4, -1)
    cell = torch.sigmoid(forget_gate) * cell + torch.sigmoid(input_gate) * torch.tanh(candidate)
    return torch.sigmoid(output_gate) * torch.tanh(cell), cell


CELLS: dict[str, Cell] = {"rnn": rnn_step, "gru": gru_step, "lstm": lstm_step}


# Transformer. Attention is written out: the fused kernels have no second derivatives.


class Transformer(nn.Module):
    """Tokens ``(batch, length)`` to logits ``(..., vocabulary)``; the width is rounded up to whole heads."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        width = HEADS * math.ceil(width / HEADS)
        self.embedding = nn.Embedding(VOCABULARY_SIZE, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))  # the deviation of GPT-2's
        self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, VOCABULARY_SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the character that follows each token."""
        logits: Tensor = self.output(self.norm(self.blocks(self.embedding(tokens) + self.positions)))
        return logits


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then the same with a perceptron.

    Args:
        width: features of a place, a multiple of the number of heads.
        causal: whether a place sees those before it alone, not all.
    """

    def __init__(self, width: int, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, stream: Tensor) -> Tensor:
        """``(batch, length, width)`` to the same."""
        stream = stream + self._attention(self.attention_norm(stream))
        result: Tensor = stream + self.perceptron(self.norm(stream))
        return result

    def _attention(self, stream: Tensor) -> Tensor:
        length = stream.shape[1]
        parts = self.queries_keys_values(stream).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts  # each (batch, heads, length, width / heads)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        if self.causal:
            future = torch.ones(length, length, dtype=torch.bool, device=stream.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        mixed: Tensor = self.mix((scores.softmax(-1) @ values).transpose(1, 2).flatten(-2))
        return mixed


# Text


def split_of(name: str) -> Split:
    """The split of a file, by its name relative to the standard library, with "/"."""
    bucket = zlib.crc32(name.encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def source_files(folder: Path) -> dict[str, Path]:
    """Source files below a folder by their relative names, in their order."""
    files = {path.relative_to(folder): path for path in folder.rglob("*.py")}
    return {name.as_posix(): files[name] for name in sorted(files) if LEFT_OUT.isdisjoint(name.parts)}


def encode(text: bytes) -> np.ndarray:
    """Indices into the vocabulary, uint8, of the bytes of a text."""
    table = np.zeros(256, np.uint8)
    table[list(VOCABULARY.encode())] = np.arange(1, VOCABULARY_SIZE)
    codes: np.ndarray = table[np.frombuffer(text, np.uint8)]
    return codes


def docstring_text(source: bytes) -> bytes:
    """The text between triple double quotation marks, each piece on lines of its own."""
    return b"\n".join(re.findall(rb'"""(.*?)"""', source, flags=re.DOTALL))


@functools.cache
def corpus(split: Split, kind: Text = "code") -> Tensor:
    """Text of all files of a split one after the other, ``(characters,)``, read once and then shared.

    Raises:
        DataNotFoundError: this Python has no source text of its standard library, or next to none.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.read_bytes() for name, path in source_files(folder).items() if split_of(name) == split]
    text = b"".join(files if kind == "code" else map(docstring_text, files))
    if len(text) < 100_000:  # a thirtieth of what a release brings: a stripped or zipped installation
        raise DataNotFoundError(
            f"language models are trained on the source text of Python's standard library, and {folder} has none; "
            "install Python with its sources"
        )
    return torch.from_numpy(encode(text))
