"""Memory and state of estimators, and settings that they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.particles import ALL_ESTIMATORS, PARTICLE_RULES, STEPS, generator, noisy_quadratics, randomised
from learned_optim.meta_train.estimators import (
    ES,
    PES,
    Combined,
    Estimator,
    Reparameterization,
)
from learned_optim.meta_train.inner import recorded
from learned_optim.meta_train.inner.unroll import start
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.rules import ScaleFreeLSTM

pytestmark = pytest.mark.usefixtures("double", "one_thread")


# Memory, state and refusals


class LiveBytes(TorchDispatchMode):
    """Peak of the memory of all tensors made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = (reference, storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["es", "pes", "es-single", "truncated-bptt"])
def test_memory_is_constant_in_the_window_except_for_backpropagation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "CALLS_BEFORE", 0)  # so that operations are recorded in the first window
    rule = randomised(ScaleFreeLSTM(2))
    task = VectorizedTask(QuadraticTask(20, None, 0.1, 1.0), 2, seed=0)
    estimator = ALL_ESTIMATORS[name]()
    state = estimator.start(rule, task, start(rule, task, generator()), generator())
    peaks = []
    for steps in (5, 5, 50):  # the first one warms up: caches
        with LiveBytes() as live:
            estimator.window(rule, task, state, steps, generator())
        peaks.append(live.peak)
    growth = peaks[2] - peaks[1]
    if name == "truncated-bptt":
        assert growth > 45 * 8 * task.instances * task.coordinates
    else:
        assert growth <= 45 * 8 * 2 * task.instances * 3  # the losses of the particles, listed, stacked and averaged


@pytest.mark.parametrize("build", list(ALL_ESTIMATORS.values()), ids=list(ALL_ESTIMATORS))
def test_state_has_constant_size_and_determines_the_next_window(build: Callable[[], Estimator]) -> None:
    rule, task = randomised(PARTICLE_RULES["scale-free-lstm"]()), noisy_quadratics()
    estimator = build()
    state = estimator.start(rule, task, start(rule, task, generator(1)), generator(2))
    learned: dict[str, Tensor] = {}

    def size() -> int:
        return sum(tensor.numel() for tensor in tree_leaves([state, learned]))

    sizes = []
    for seed in range(3):
        before = [tensor.clone() for tensor in tree_leaves(state)]
        last, learned_before = state, dict(learned)
        estimate = estimator.window(rule, task, state, STEPS, generator(seed), learned)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), before, strict=True))
        state = estimate.state
        assert not any(tensor.requires_grad for tensor in tree_leaves([state, estimate.grads, estimate.losses]))
        sizes.append(size())
    assert len(set(sizes)) == 1
    estimator.check_learned(learned)
    repeated = build().window(rule, task, last, STEPS, generator(2), learned_before)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(repeated), tree_leaves(estimate), strict=True))


def test_invalid_settings_are_refused() -> None:
    rule, task = randomised(PARTICLE_RULES["lstm-l2l"]()), noisy_quadratics()
    inner = start(rule, task, generator())
    for options, message in [
        ({"sigma": 0.0}, "sigma must be positive, got 0"),
        ({"pairs": 0}, "pairs and groups must be at least 1, got 0 and None"),
        ({"groups": 0}, "pairs and groups must be at least 1, got 1 and 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ES(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups must divide the 4 instances, got 3"):
        PES(groups=3).start(rule, task, inner, generator())
    with pytest.raises(ValueError, match="needs two pairs or more"):
        Combined(groups=1).window(rule, task, Combined().start(rule, task, inner, generator()), 2, generator())
    with pytest.raises(ValueError, match=r"variance_decay must lie in \[0, 1\), got 1"):
        Combined(variance_decay=1.0)
    with pytest.raises(ValueError, match="replay_coordinates needs constant inner gradients"):
        Reparameterization(second_derivatives=True, replay_coordinates=3)
    with pytest.raises(ValueError, match="pes keeps no state of its own, got es"):
        PES().check_learned({"es"})
    with pytest.raises(ValueError, match="combined keeps es, rp and covariance, got es"):
        Combined().check_learned({"es"})
