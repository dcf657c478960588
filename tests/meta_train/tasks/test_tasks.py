"""All task families: sampling from a seed, refused options, and the random numbers that they share."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from helpers.draws import SIGMAS, generator
from helpers.small_families import SMALL_FAMILIES
from learned_optim.meta_train.common.seeds import derive_seed
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import FAMILIES, ConvNetFamily, MLPFamily, QuadraticFamily, Split, Task, TaskFamily
from learned_optim.meta_train.tasks.sampling import log_uniform, log_uniform_integer

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def test_every_family_has_a_small_example() -> None:
    assert SMALL_FAMILIES.keys() == FAMILIES.keys()
    assert all(type(family) is FAMILIES[name] for name, family in SMALL_FAMILIES.items())


@pytest.mark.usefixtures("neural_art")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FAMILIES)
def test_samples_depend_on_the_generator_alone(name: str, split: Split) -> None:
    def draw(seed: int) -> list[list[float]]:
        rng = np.random.default_rng(seed)
        tasks = [family.sample(rng, split) for _ in range(8)]
        return [fingerprint(task) for task in tasks]

    def fingerprint(task: Task) -> list[float]:
        vectorized = VectorizedTask(task, 2, seed=0)
        losses = vectorized.losses(vectorized.initial_parameters, vectorized.batch(generator()))
        return [vectorized.coordinates, *losses.tolist()]

    family = SMALL_FAMILIES[name]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert draw(0) == first
    assert draw(1) != first
    assert len({tuple(entry) for entry in first}) >= 3  # neural art has three styles to draw from


@pytest.mark.parametrize("cls", FAMILIES.values(), ids=FAMILIES)
def test_misspelt_option_is_refused(cls: Callable[..., TaskFamily]) -> None:
    with pytest.raises(TypeError, match="widht"):
        cls(widht=(1, 2))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (QuadraticFamily, {"dimensions": (0, 4)}, r"dimensions .* 1 <= low <= high, got \[0, 4\]"),
        (QuadraticFamily, {"dimensions": (5, 4)}, "dimensions"),
        (QuadraticFamily, {"condition": (0.5, 4.0)}, "condition"),
        (QuadraticFamily, {"condition": (1.0, math.inf)}, "condition"),
        (QuadraticFamily, {"condition": (math.nan, 2.0)}, "condition"),
        (QuadraticFamily, {"noise": -1.0}, "noise"),
        (QuadraticFamily, {"initial_deviation": -0.1}, "initial_deviation"),
        (MLPFamily, {"layers": (-1, 2)}, "layers"),
        (MLPFamily, {"layers": (3, 1)}, "layers"),
        (MLPFamily, {"width": (0, 3)}, "width"),
        (MLPFamily, {"batch_size": (0, 0)}, "batch_size"),
        (MLPFamily, {"gain": (0.0, 1.0)}, "gain .* 0 < low"),
        (MLPFamily, {"layer_norm": 1.5}, "layer_norm"),
        (MLPFamily, {"activations": ()}, "activations"),
        (MLPFamily, {"activations": ("swish",)}, "swish"),
        (ConvNetFamily, {"layers": (0, 2)}, "layers"),
        (ConvNetFamily, {"examples": 0}, "examples"),
        (ConvNetFamily, {"channels": (0, 2)}, "channels"),
        (ConvNetFamily, {"hidden": (0, 2)}, "hidden"),
        (ConvNetFamily, {"batch_size": (1, 8)}, "batch_size"),
        (ConvNetFamily, {"gain": (0.0, 1.0)}, "gain"),
        (ConvNetFamily, {"image_size": (4, 8)}, "image_size"),
        (ConvNetFamily, {"image_size": (8, 64)}, "image_size must be at most 32"),
        (ConvNetFamily, {"kernel_sizes": (4,)}, "kernel_sizes must be odd"),
        (ConvNetFamily, {"kernel_sizes": ()}, "kernel_sizes"),
        (ConvNetFamily, {"activations": ("swish",)}, "swish"),
        (ConvNetFamily, {"norms": ("instance",)}, "norms must be some of none, batch, layer"),
        (ConvNetFamily, {"classes": (3,)}, "classes"),
        (ConvNetFamily, {"classes": (3, 3)}, "classes"),
        (ConvNetFamily, {"classes": (3, 10)}, r"classes .* 0\.\.9, got \[3, 10\]"),
    ],
)
def test_option_out_of_range_is_refused_before_anything_is_drawn(
    cls: Callable[..., TaskFamily], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_log_uniform_draws_are_uniform_in_the_logarithm() -> None:
    rng = np.random.default_rng(0)
    draws = 4000
    logarithms = np.log10([log_uniform(rng, (0.1, 10.0)) for _ in range(draws)])
    assert np.abs(logarithms).max() <= 1
    for quarter in range(4):
        low = -1 + quarter / 2
        share = np.mean((low <= logarithms) & (logarithms < low + 0.5))
        assert abs(share - 0.25) < SIGMAS * math.sqrt(0.25 * 0.75 / draws)
    counts = Counter(log_uniform_integer(rng, (1, 4)) for _ in range(draws))
    for value in range(1, 5):
        expected = math.log((value + 1) / value) / math.log(5)
        assert abs(counts[value] / draws - expected) < SIGMAS * math.sqrt(expected * (1 - expected) / draws)
    assert {log_uniform_integer(rng, (20, 20)) for _ in range(100)} == {20}


def test_seeds_differ_by_purpose_and_by_counter() -> None:
    seeds = {
        derive_seed(seed, purpose, first, second)
        for seed in (0, 1, 2**40)
        for purpose in ("task", "horizon")
        for first in range(4)
        for second in range(4)
    }
    assert len(seeds) == 3 * 2 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "task", 2, 3) == 993517027948791374  # a resumed run relies on it
