"""Families on images: softmax regression, residual networks and autoencoders."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.draws import drawn
from learned_optim.meta_train.config.load import ConfigError, TaskConfig
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.tasks import (
    AutoencoderFamily,
    DataTask,
    ResidualFamily,
    SoftmaxRegressionFamily,
    Split,
    TaskFamily,
)
from learned_optim.meta_train.tasks.autoencoder import AutoencoderTask
from learned_optim.meta_train.tasks.mlp import image_rows
from learned_optim.meta_train.tasks.residual import ResidualTask

SPLITS: tuple[Split, ...] = get_args(Split)

each_family_of_images = pytest.mark.parametrize(
    "cls", [SoftmaxRegressionFamily, ResidualFamily, AutoencoderFamily], ids=["softmax", "residual", "autoencoder"]
)


class TestImages:
    @each_family_of_images
    def test_splits_are_those_of_the_data_set(self, cls: Callable[..., TaskFamily]) -> None:
        for split in SPLITS:
            task = cls(dataset="digits").sample(np.random.default_rng(0), split)
            assert isinstance(task, DataTask)
            assert torch.equal((task.data[0] * 255).round().byte(), data.load("digits", split).images.flatten(1))

    @each_family_of_images
    def test_missing_data_names_the_fetch_command(
        self, cls: Callable[..., TaskFamily], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        image_rows.cache_clear()
        with pytest.raises(data.DataNotFoundError, match=r"'mnist' not found; .* 'learned-optim data fetch mnist'"):
            cls(dataset="mnist").sample(np.random.default_rng(0), "train")

    @pytest.mark.parametrize("family", ["softmax-regression", "residual", "autoencoder"])
    def test_evaluation_data_is_refused(self, family: str) -> None:
        with pytest.raises(ConfigError, match="not for meta-training: data set 'fashion-mnist'"):
            TaskConfig(family, options={"dataset": "fashion-mnist"}).build()

    def test_autoencoder_is_symmetric(self) -> None:
        task = AutoencoderTask(torch.rand(5, 9), 2, [7, 6], 3, "tanh", "squared", gain=1.0)
        kinds = [type(layer).__name__ for layer in drawn(task)]
        assert kinds == ["Linear", "Tanh", "Linear", "Tanh", "Linear", *["Linear", "Tanh"] * 2, "Linear"]
        sizes = [layer.out_features for layer in drawn(task) if isinstance(layer, nn.Linear)]
        assert sizes == [7, 6, 3, 6, 7, 9]

    def test_norm_stands_before_or_after_each_block(self) -> None:
        images = torch.randn(30, 6), torch.arange(30) % 4

        def stream(place: str, norm: str) -> Tensor:
            network = drawn(ResidualTask(images, 8, 2, 5, 7, "tanh", norm, place, gain=3.0))
            streamed: Tensor = network[:3](images[0])  # the first layer and both blocks
            return streamed

        def is_normal(values: Tensor, dim: int) -> bool:
            return bool(values.mean(dim).abs().max() < 1e-5)

        assert is_normal(stream("post", "layer"), 1)
        assert is_normal(stream("post", "batch"), 0)
        assert not is_normal(stream("pre", "layer"), 1)
        assert not is_normal(stream("pre", "batch"), 0)
        assert type(drawn(ResidualTask(images, 8, 2, 5, 7, "tanh", "layer", "pre", 1.0))[3]) is nn.LayerNorm
