"""Python overhead of LearnedOptimizer beside torch.optim.Adam, at many tensors of one element.

    python -m benchmarks.speed.overhead

A tensor of one element leaves next to no arithmetic: what a step takes is spent on going through the tensors. What
arithmetic there is, is also timed alone: the same number of coordinates in a single tensor.
Writes results/overhead.csv and .json (provenance). One thread, and processor time rather than time on the clock: what
else runs on the machine then counts little. All candidates are timed in turn, and the least of the rounds is quoted.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.results import RESULTS, save_rows
from learned_optim import LearnedOptimizer

ROUNDS = 15
TENSORS = 1000
LONGEST_INIT = 0.050  # seconds
LARGEST_RATIO = 2.0  # of a step to one of Adam(foreach)


def parameters_with_grads(count: int, size: int) -> list[Tensor]:
    """Leaf tensors with random values and gradients, vectors and matrices in turn as in a model."""
    parameters = [torch.randn((size,) if index % 2 else (size, 1), requires_grad=True) for index in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def least_seconds(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Least processor time of each candidate, timed in turn."""
    least = dict.fromkeys(candidates, float("inf"))
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            began = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - began)
    return least


def main() -> None:
    """Measure, print and write; the exit status says whether the bars are kept."""
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    many = [parameters_with_grads(TENSORS, 1) for _ in range(4)]
    one = parameters_with_grads(1, TENSORS)
    seconds = least_seconds(
        {
            "init, Adam": lambda: torch.optim.Adam(many[0]),
            "init, default": lambda: LearnedOptimizer(many[0]),
            "step, Adam(foreach)": torch.optim.Adam(many[0], foreach=True).step,
            "step, Adam(for-loop)": torch.optim.Adam(many[1], foreach=False).step,
            "step, default": LearnedOptimizer(many[2]).step,
            "step, default, capturable": LearnedOptimizer(many[3], capturable=True).step,
            "step, default, same coordinates in one tensor": LearnedOptimizer(one).step,
        }
    )
    unit = seconds["step, Adam(foreach)"]
    rows = [("case", "milliseconds", "microseconds_per_tensor", "ratio_to_adam_foreach_step")]
    rows += [
        (name, f"{1e3 * value:.3f}", f"{1e6 * value / TENSORS:.2f}", f"{value / unit:.2f}")
        for name, value in seconds.items()
    ]
    for row in rows:
        print("  ".join(cell.ljust(26) for cell in row))
    print(f"load average before {load_before:.2f}, after {os.getloadavg()[0]:.2f}")
    save_rows(RESULTS, "overhead", rows, {"load_before": load_before, "rounds": ROUNDS, "tensors": TENSORS})
    kept = seconds["init, default"] < LONGEST_INIT and seconds["step, default"] <= LARGEST_RATIO * unit
    print("bars kept" if kept else "bars missed")
    raise SystemExit(0 if kept else 1)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
