"""Registers, shared memory, spills and instructions of the fused kernels, compiled for GPUs that need not be there.

    python -m benchmarks.speed.kernel_resources

Writes kernels/gpu/resources.csv in some six minutes; tests/kernels/test_kernels.py makes the table again and
compares. With --sizes it tries other numbers of coordinates a program instead, and prints what they take.
"""

import argparse
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.results import ROOT
from learned_optim.files import csv_text, write_atomically
from learned_optim.kernels.gpu.ahead_of_time import Resources, compile_for, compile_training
from learned_optim.kernels.gpu.training import TRAINING_BLOCK
from learned_optim.kernels.sources.registry import registered
from learned_optim.rules import LSTML2L, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule
from learned_optim.step.particles import training_step
from learned_optim.step.programs import plan_of

TABLE = ROOT / "kernels" / "gpu" / "resources.csv"
COMPUTE_CAPABILITIES = (80, 90)
CASES: dict[str, tuple[Callable[[], UpdateRule], torch.dtype, torch.dtype]] = {
    "schedule-free-lstm": (ScheduleFreeLSTM, torch.float32, torch.bfloat16),
    "schedule-free-lstm, bfloat16 parameters": (ScheduleFreeLSTM, torch.bfloat16, torch.bfloat16),
    "schedule-free-lstm, no units": (functools.partial(ScheduleFreeLSTM, 0), torch.float32, torch.float32),
    "schedule-free-lstm, 32 units": (functools.partial(ScheduleFreeLSTM, 32), torch.float32, torch.bfloat16),
    "scale-free-lstm": (ScaleFreeLSTM, torch.float32, torch.bfloat16),
    "scale-free-lstm, bfloat16 parameters": (ScaleFreeLSTM, torch.bfloat16, torch.bfloat16),
    "scale-free-lstm, 32 units": (functools.partial(ScaleFreeLSTM, 32), torch.float32, torch.bfloat16),
    "lstm-l2l": (LSTML2L, torch.float32, torch.float32),
    "lstm-l2l, 2 x 32 units": (functools.partial(LSTML2L, 32), torch.float32, torch.float32),
}
TRAINING = ("schedule-free-lstm", "scale-free-lstm", "lstm-l2l")
"""Cases whose training kernels are compiled too."""
HEADER = ("kernel", "compute_capability", "triton", "block", *Resources._fields)


def rows(
    names: Sequence[str] = tuple(CASES), capabilities: Sequence[int] = COMPUTE_CAPABILITIES
) -> Iterator[tuple[str, ...]]:
    """One row for each kernel and compute capability, as text."""
    version = importlib.metadata.version("triton")
    for name in names:
        for capability in capabilities:
            yield name, str(capability), version, *map(str, step_resources(name, capability))
    for name in filter(TRAINING.__contains__, names):
        step = training_step(CASES[name][0]())
        for capability in capabilities:
            for kernel, resources in compile_training(step, compute_capability=capability).items():
                yield f"{name}: training, {kernel}", str(capability), version, str(TRAINING_BLOCK), *map(str, resources)


def step_resources(name: str, capability: int, block: int | None = None) -> tuple[int, ...]:
    """Block and resources of the step of a case."""
    build, parameter, recurrent = CASES[name]
    rule = build()
    plan = plan_of(rule)
    dtypes = [recurrent if entry in rule.recurrent_state else torch.float32 for entry in plan.entries]
    block = block or registered(plan.key).block
    scaled = rule.uses_tensor_scale
    return block, *compile_for(plan.key, parameter, dtypes, compute_capability=capability, scaled=scaled, block=block)


def other_sizes() -> Iterator[tuple[str, ...]]:
    """Rows of the same columns as :func:`rows`, for other numbers of coordinates and warps, on the newest GPU only."""
    version = importlib.metadata.version("triton")
    capability = COMPUTE_CAPABILITIES[-1]
    for name in CASES:
        for block in (128, 256, 512):
            yield name, str(capability), version, *map(str, step_resources(name, capability, block))


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
