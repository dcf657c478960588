"""Meta-training throughput: inner steps of all tasks a second, with all that a meta-gradient needs for them.

    python -m benchmarks.speed.throughput

Prints a line ``THROUGHPUT ...`` for each case, and writes results/throughput.csv and .json (provenance). The default
rule's architecture; 16 tasks, perceptrons with 32 ReLU units on MNIST at 8x8 and 14x14, batches of 128; windows of 50
steps. An antithetic pair counts once. Columns after the speed: shares of a window's time. Run it on a quiet machine; it
prints the load before and after.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from benchmarks.results import RESULTS, save_rows
from learned_optim.meta_train.common.seeds import numpy_generator
from learned_optim.meta_train.estimators import PES, Estimator, TruncatedBPTT
from learned_optim.meta_train.inner import unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import MLPFamily
from learned_optim.rules import ScheduleFreeLSTM
from learned_optim.step.particles import ParticleStep

TASKS, TRUNCATION, ROUNDS = 16, 50, 5
SIZES = {"64-32-10": 8, "196-32-10": 14}
ESTIMATORS: Mapping[str, Estimator] = {
    "truncated-bptt": TruncatedBPTT(),
    "truncated-bptt-2048-coordinates": TruncatedBPTT(replay_coordinates=2048),
    "truncated-bptt-second-derivatives": TruncatedBPTT(second_derivatives=True),
    "pes": PES(sigma=0.01),
}


PARTS: Mapping[str, tuple[Any, str]] = {
    "batches": (VectorizedTask, "batch"),
    "losses_and_grads": (VectorizedTask, "losses_and_grads"),
    "rule": (ParticleStep, "__call__"),
}
"""Functions that take up a window. The rest of it: recording and replay, perturbations, second derivatives."""


@contextlib.contextmanager
def timed_parts() -> Iterator[Mapping[str, float]]:
    """Seconds spent in each of :data:`PARTS`."""
    seconds: defaultdict[str, float] = defaultdict(float)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds[part] += time.perf_counter() - began

        return run

    with contextlib.ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield seconds


def measure(estimator: Estimator, image_size: int) -> tuple[float, int, dict[str, float]]:
    """Median of inner steps a second over the rounds, parameters of one task, shares of :data:`PARTS`."""
    family = MLPFamily(image_size=image_size, width=(32, 32), activations=("relu",), initial="torch")
    task = VectorizedTask(family.sample(numpy_generator(0, "task"), "train"), TASKS, seed=0)
    rule, generator = ScheduleFreeLSTM(), torch.Generator().manual_seed(0)
    state = estimator.start(rule, task, unroll.start(rule, task, generator), generator)
    seconds = []
    with timed_parts() as parts:
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            state = estimator.window(rule, task, state, TRUNCATION, generator).state
            seconds.append(time.perf_counter() - began)
    shares = {part: parts[part] / sum(seconds) for part in PARTS}
    return TASKS * TRUNCATION / statistics.median(seconds[1:]), task.coordinates, shares  # the first round warms up


def main() -> None:
    """Measure, print and write."""
    load_before = os.getloadavg()[0]
    rows: list[tuple[str, ...]] = [("estimator", "network", "parameters", "tasks", "inner_steps_per_second", *PARTS)]
    for name, estimator in ESTIMATORS.items():
        for network, image_size in SIZES.items():
            speed, parameters, shares = measure(estimator, image_size)
            numbers = (f"{speed:.0f}", *(f"{share:.2f}" for share in shares.values()))
            rows.append((name, network, str(parameters), str(TASKS), *numbers))
            print(f"THROUGHPUT inner_steps_per_s={speed:.1f} params={parameters} tasks={TASKS} estimator={name}")
    print(f"load average before {load_before:.2f}, after {os.getloadavg()[0]:.2f}")
    save_rows(RESULTS, "throughput", rows, {"load_before": load_before, "rounds": ROUNDS, "truncation": TRUNCATION})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
