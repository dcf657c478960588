"""Everything that can only be seen on a GPU, in one command and under eight minutes.

    make gpu-check        (in an environment of your own, with the extra dev: python -m benchmarks.speed.gpu_check)

Sections: the tests that need a GPU (kernels against float64, optimizer contract); compute-sanitizer, if installed; the
device's copy bandwidth; time of a step beside torch.optim.Adam, and the fraction of that bandwidth; meta-training by
the training kernels and without them. A section that fails is reported, and the others go on. Writes results/gpu/*.csv,
gpu_check.json (provenance, failures) and gpu_check.png. Exit status: 0, 1 if a section failed, 2 without a GPU. Not yet
run on a GPU.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import ROOT
from benchmarks.speed.gpu_cases import CASES, OPTIMIZERS, Shape, bytes_that_must_move
from learned_optim import LearnedOptimizer
from learned_optim.files import csv_text, write_atomically
from learned_optim.meta_train.common.provenance import provenance
from learned_optim.meta_train.common.seeds import numpy_generator
from learned_optim.meta_train.estimators import truncated_bptt
from learned_optim.meta_train.inner import training_kernels
from learned_optim.meta_train.inner.unroll import start
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import QuadraticFamily
from learned_optim.rules import LSTML2L, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

RESULTS = ALL_RESULTS / "gpu"
TIME_LIMIT = 460  # seconds for all sections; what no time is left for is reported as such
TESTS = (
    "tests/kernels/test_kernels.py",
    "tests/kernels/test_training_kernels.py",
    "tests/optimizer/test_contract_compiled.py",
)
Row = tuple[str, ...]


class Timing(NamedTuple):
    """Milliseconds of a call."""

    median: float
    low: float
    """First decile."""
    high: float
    """Last decile."""


class Check:
    """Sections, what they found and what went wrong.

    Args:
        device: device of all that is measured; a CPU only in tests.
        output: folder of the results.
        seconds: time for all sections.
    """

    def __init__(self, device: torch.device, output: Path, seconds: float = TIME_LIMIT) -> None:
        self.device, self.output = device, output
        self.deadline = time.monotonic() + seconds
        self.findings: dict[str, Any] = {}
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.step_times: list[Row] = []
        self.bandwidth: float | None = None
        """Bytes a second that a copy reads and writes."""

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run(self, name: str, section: Callable[[], Any]) -> None:
        """Run a section, keep what it finds, and report its failure instead of raising it."""
        began = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            if self.left() <= 0:
                raise TimeoutError("no time was left for this section")
            self.findings[name] = section()
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        self.seconds[name] = round(time.monotonic() - began, 1)
        outcome = "failed: " + self.failures[name] if name in self.failures else str(self.findings[name])
        print(f"{name}: {outcome} ({self.seconds[name]} s)\n", flush=True)

    def timed(self, call: Callable[[], object], seconds: float = 0.5, most: int = 50) -> Timing:
        """Times of a call, after two that warm up: one by one, between events of the device; the host's part counts."""
        cuda = self.device.type == "cuda"
        for _ in range(2):
            call()
        self.synchronize()
        times: list[float] = []
        until = time.monotonic() + seconds
        while len(times) < 3 or (len(times) < most and time.monotonic() < until):
            if cuda:
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                call()
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last))
            else:
                began = time.perf_counter()
                call()
                self.synchronize()
                times.append(1e3 * (time.perf_counter() - began))
        times.sort()
        return Timing(statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10])

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def release(self) -> None:
        """Give cached memory back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Sections

    def tests(self, files: Sequence[str] = TESTS) -> dict[str, Any]:
        """The tests that need a GPU."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda or gpu", *files]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(240, self.left()))
        write_atomically(self.output / "tests.log", run.stdout + run.stderr)
        counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", run.stdout)}
        if run.returncode != 0:
            raise RuntimeError(f"pytest ended with {run.returncode}, {counts}; see {self.output / 'tests.log'}")
        return counts

    def sanitizer(self) -> str:
        """A few steps under compute-sanitizer's memcheck."""
        tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if tool is None:
            return "compute-sanitizer is not installed: left out"
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
        command += ["-m", "benchmarks.speed.gpu_check"]
        # With PyTorch's caching allocator, an access outside of a tensor may still lie inside its pool.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = subprocess.run(
            [*command, "--steps-only"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=min(120, self.left()),
        )
        write_atomically(self.output / "sanitizer.log", run.stdout + run.stderr)
        if run.returncode != 0:
            raise RuntimeError(f"memcheck ended with {run.returncode}; see {self.output / 'sanitizer.log'}")
        return "no errors"

    def copy_bandwidth(self, numbers: int = 1 << 28) -> float:
        """Bytes a second read and written by a copy of 1 GiB, by its fastest decile: what a step can reach at best."""
        source = torch.zeros(numbers, device=self.device)
        target = torch.empty_like(source)
        timing = self.timed(lambda: target.copy_(source))
        self.bandwidth = 2 * source.nbytes / (1e-3 * timing.low)
        return self.bandwidth

    def step_time(
        self,
        cases: Mapping[str, list[Shape]] = CASES,
        optimizers: Mapping[str, Callable[[list[Tensor]], Optimizer]] = OPTIMIZERS,
    ) -> str:
        """Times of all optimizers in all cases; a pair that fails does not keep the others from being measured."""
        problems = []
        for case, shapes in cases.items():
            reference: float | None = None
            for name, make in optimizers.items():
                if self.left() < 30:
                    problems.append(f"{case}, {name}: no time left")
                    continue
                try:
                    timing, moved, peak = self._one_step_time(shapes, make)
                except Exception as error:
                    problems.append(f"{case}, {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                    self.release()
                    continue
                reference = timing.median if reference is None and name == "Adam(fused)" else reference
                self._note_step_time(case, shapes, name, timing, moved, peak, reference)
        header = (
            "case optimizer parameters milliseconds low high bytes_moved copy_fraction adam_fused_ratio temporary_bytes"
        )
        self._write("step_time.csv", [tuple(header.split()), *self.step_times])
        # Out of memory is an answer, where a rule's state is 40 times Adam's.
        fatal = [problem for problem in problems if "OutOfMemoryError" not in problem]
        if fatal:
            raise RuntimeError("; ".join(problems))
        return "; ".join(problems) or f"{len(self.step_times)} rows"

    def _one_step_time(
        self, shapes: Sequence[Shape], make: Callable[[list[Tensor]], Optimizer]
    ) -> tuple[Timing, int, int]:
        """Timing, bytes that must move, and bytes that a step borrows."""
        self.release()
        parameters = [torch.randn(shape, device=self.device, requires_grad=True) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = make(parameters)
        optimizer.step()
        peak = 0
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            optimizer.step()
            peak = torch.cuda.max_memory_allocated(self.device) - before
        moved = bytes_that_must_move(optimizer)
        return self.timed(optimizer.step), moved, peak

    def _note_step_time(
        self,
        case: str,
        shapes: Sequence[Shape],
        name: str,
        timing: Timing,
        moved: int,
        peak: int,
        reference: float | None,
    ) -> None:
        fraction = "" if self.bandwidth is None else f"{moved / (1e-3 * timing.median) / self.bandwidth:.3f}"
        ratio = "" if reference is None else f"{timing.median / reference:.2f}"
        count = sum(torch.Size(shape).numel() for shape in shapes)
        times = (f"{value:.4f}" for value in timing)
        self.step_times.append((case, name, str(count), *times, str(moved), fraction, ratio, str(peak)))
        print("  ".join(self.step_times[-1]), flush=True)

    def meta_training(self, tasks: Sequence[int] = (16, 256), steps: int = 20) -> str:
        """Windows a second of truncated backpropagation on quadratics, by the training kernels and without them."""
        header = "rule tasks execution milliseconds_per_window windows_per_second inner_steps_per_second"
        rows: list[Row] = [tuple(header.split())]
        rules: tuple[type[UpdateRule], ...] = (ScheduleFreeLSTM, ScaleFreeLSTM, LSTML2L)
        for rule_type, count, execution in itertools.product(rules, tasks, ("plain", "fused")):
            rule = rule_type().to(self.device)
            generator = torch.Generator().manual_seed(0)  # all draws are made on the CPU
            task = QuadraticFamily().sample(numpy_generator(0, "task"), "train")
            together = VectorizedTask(task, count, seed=0, device=self.device)
            state = start(rule, together, generator)
            call = functools.partial(truncated_bptt, rule, together, state, steps, generator)
            with mock.patch.object(
                training_kernels, "uses_training_kernels", lambda _, execution=execution: execution == "fused"
            ):
                timing = self.timed(call, seconds=3.0, most=10)
            windows = 1e3 / timing.median
            rates = f"{windows:.1f}", f"{windows * count * steps:.0f}"
            rows.append((rule.name, str(count), execution, f"{timing.median:.2f}", *rates))
        self._write("meta_training.csv", rows)
        return "; ".join(f"{row[0]}, {row[1]} tasks, {row[2]}: {row[4]} windows/s" for row in rows[1:])

    def figure(self) -> str:
        """Fraction of the copy bandwidth, and time beside Adam's, over the number of parameters."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for column, axis, label in ((7, axes[0], "fraction of copy bandwidth"), (8, axes[1], "time / Adam(fused)")):
            for name in OPTIMIZERS:
                points = [
                    (int(row[2]), float(row[column]))
                    for row in self.step_times
                    if row[1] == name and row[0].startswith("one tensor") and row[column]
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.set(xscale="log", xlabel="parameters", ylabel=label)
            axis.grid(alpha=0.3)
        axes[0].axhline(0.8, color="grey", linestyle=":")
        axes[0].annotate("aim", (1, 0.8), (-2, 2), ("axes fraction", "data"), "offset points", ha="right")
        axes[1].set_yscale("log")
        if axes[1].lines:
            axes[1].legend(fontsize="small")
        figure.suptitle(f"Optimizer step, float32, {device_name(self.device)}")
        self.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.output / "gpu_check.png", dpi=120)
        plt.close(figure)
        return "gpu_check.png"

    def finish(self) -> int:
        """Write what was found; the exit status."""
        details = {
            **provenance(),
            **device_provenance(self.device),
            "seconds": self.seconds,
            "findings": self.findings,
            "failures": self.failures,
        }
        write_atomically(self.output / "gpu_check.json", json.dumps(details, indent=2, default=str) + "\n")
        print(f"results: {self.output}")
        for name, failure in self.failures.items():
            print(f"FAILED {name}: {failure}")
        return 1 if self.failures else 0

    def _write(self, name: str, rows: Sequence[Row]) -> None:
        write_atomically(self.output / name, csv_text(rows))


def device_name(device: torch.device) -> str:
    """The GPU's name."""
    return str(torch.get_device_module(device).get_device_name(device)) if device.type != "cpu" else "CPU"


def device_provenance(device: torch.device) -> dict[str, Any]:
    """The GPU, its driver and the versions that kernels depend on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    found: dict[str, Any] = {"device": device_name(device), "triton": triton, "cuda": torch.version.cuda}
    found["hip"] = torch.version.hip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit,utilization.gpu"
        run = subprocess.run([tool, f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, timeout=30)
        found["nvidia_smi"] = run.stdout.strip().splitlines()
    return found


def a_few_steps(device: torch.device, sizes: Sequence[int] = (1, 63, 65, 1025)) -> None:
    """Fused steps of all rules with a kernel, dtypes mixed: what a memory checker looks at."""
    rules: tuple[type[UpdateRule], ...] = (ScheduleFreeLSTM, ScaleFreeLSTM, LSTML2L)
    for rule in rules:
        parameters = [
            torch.randn(size, device=device).to(dtype).requires_grad_()
            for size in sizes
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ]
        optimizer = LearnedOptimizer(parameters, rule(), fused=True, weight_decay=1e-4)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        assert all(parameter.isfinite().all() for parameter in parameters)


def find_gpu() -> torch.device:
    """The current GPU; ends the program where there is none."""
    if not torch.accelerator.is_available() or torch.accelerator.current_accelerator() is None:
        print(f"gpu-check needs a GPU that torch can use; torch {torch.__version__} sees none", file=sys.stderr)
        raise SystemExit(2)
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # for the type checker
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sections; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--steps-only", action="store_true", help="take a few fused steps and stop")
    options = parser.parse_args(arguments)
    device = find_gpu()
    if options.steps_only:
        a_few_steps(device)
        return 0
    check = Check(device, options.output)
    check.run("tests", check.tests)
    check.run("sanitizer", check.sanitizer)
    check.run("copy_bandwidth", check.copy_bandwidth)
    check.run("step_time", check.step_time)
    check.run("meta_training", check.meta_training)
    check.run("figure", check.figure)
    return check.finish()


if __name__ == "__main__":
    sys.exit(main())
