"""Time of an optimizer step on the CPU: the shipped rules beside torch.optim.Adam, and the choice of block size.

    python -m benchmarks.step_time

Writes results/step_time.csv and .json (provenance). Run it on a quiet machine; it prints the load before and after.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim import LearnedOptimizer, load_rule
from learned_optim.execution import Settings, Slot, apply_in_blocks
from learned_optim.meta_train.benchmark import save_rows
from learned_optim.rules.lstm_l2l import log_sign

RESULTS = Path(__file__).parent / "results"
ROUNDS = 15  # each round times all candidates in turn, so that a disturbance hits all alike
BLOCK_SIZES = (2048, 4096, 8192, 16384, 32768, 65536)
OPTIMIZERS: Mapping[str, Callable[[list[Tensor]], Optimizer]] = {
    "Adam(fused)": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "Adam(foreach)": lambda parameters: torch.optim.Adam(parameters, foreach=True),
    "Adam(for-loop)": lambda parameters: torch.optim.Adam(parameters, foreach=False),
    "default": lambda parameters: LearnedOptimizer(parameters),
    "lstm-l2l-mnist": lambda parameters: LearnedOptimizer(parameters, "lstm-l2l-mnist"),
    "loop of nn.LSTMCell(20) x 2": lambda parameters: LSTMCellLoop(parameters),
}
SHAPES: Mapping[str, list[tuple[int, ...]]] = {
    "1,000 tensors of 100": [(100,)] * 1000,
    "one tensor of 16,000": [(160, 100)],
    "one tensor of 160,000": [(1600, 100)],
    "one tensor of 1,600,000": [(1600, 1000)],
    "convolutional net, 160,000 in 20 tensors": [(32, 32, 3, 3), (32,)] * 4
    + [(64, 64, 3, 3), (64,)] * 3
    + [(122, 100)]
    + [(100,)] * 5,
}


class LSTMCellLoop(Optimizer):
    """The coordinatewise LSTM as it is usually written: parameter by parameter, coordinates as rows of a batch."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {})
        self.first, self.second, self.output = nn.LSTMCell(2, 20), nn.LSTMCell(20, 20), nn.Linear(20, 1)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """One step."""
        for parameter in self.param_groups[0]["params"]:
            zeros = [torch.zeros(parameter.numel(), 20) for _ in range(4)]
            h1, c1, h2, c2 = self.state[parameter].get("lstm", zeros)
            h1, c1 = self.first(log_sign(parameter.grad.reshape(-1), 10.0).T, (h1, c1))
            h2, c2 = self.second(h1, (h2, c2))
            self.state[parameter]["lstm"] = [h1, c1, h2, c2]
            parameter.add_(0.1 * self.output(h2).view(parameter.shape))


def parameters_with_grads(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Leaf tensors with random values and gradients."""
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def paired_medians(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each candidate, timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up


def compare_optimizers() -> list[tuple[str, ...]]:
    """Rows: what, candidate, nanoseconds a parameter, ratio to fused Adam."""
    rows: list[tuple[str, ...]] = []
    for title, shapes in SHAPES.items():
        candidates = {name: make(parameters_with_grads(shapes)).step for name, make in OPTIMIZERS.items()}
        medians = paired_medians(candidates)
        count = sum(torch.Size(shape).numel() for shape in shapes)
        for name, seconds in medians.items():
            rows.append((title, name, f"{1e9 * seconds / count:.2f}", f"{seconds / medians['Adam(fused)']:.1f}"))
    return rows


def compare_block_sizes() -> list[tuple[str, ...]]:
    """Rows: rule, block size, nanoseconds a parameter, ratio to the fastest."""
    rows: list[tuple[str, ...]] = []
    count = 1 << 18
    for name in ("default", "lstm-l2l-mnist"):
        rule = load_rule(name)
        (parameter,) = parameters_with_grads([(count,)])
        assert parameter.grad is not None  # for the type checker
        slot = Slot(parameter.detach(), parameter.grad, rule.init_state((count,)), torch.ones(()))
        settings = Settings(1.0, 0.0, False)
        step = functools.partial(apply_in_blocks, rule, [slot], settings)
        candidates = {str(size): functools.partial(step, size) for size in BLOCK_SIZES}
        with torch.no_grad():
            medians = paired_medians(candidates)
        fastest = min(medians.values())
        for size, seconds in medians.items():
            rows.append((f"blocks of {name}", size, f"{1e9 * seconds / count:.2f}", f"{seconds / fastest:.2f}"))
    return rows


def main() -> None:
    """Measure, print and write."""
    load_before = os.getloadavg()[0]
    header = ("case", "candidate", "nanoseconds_per_parameter", "ratio")
    rows: list[tuple[str, ...]] = [header, *compare_optimizers(), *compare_block_sizes()]
    for row in rows:
        print("  ".join(cell.ljust(26) for cell in row))
    print(f"load average before {load_before:.2f}, after {os.getloadavg()[0]:.2f}")
    save_rows(RESULTS, "step_time", rows, {"load_before": load_before, "rounds": ROUNDS})


if __name__ == "__main__":
    main()
