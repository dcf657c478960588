"""Laws of a training: it is independent of the partition of parameters into groups, optimizers and tensors."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.pytorch_checks import KINDS, Configuration, assert_equal, over
from helpers.rules import few_examples, normal
from learned_optim import LearnedOptimizer

# PyTorch tests tiny rates.
pytestmark = pytest.mark.filterwarnings("ignore:lr=.* makes every learned step:UserWarning")


def small(*shape: int, seed: int = 0) -> Tensor:
    """Values as small as updates, so that a parameter shows the last bits of its updates."""
    return 1e-3 * normal(*shape, seed=seed).float()


@pytest.mark.slow
@over(KINDS)
@few_examples
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    cuts=st.sets(st.integers(1, 5)),
)
def test_partition_gives_the_same_trajectory(
    configuration: Configuration, shapes: list[tuple[int, ...]], order: Any, cuts: set[int]
) -> None:
    """One group, many groups, separate optimizers, any order: equal to the bit."""

    def train(partition: Callable[[list[Tensor]], list[Any]]) -> list[Tensor]:
        params = [small(*shape, seed=index) for index, shape in enumerate(shapes)]
        optimizers = [configuration.make(part, weight_decay=1e-4) for part in partition(params)]
        for step in range(3):
            for index, values in enumerate(params):
                values.grad = normal(*values.shape, seed=100 * step + index).float()
            for optimizer in optimizers:
                optimizer.step()
        return params

    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        places = [0, *sorted(cut for cut in cuts if cut < len(params)), len(params)]
        return [{"params": params[start:end]} for start, end in itertools.pairwise(places)]

    expected = train(lambda params: [params])
    assert_equal(train(lambda params: [groups(params)]), expected)
    assert_equal(train(lambda params: [[group] for group in groups(params)]), expected)
    assert_equal(train(lambda params: [[values] for values in params]), expected)
    assert_equal(train(lambda params: [order.sample(params, len(params))]), expected)


@pytest.mark.slow
@over({name: each for name, each in KINDS.items() if each.kind is LearnedOptimizer})
@few_examples
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6), order=st.randoms(use_true_random=False))
def test_cutting_and_shuffling_coordinates_gives_the_same_trajectory(
    configuration: Configuration, sizes: list[int], order: Any
) -> None:
    """To the bit; Adam's last bits depend on whether a coordinate falls into a vector register or the remainder."""
    total = sum(sizes)
    places = torch.tensor(order.sample(range(total), total), dtype=torch.int64)
    values, grads = small(total), normal(3, total, seed=1).float()

    def train(params: list[Tensor], grads: Tensor) -> Tensor:
        optimizer = configuration.make(params, weight_decay=1e-4)
        for grad in grads:
            parts = grad.split([values.numel() for values in params])
            for values, part in zip(params, parts, strict=True):
                values.grad = part.view(values.shape)
            optimizer.step()
        return torch.cat([values.flatten() for values in params])

    whole = train([values.clone()], grads)
    assert_equal(train([part.clone() for part in values.split(sizes)], grads), whole)
    assert_equal(train([values[places]], grads[:, places]), whole[places])
    if configuration.options["rule"] != "default":  # that one depends on the shape of matrices
        assert_equal(train([values.clone().view(1, total, 1)], grads), whole)
