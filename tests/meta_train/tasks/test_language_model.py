"""Character models: PyTorch's recurrences, causal attention, text in fixed splits."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from helpers.draws import generator
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.tasks import Split, language_model
from learned_optim.meta_train.tasks.language_model import Recurrent, Transformer

SPLITS: tuple[Split, ...] = get_args(Split)


class TestLanguageModel:
    @pytest.mark.usefixtures("double")
    @pytest.mark.parametrize(("name", "torchs"), [("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)])
    def test_recurrence_matches_torch(self, name: str, torchs: Callable[..., nn.RNNBase]) -> None:
        torch.manual_seed(0)
        ours = Recurrent(name, 5, 2)
        theirs = torchs(5, 5, num_layers=2, batch_first=True)
        for layer, (inputs, recurrence) in enumerate(zip(ours.inputs, ours.recurrences, strict=True)):
            for linear, kind in ((inputs, "ih"), (recurrence, "hh")):
                for tensor in ("weight", "bias"):
                    getattr(theirs, f"{tensor}_{kind}_l{layer}").data = getattr(linear, tensor).data
        tokens = torch.randint(language_model.VOCABULARY_SIZE, (3, 7))
        expected = ours.output(theirs(ours.embedding(tokens))[0])
        torch.testing.assert_close(ours(tokens), expected)

    @pytest.mark.parametrize(
        "build", [lambda: Recurrent("gru", 4, 2), lambda: Transformer(4, 2, 6)], ids=["gru", "gpt"]
    )
    def test_models_are_causal(self, build: Callable[[], nn.Module]) -> None:
        model, tokens = build(), torch.arange(6)[None]
        before = model(tokens)
        tokens[0, 4:] += 20
        after = model(tokens)
        torch.testing.assert_close(after[:, :4], before[:, :4])
        assert not torch.allclose(after[:, 4:], before[:, 4:])

    def test_attention_sees_the_first_token(self) -> None:
        model, tokens = Transformer(4, 1, 6), torch.arange(6)[None]
        before = model(tokens)
        tokens[0, 0] += 20
        assert not torch.allclose(model(tokens)[0, 5], before[0, 5])

    @pytest.mark.slow
    def test_splits_divide_all_source_files(self) -> None:
        files = language_model.source_files(Path(sysconfig.get_path("stdlib")))
        by_split = {split: [name for name in files if language_model.split_of(name) == split] for split in SPLITS}
        assert sum(len(names) for names in by_split.values()) == len(files) > 200
        assert not any("site-packages" in name or name.startswith("test/") for name in files)
        for split in SPLITS:
            size = sum(files[name].stat().st_size for name in by_split[split])
            assert len(language_model.corpus(split)) == size > 100_000
        assert [language_model.split_of(name) for name in ("ast.py", "re/__init__.py", "ssl.py")] == EXPECTED_SPLITS

    def test_prose_is_the_text_in_triple_quotes(self) -> None:
        source = b'def f(x):\n    """The first.\n\n    More."""\n    return ""\n\nTEXT = """two "" three"""\n'
        assert language_model.docstring_text(source) == b'The first.\n\n    More.\ntwo "" three'
        for split in SPLITS:
            code, prose = (language_model.corpus(split, kind) for kind in language_model.TEXTS)
            assert 50_000 < len(prose) < len(code) / 3

    def test_batches_are_contiguous_pieces_of_text(self) -> None:
        text = language_model.encode(b"def f(x):\n\treturn x\xff" * 20)
        assert list(text[:9]) == [1 + language_model.VOCABULARY.index(letter) for letter in "def f(x):"]
        assert list(text[9:11]) == [1, 0]  # the end of the line; the tabulator is no letter of the vocabulary
        task = language_model.LanguageModelTask(torch.from_numpy(text), "gru", 4, 1, length=6, batch_size=5)
        pieces = task.batch(3, generator())
        assert pieces.shape == (3, 5, 7)
        whole = bytes(text)
        assert all(bytes(piece.tolist()) in whole for piece in pieces.flatten(0, 1))

    def test_missing_python_sources_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(data.DataNotFoundError, match=f"{tmp_path} has none; install Python with its sources"):
            language_model.corpus.__wrapped__("train")


EXPECTED_SPLITS = ["train", "validation", "test"]
"""Fixed for ever: another hash would let rules meta-train on what was held out for their test."""
