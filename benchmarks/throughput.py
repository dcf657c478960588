"""Meta-training throughput: inner steps of all tasks a second, with all that a meta-gradient needs for them.

    python -m benchmarks.throughput

Prints a line ``THROUGHPUT ...`` for each case, and writes results/throughput.csv and .json (provenance). The default
rule's architecture; 16 tasks, perceptrons with 32 ReLU units on MNIST at 8x8 and 14x14, batches of 128; windows of 50
steps. An antithetic pair counts once. Run it on a quiet machine; it prints the load before and after.
"""

import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from learned_optim.meta_train.benchmark import save_rows
from learned_optim.meta_train.estimators import PES, Estimator, TruncatedBPTT
from learned_optim.meta_train.seeds import numpy_generator
from learned_optim.meta_train.tasks import MLPFamily
from learned_optim.meta_train.unroll import start
from learned_optim.meta_train.vectorize import VectorizedTask
from learned_optim.rules import ScaleFreeLSTM

RESULTS = Path(__file__).parent / "results"
TASKS, TRUNCATION, ROUNDS = 16, 50, 5
SIZES = {"64-32-10": 8, "196-32-10": 14}
ESTIMATORS: Mapping[str, Estimator] = {
    "truncated-bptt": TruncatedBPTT(),
    "truncated-bptt-2048-coordinates": TruncatedBPTT(replay_coordinates=2048),
    "truncated-bptt-second-derivatives": TruncatedBPTT(second_derivatives=True),
    "pes": PES(sigma=0.01),
}


def inner_steps_per_second(estimator: Estimator, image_size: int) -> tuple[float, int]:
    """Median over the rounds, and the number of parameters of one task."""
    family = MLPFamily(image_size=image_size, width=(32, 32), activations=("relu",), initial="torch")
    task = VectorizedTask(family.sample(numpy_generator(0, "task"), "train"), TASKS, seed=0)
    rule, generator = ScaleFreeLSTM(), torch.Generator().manual_seed(0)
    state = estimator.start(rule, task, start(rule, task, generator), generator)
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        state = estimator.window(rule, task, state, TRUNCATION, generator).state
        seconds.append(time.perf_counter() - began)
    return TASKS * TRUNCATION / statistics.median(seconds[1:]), task.coordinates  # the first round warms up


def main() -> None:
    """Measure, print and write."""
    load_before = os.getloadavg()[0]
    rows: list[tuple[str, ...]] = [("estimator", "network", "parameters", "tasks", "inner_steps_per_second")]
    for name, estimator in ESTIMATORS.items():
        for network, image_size in SIZES.items():
            speed, parameters = inner_steps_per_second(estimator, image_size)
            rows.append((name, network, str(parameters), str(TASKS), f"{speed:.0f}"))
            print(f"THROUGHPUT inner_steps_per_s={speed:.1f} params={parameters} tasks={TASKS} estimator={name}")
    print(f"load average before {load_before:.2f}, after {os.getloadavg()[0]:.2f}")
    save_rows(RESULTS, "throughput", rows, {"load_before": load_before, "rounds": ROUNDS, "truncation": TRUNCATION})


if __name__ == "__main__":
    main()
