"""Neural art as a family of tasks: held-out pictures and styles, and where painting starts."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.draws import generator
from learned_optim.meta_train.config.load import ConfigError, TaskConfig
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import NeuralArtFamily, Split, neural_art
from learned_optim.meta_train.tasks.neural_art import CONTENT, TEST_STYLES, Style

SPLITS: tuple[Split, ...] = get_args(Split)


class TestNeuralArt:
    def test_pictures_and_styles_of_the_test_are_held_out(self) -> None:
        names = [name for split in SPLITS for name in CONTENT[split]]
        assert len(names) == len(set(names)) == 31
        assert [len(CONTENT[split]) for split in SPLITS] == [20, 4, 7]
        assert set(TEST_STYLES) == {"the_scream", "water_lilies"}
        assert NeuralArtFamily().styles == ("starry_night",)

    @pytest.mark.usefixtures("neural_art")
    @pytest.mark.parametrize("split", SPLITS)
    def test_only_pictures_of_the_split_are_read(self, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        read = []
        load = neural_art.picture.__wrapped__

        def recorded(kind: str, name: str, size: int) -> Tensor:
            read.append((kind, name))
            return load(kind, name, size)

        monkeypatch.setattr(neural_art, "picture", recorded)
        styles = tuple(style for style in get_args(Style) if style not in TEST_STYLES)
        NeuralArtFamily(size=32, styles=styles).sample(np.random.default_rng(0), split)
        assert {name for kind, name in read if kind == "content"} == set(CONTENT[split])
        assert {name for kind, name in read if kind == "style"} <= set(styles)

    @pytest.mark.usefixtures("neural_art")
    @pytest.mark.parametrize("style", TEST_STYLES)
    def test_held_out_styles_are_for_the_test_only(self, style: Style) -> None:
        with pytest.raises(ConfigError, match=f"not for meta-training: style '{style}' is held out for the test"):
            TaskConfig("neural-art", options={"styles": ["starry_night", style]}).build()
        family = NeuralArtFamily(size=32, styles=(style,))
        for split in ("train", "validation"):
            with pytest.raises(ValueError, match="held out for the test"):
                family.sample(np.random.default_rng(0), split)
        assert family.sample(np.random.default_rng(0), "test")

    @pytest.mark.usefixtures("neural_art")
    def test_painting_starts_at_the_photograph_or_at_noise(self) -> None:
        family = NeuralArtFamily(size=32, content_weight=1.0, style_weight=0.0, variation_weight=0.0)
        losses = {}
        for initial in get_args(NeuralArtFamily.__annotations__["initial"]):
            task = VectorizedTask(replace(family, initial=initial).sample(np.random.default_rng(0), "train"), 3, 0)
            losses[initial] = task.losses(task.initial_parameters, task.batch(generator()))
            assert task.coordinates == 3 * 32 * 32
        assert float(losses["content"].max()) < 1e-9  # rounding of the way to coordinates and back
        assert float(losses["noise"].min()) > 0.01

    @pytest.mark.usefixtures("neural_art")
    def test_instances_paint_different_photographs_and_share_the_network(self) -> None:
        task = VectorizedTask(NeuralArtFamily(size=32).sample(np.random.default_rng(0), "train"), 4, seed=0)
        contents = task.buffers["module.content"]
        assert all(not torch.equal(contents[0], other) for other in contents[1:])
        assert not any("weight" in name for name in task.buffers)

    def test_missing_files_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        neural_art.feature_network.cache_clear()
        with pytest.raises(data.DataNotFoundError, match=r"distilled16x.* not found; .* docs/neural-art\.md"):
            NeuralArtFamily().sample(np.random.default_rng(0), "train")
