"""Time per inner step and task of meta-training, when 1, 4 or 16 tasks advance together.

    python -m benchmarks.speed.vectorization

Writes results/vectorization.csv and .json (provenance). Run it on a quiet machine; it prints the load before and after.
The window of truncated backpropagation is 20 steps; the meta-gradient is taken through 2,048 coordinates at most.
"""

import argparse
import os
import statistics
import time

import torch

from benchmarks.results import RESULTS, save_rows
from learned_optim.meta_train.common.seeds import numpy_generator
from learned_optim.meta_train.estimators import truncated_bptt
from learned_optim.meta_train.inner.unroll import start
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import MLPFamily, QuadraticFamily, TaskFamily
from learned_optim.rules import LSTML2L, ScheduleFreeLSTM, UpdateRule

STEPS = 20
REPLAY_COORDINATES = 2048
ROUNDS = 9  # each round times all numbers of tasks in turn, so that a disturbance hits all alike
TASKS = (1, 4, 16)
FAMILIES: dict[str, TaskFamily] = {"quadratic": QuadraticFamily(), "mnist-mlp": MLPFamily()}
RULES: tuple[type[UpdateRule], ...] = (ScheduleFreeLSTM, LSTML2L)


def measure(rule: UpdateRule, family: TaskFamily) -> dict[int, float]:
    """Median seconds per inner step and task, by the number of tasks."""
    generator = torch.Generator().manual_seed(0)
    tasks = {
        count: VectorizedTask(family.sample(numpy_generator(0, "task"), "train"), count, seed=0) for count in TASKS
    }
    states = {count: start(rule, task, generator) for count, task in tasks.items()}
    times: dict[int, list[float]] = {count: [] for count in TASKS}
    for _ in range(ROUNDS + 1):
        for count, task in tasks.items():
            began = time.perf_counter()
            truncated_bptt(rule, task, states[count], STEPS, generator, replay_coordinates=REPLAY_COORDINATES)
            times[count].append((time.perf_counter() - began) / (STEPS * count))
    return {count: statistics.median(values[1:]) for count, values in times.items()}  # the first round warms up


def main() -> None:
    """Measure all rules and families; print and write the table."""
    load_before = os.getloadavg()[0]
    rows = [("rule", "family", "tasks", "microseconds_per_inner_step_and_task", "speedup_over_one_task")]
    for rule_type in RULES:
        for family_name, family in FAMILIES.items():
            seconds = measure(rule_type(), family)
            for count, value in seconds.items():
                rows.append(
                    (rule_type.name, family_name, str(count), f"{1e6 * value:.1f}", f"{seconds[1] / value:.2f}")
                )
                print("  ".join(cell.ljust(16) for cell in rows[-1]))
    print(f"load average before {load_before:.2f}, after {os.getloadavg()[0]:.2f}")
    save_rows(RESULTS, "vectorization", rows, {"load_before": load_before, "rounds": ROUNDS, "truncation": STEPS})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
