"""Time of an optimizer step on the CPU: the shipped rules in C and without it, their rivals, floors, sizes of blocks.

    python -m benchmarks.speed.step_time

Rivals: torch.optim.Adam, the usual loop over nn.LSTMCell and, where the package pylo can be imported, PyLO's plain
optimizers. Writes results/step_time.csv and .json (provenance, floors, bars). Run it on a quiet machine; it prints the
load before and after. The exit status is 1 if a bar is missed. A GPU is measured by benchmarks/speed/gpu_check.py.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.results import RESULTS, save_rows
from benchmarks.speed.gpu_cases import bytes_that_must_move, resnet50
from benchmarks.speed.rivals import ADAM_KERNELS, LSTMCellLoop, Make, pylo_optimizers
from learned_optim import LearnedOptimizer, UpdateRule
from learned_optim.kernels.slots import Slot, StepSettings
from learned_optim.step.plain import apply_in_blocks

ROUNDS = 15  # each round times all candidates in turn, so that a disturbance hits all alike
FEWEST_ROUNDS, LONGEST = 3, 60.0  # a case ends after so many seconds, but not before so many rounds
BLOCK_SIZES = (2048, 4096, 8192, 16384, 32768, 65536)
ONE_THREAD = "default, one thread"
LOOP = "loop of nn.LSTMCell(20) x 2"
OURS: Mapping[str, Make] = {
    "default": lambda parameters: LearnedOptimizer(parameters),
    "specialised-mnist": lambda parameters: LearnedOptimizer(parameters, "specialised-mnist"),  # with an LSTM
    "lstm-l2l-mnist": lambda parameters: LearnedOptimizer(parameters, "lstm-l2l-mnist"),
}
PLAIN: Mapping[str, Make] = {
    "default, fused=False": lambda parameters: LearnedOptimizer(parameters, fused=False),
    "lstm-l2l-mnist, fused=False": lambda parameters: LearnedOptimizer(parameters, "lstm-l2l-mnist", fused=False),
}
RIVALS: Mapping[str, Make] = {LOOP: LSTMCellLoop}
Shape = tuple[int, ...]
ONE = "one tensor of {:,}"
SHAPES: Mapping[str, list[Shape]] = {
    "1,000 tensors of 100": [(100,)] * 1000,
    ONE.format(16_000): [(160, 100)],
    ONE.format(160_000): [(1600, 100)],
    ONE.format(1_600_000): [(1600, 1000)],
    "convolutional net, 160,000 in 20 tensors": [(32, 32, 3, 3), (32,)] * 4
    + [(64, 64, 3, 3), (64,)] * 3
    + [(122, 100)]
    + [(100,)] * 5,
    "ResNet-50": resnet50(),
}
LARGE = 10_000_000  # from so many parameters on, only Adam and the default rule: the state of others takes gigabytes
OF_PYLO, OF_LOOP = 1 / 3, 1 / 4  # bars: of the time of PyLO's fastest plain optimizer, and of the loop's
Row = tuple[str, ...]


class Machine(NamedTuple):
    """The best speeds of this machine, all threads together."""

    multiply_adds: float
    """A second, in a float32 matrix product."""
    bytes_copied: float
    """A second, read and written, in a copy beyond the caches."""
    activations: float
    """A second: tanh in place, in the caches."""


def parameters_with_grads(shapes: Sequence[Shape]) -> list[Tensor]:
    """Leaf tensors with random values and gradients."""
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def paired_medians(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    until = time.perf_counter() + LONGEST
    for count in range(rounds + 1):
        if count > FEWEST_ROUNDS and time.perf_counter() > until:
            break
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up


def with_one_thread(run: Callable[[], object]) -> None:
    """Call it without a thread that it could hand work to: what the hand-over costs, or brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
    finally:
        torch.set_num_threads(threads)


def measure_machine(rounds: int, size: int = 1024, numbers: int = 1 << 26) -> Machine:
    """Matrix product of ``size`` squared, copy of ``numbers``, tanh of ``numbers >> 10`` float32 values."""
    left, right, product = (torch.randn(size, size) for _ in range(3))
    source = torch.randn(numbers)
    target, few = torch.empty_like(source), torch.randn(max(1, numbers >> 10))
    medians = paired_medians(
        {
            "matmul": lambda: torch.mm(left, right, out=product),
            "copy": lambda: target.copy_(source),
            "tanh": few.tanh_,
        },
        rounds,
    )
    return Machine(size**3 / medians["matmul"], 2 * source.nbytes / medians["copy"], len(few) / medians["tanh"])


def floors(rule: UpdateRule, bytes_moved: float, machine: Machine) -> dict[str, float]:
    """Nanoseconds a parameter that the machine needs at least for each kind of work of a step.

    Multiply-adds are those of the weight matrices that meet every coordinate, activations five a unit; both in a step
    in which the LSTM runs.
    """
    matrices = {name: weight for name, weight in rule.named_parameters() if weight.dim() == 2 and name != "step_weight"}
    return {
        "arithmetic": 1e9 * sum(weight.numel() for weight in matrices.values()) / machine.multiply_adds,
        "memory": 1e9 * bytes_moved / machine.bytes_copied,
        "activations": 1e9 * 5 * rule.state_features.get("cell", 0) / machine.activations,
    }


def compare_optimizers(largest: int, rounds: int, machine: Machine) -> list[Row]:
    """Rows of all cases up to ``largest`` parameters."""
    rows: list[Row] = []
    for case, shapes in SHAPES.items():
        count = sum(torch.Size(shape).numel() for shape in shapes)
        if count > largest:
            continue
        makers = {**ADAM_KERNELS, **OURS, **PLAIN, **RIVALS, **pylo_optimizers("naive")}
        if count >= LARGE:
            makers = {**ADAM_KERNELS, "default": OURS["default"]}
        optimizers = {name: make(parameters_with_grads(shapes)) for name, make in makers.items()}
        candidates: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in optimizers.items()}
        candidates[ONE_THREAD] = functools.partial(with_one_thread, optimizers["default"].step)
        medians = paired_medians(candidates, rounds)
        for name, seconds in medians.items():
            moved = bytes_that_must_move(optimizers["default" if name == ONE_THREAD else name])
            ratio, fraction = seconds / medians["Adam(fused)"], moved / seconds / machine.bytes_copied
            time_each = f"{1e9 * seconds / count:.2f}"
            rows.append((case, name, str(count), time_each, f"{ratio:.1f}", f"{moved / count:.0f}", f"{fraction:.3f}"))
            print("  ".join(cell.ljust(26) for cell in rows[-1]), flush=True)
    return rows


def compare_block_sizes(rounds: int, count: int = 1 << 18) -> list[Row]:
    """Rows of each rule in blocks of each size; the ratio is to the fastest."""
    rows: list[Row] = []
    for name in OURS:
        (parameter,) = parameters_with_grads([(count,)])
        assert parameter.grad is not None  # for the type checker
        state = LearnedOptimizer([parameter], name)  # in the dtypes that it keeps
        state.step()
        rule = state.rule
        entries = {entry: state.state[parameter][entry] for entry in rule.state_features}
        slot = Slot(parameter.detach(), parameter.grad, entries, torch.ones(()))
        step = functools.partial(apply_in_blocks, rule, [slot], StepSettings(1.0, 0.0, False, True))
        candidates = {str(size): functools.partial(step, size) for size in BLOCK_SIZES}
        with torch.no_grad():
            medians = paired_medians(candidates, rounds)
        fastest = min(medians.values())
        for size, seconds in medians.items():
            each = f"{1e9 * seconds / count:.2f}"
            rows.append((f"blocks of {name}", size, str(count), each, f"{seconds / fastest:.2f}", "", ""))
    return rows


def judge(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Bars: our time over a rival's, and the largest that this may be. What was not measured is not judged."""
    times: dict[str, dict[str, float]] = {}
    for case, candidate, _, each, *_ in rows:
        times.setdefault(case, {})[candidate] = float(each)
    bars = {}
    for count in (160_000, 1_600_000):
        case = ONE.format(count)
        found = times.get(case, {})
        pylo = [value for name, value in found.items() if name.startswith("PyLO ")]
        if pylo:
            bars[f"default over PyLO's fastest plain optimizer, {case}"] = found["default"] / min(pylo), OF_PYLO
        if LOOP in found:
            bars[f"lstm-l2l over the loop of nn.LSTMCell, {case}"] = found["lstm-l2l-mnist"] / found[LOOP], OF_LOOP
    return bars


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each case, at most (%(default)s)")
    parser.add_argument("--largest", type=int, default=10**9, help="leave out cases of more parameters")
    options = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    small = options.largest < LARGE
    machine = measure_machine(options.rounds, *((64, 1 << 16) if small else ()))
    rows = compare_optimizers(options.largest, options.rounds, machine)
    rows += compare_block_sizes(options.rounds, min(1 << 18, options.largest))
    lower = {}
    for name in OURS:
        rule = LearnedOptimizer([torch.zeros(1)], name).rule
        moved = next((float(row[5]) for row in rows if row[1] == name), 0.0)
        lower[name] = floors(rule, moved, machine)
        rows += [(f"floor of {name}", kind, "", f"{each:.2f}", "", "", "") for kind, each in lower[name].items()]
    bars = judge([row for row in rows if row[0] in SHAPES])
    for title, (ratio, allowed) in bars.items():
        print(f"{'kept' if ratio <= allowed else 'MISSED'}: {title}: {ratio:.3f}, at most {allowed:.3f}")
    print(f"load average before {load_before:.2f}, after {os.getloadavg()[0]:.2f}")
    header = "case candidate parameters nanoseconds_per_parameter ratio bytes_moved_per_parameter copy_fraction"
    details = {
        "load_before": load_before,
        "rounds": options.rounds,
        "machine_a_second": machine._asdict(),
        "floors_nanoseconds": lower,
        "bars": {title: {"ratio": ratio, "at_most": allowed} for title, (ratio, allowed) in bars.items()},
    }
    save_rows(options.output, "step_time", [tuple(header.split()), *rows], details)
    return 0 if all(ratio <= allowed for ratio, allowed in bars.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
