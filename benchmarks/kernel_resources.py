"""Registers, shared memory, spills and instructions of the fused kernels, compiled for GPUs that need not be there.

    python -m benchmarks.kernel_resources

Writes kernels/resources.csv in some six minutes; tests/test_kernels.py makes the table again and
compares. With --sizes it tries other numbers of coordinates a program instead, and prints what they take.
"""

import argparse
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from learned_optim.files import csv_text, write_atomically
from learned_optim.fused import plan_of, training_rule
from learned_optim.kernels import launch
from learned_optim.kernels.ahead_of_time import Resources, compile_for, compile_training
from learned_optim.rules import LSTML2L, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

TABLE = Path(__file__).parents[1] / "kernels" / "resources.csv"
COMPUTE_CAPABILITIES = (80, 90)
CASES: dict[str, tuple[Callable[[], UpdateRule], torch.dtype, torch.dtype]] = {
    "schedule-free-lstm": (ScheduleFreeLSTM, torch.float32, torch.bfloat16),
    "schedule-free-lstm, bfloat16 parameters": (ScheduleFreeLSTM, torch.bfloat16, torch.bfloat16),
    "schedule-free-lstm, 32 units": (functools.partial(ScheduleFreeLSTM, 32), torch.float32, torch.bfloat16),
    "scale-free-lstm": (ScaleFreeLSTM, torch.float32, torch.bfloat16),
    "scale-free-lstm, bfloat16 parameters": (ScaleFreeLSTM, torch.bfloat16, torch.bfloat16),
    "scale-free-lstm, 32 units": (functools.partial(ScaleFreeLSTM, 32), torch.float32, torch.bfloat16),
    "lstm-l2l": (LSTML2L, torch.float32, torch.float32),
    "lstm-l2l, 2 x 32 units": (functools.partial(LSTML2L, 32), torch.float32, torch.float32),
}
TRAINING = tuple(name for name in CASES if "bfloat16" not in name)
"""Cases whose training kernels are compiled too; these are float32."""
HEADER = ("kernel", "compute_capability", "triton", *launch.Sizes._fields, *Resources._fields)


def rows(
    names: Sequence[str] = tuple(CASES), capabilities: Sequence[int] = COMPUTE_CAPABILITIES
) -> Iterator[tuple[str, ...]]:
    """One row for each kernel and compute capability, as text."""
    version = importlib.metadata.version("triton")
    for name in names:
        build, parameter, recurrent = CASES[name]
        plan = plan_of(build())
        sizes = launch.sizes(plan.architecture, int(plan.constants["HIDDEN"]))  # type: ignore[arg-type]
        for capability in capabilities:
            resources = compile_for(plan, parameter, recurrent, compute_capability=capability)
            yield name, str(capability), version, *map(str, sizes), *map(str, resources)
    for name in filter(TRAINING.__contains__, names):
        rule = training_rule(CASES[name][0]())[0]
        for capability in capabilities:
            for kernel, (sizes, resources) in compile_training(rule, compute_capability=capability).items():
                yield f"{name}: training, {kernel}", str(capability), version, *map(str, sizes), *map(str, resources)


def other_sizes() -> Iterator[tuple[str, ...]]:
    """Like :func:`rows`, for other numbers of coordinates and warps, on the newest GPU only."""
    version = importlib.metadata.version("triton")
    for name, (build, parameter, recurrent) in CASES.items():
        plan = plan_of(build())
        units = launch.sizes(plan.architecture, int(plan.constants["HIDDEN"])).units  # type: ignore[arg-type]
        for block in (128, 256, 512):
            sizes = launch.Sizes(block, units)
            resources = compile_for(
                plan, parameter, recurrent, compute_capability=COMPUTE_CAPABILITIES[-1], sizes=sizes
            )
            yield name, str(COMPUTE_CAPABILITIES[-1]), version, *map(str, sizes), *map(str, resources)


def main() -> None:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true", help="print other sizes instead of writing the table")
    if parser.parse_args().sizes:
        for row in other_sizes():
            print(", ".join(row), flush=True)
        return
    text = csv_text([HEADER, *rows()])
    write_atomically(TABLE, text)
    print(text)


if __name__ == "__main__":
    main()
