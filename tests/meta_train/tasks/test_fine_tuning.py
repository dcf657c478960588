"""Vision transformers: patches and attention. Fine-tuning: a pretrained body that all instances share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from helpers.draws import drawn
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.config.load import ConfigError, TaskConfig
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.tasks import DataTask, FineTuningFamily, TaskFamily, VisionTransformerFamily
from learned_optim.meta_train.tasks.conv_net import images
from learned_optim.meta_train.tasks.fine_tuning import pretrained
from learned_optim.meta_train.tasks.language_model import TransformerBlock
from learned_optim.meta_train.tasks.vision_transformer import VisionTransformer

STEPS = 300  # of pretraining, which takes well under a second here


def fine_tuning(**options: Any) -> FineTuningFamily:
    small = {"dataset": "digits", "image_size": 8, "width": (16, 16), "examples": (100, 100), "pretraining": STEPS}
    return FineTuningFamily(**{**small, **options})


def sampled(family: TaskFamily, split: Any = "validation") -> DataTask:
    task = family.sample(np.random.default_rng(0), split)
    assert isinstance(task, DataTask)
    return task


class TestVisionTransformer:
    def test_patches_are_those_of_an_unfolded_image(self) -> None:
        network = drawn(sampled(VisionTransformerFamily(dataset="digits", image_size=8, patch=2, width=(4, 4))))
        assert isinstance(network, VisionTransformer)
        pictures, seen = torch.rand(3, 1, 8, 8), []
        network.embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        network(pictures)
        unfolded = torch.nn.functional.unfold(pictures, 2, stride=2).transpose(1, 2)
        assert torch.equal(seen[0], unfolded)

    def test_each_patch_sees_all_others(self) -> None:
        stream = torch.randn(1, 5, 4)
        changed = stream.clone()
        changed[:, -1] += torch.tensor([1.0, -2.0, 3.0, 0.5])  # not the same everywhere: layer norm would take it out
        with fixed_global_state(0):
            causal, free = TransformerBlock(4), TransformerBlock(4, causal=False)
        first = [bool((block(stream)[:, 0] != block(changed)[:, 0]).any()) for block in (causal, free)]
        assert first == [False, True]

    def test_odd_width_has_whole_heads(self) -> None:
        network = drawn(sampled(VisionTransformerFamily(dataset="digits", image_size=8, width=(5, 5))))
        assert network.positions.shape == (4, 6)


class TestFineTuning:
    def test_fine_tuning_data_hold_the_last_five_classes(self) -> None:
        task = sampled(fine_tuning())
        assert task.data[1].unique().tolist() == [0, 1, 2, 3, 4]
        expected, labels = images("digits", "validation", 8, (5, 6, 7, 8, 9))
        assert torch.equal(task.data[0], expected[:100])
        assert torch.equal(task.data[1], labels[:100])

    def test_instances_share_the_body_and_have_fresh_output_layers(self) -> None:
        task = sampled(fine_tuning())
        first, second = drawn(task, 0), drawn(task, 1)
        assert all(map(torch.equal, first.body.parameters(), second.body.parameters()))
        assert not torch.equal(first.output.weight, second.output.weight)

    def test_pretrained_body_separates_its_classes(self) -> None:
        """A linear layer on its features, fitted in closed form, against one on those of a fresh body."""
        pixels, labels = images("digits", "train", 8, (0, 1, 2, 3, 4))
        errors = []
        for steps in (0, STEPS):
            module = drawn(sampled(fine_tuning(pretraining=steps, width=(8, 8))))
            features = torch.cat([module.body(pixels).detach(), torch.ones(len(pixels), 1)], 1)
            targets = torch.nn.functional.one_hot(labels, 5).float()
            guesses = features @ torch.linalg.lstsq(features, targets, driver="gelsd").solution
            errors.append(float((guesses.argmax(1) != labels).float().mean()))
        assert errors[1] < 0.5 * errors[0]

    def test_pretraining_ignores_and_preserves_the_global_random_state(self) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        arguments = ("digits", None, 8, "perceptron", 4, 3)
        first = pretrained.__wrapped__(*arguments)
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(6)
        second = pretrained.__wrapped__(*arguments)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_training_keeps_the_shared_body(self) -> None:
        task = sampled(fine_tuning())
        before = {name: tensor.clone() for name, tensor in drawn(task).body.state_dict().items()}
        with torch.no_grad():
            for parameter in drawn(task).parameters():
                parameter.zero_()
        after = drawn(task).body.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_evaluation_data_is_refused_for_pretraining(self) -> None:
        with pytest.raises(ConfigError, match="not for meta-training: data set 'fashion-mnist'"):
            TaskConfig("fine-tuning", options={"dataset": "mnist", "pretrained_on": "fashion-mnist"}).build()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (VisionTransformerFamily, {"patch": 5}, "patch must divide the 16 pixels of an image, got 5"),
        (VisionTransformerFamily, {"patch": 0}, "patch must be at least 1, got 0"),
        (VisionTransformerFamily, {"image_size": 40}, "image_size must be 8 to 32 pixels, or None, got 40"),
        (VisionTransformerFamily, {"blocks": (0, 1)}, "blocks"),
        (FineTuningFamily, {"networks": ("rnn",)}, "networks must be some of perceptron, conv-net"),
        (FineTuningFamily, {"image_size": 4}, "image_size must be 8 to 32 pixels, got 4"),
        (FineTuningFamily, {"pretraining": -1}, "pretraining must not be negative, got -1"),
        (FineTuningFamily, {"pretrained_on": "mnist"}, "mnist has another number of channels than cifar10"),
        (FineTuningFamily, {"examples": (0, 3)}, "examples"),
    ],
)
def test_option_out_of_range_is_refused(cls: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_indivisible_patches_of_whole_images_are_refused_on_sampling() -> None:
    with pytest.raises(ValueError, match="patch must divide the 8 pixels"):
        sampled(VisionTransformerFamily(dataset="digits", image_size=None, patch=3))
    assert data.load("digits", "train").images.shape[-1] == 8
