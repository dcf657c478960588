"""``make gpu-check`` on a CPU with tiny sizes, so that a GPU is not the first machine to run its code."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed import gpu_cases, gpu_check
from learned_optim import LearnedOptimizer
from learned_optim.rules import ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def check(tmp_path: Path) -> gpu_check.Check:
    return gpu_check.Check(CPU, tmp_path, seconds=300)


@pytest.mark.parametrize(
    ("shapes", "tensors", "parameters"),
    [
        pytest.param(gpu_cases.resnet50(), 161, 25_557_032, id="resnet50"),
        pytest.param(gpu_cases.vit_b_16(), 152, 86_567_656, id="vit-b-16"),
        pytest.param(gpu_cases.gpt2(), 148, 124_439_808, id="gpt2"),
    ],
)
def test_parameter_list_is_that_of_the_model(shapes: list[tuple[int, ...]], tensors: int, parameters: int) -> None:
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters


@pytest.mark.slow
@needs_triton
def test_all_sections_run_and_write_their_results(
    check: gpu_check.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(check, "timed", lambda call, **_: (call(), gpu_check.Timing(2.0, 1.0, 3.0))[1])
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "test_small.py").write_text("def test_cuda(): pass\ndef test_other(): assert False\n")
    cases: dict[str, list[gpu_cases.Shape]] = {"one tensor of 3": [(3,)], "several": [(2, 2), (1,)]}
    check.run("tests", lambda: check.tests(["test_small.py"]))
    check.run("sanitizer", check.sanitizer)
    check.run("copy_bandwidth", lambda: check.copy_bandwidth(64))
    check.run("step_time", lambda: check.step_time(cases))
    check.run("meta_training", lambda: check.meta_training(tasks=(2,), steps=2))
    check.run("figure", check.figure)
    assert check.finish() == 0, check.failures
    assert check.findings["tests"] == {"passed": 1}
    assert check.findings["copy_bandwidth"] == 2 * 64 * 4 / 1e-3
    with (tmp_path / "step_time.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cases) * len(gpu_cases.OPTIMIZERS)
    assert (rows[0]["bytes_moved"], rows[0]["adam_fused_ratio"]) == (str(3 * 28), "1.00")
    assert (tmp_path / "gpu_check.png").stat().st_size > 1000
    with (tmp_path / "meta_training.csv").open() as file:
        assert [row["execution"] for row in csv.DictReader(file)] == ["plain", "fused"] * 3
    details = json.loads((tmp_path / "gpu_check.json").read_text())
    assert details["failures"] == {}
    assert details["device"] == "CPU"


def test_failing_section_lets_the_others_run(check: gpu_check.Check, tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("broken")

    check.run("first", fail)
    check.run("second", lambda: 1)
    assert check.finish() == 1
    details = json.loads((tmp_path / "gpu_check.json").read_text())
    assert details["failures"] == {"first": "ValueError: broken"}
    assert details["findings"] == {"second": 1}


def test_failing_optimizer_keeps_the_other_rows(check: gpu_check.Check, tmp_path: Path) -> None:
    def refuse(_: object) -> torch.optim.Optimizer:
        raise RuntimeError("no kernel")

    optimizers = {"broken": refuse, "Adam(foreach)": gpu_cases.OPTIMIZERS["Adam(foreach)"]}
    check.run("step_time", lambda: check.step_time({"one": [(2,)]}, optimizers))
    assert "one, broken: RuntimeError: no kernel" in check.failures["step_time"]
    assert "Adam(foreach)" in (tmp_path / "step_time.csv").read_text()


@pytest.mark.slow
def test_failed_test_is_reported(check: gpu_check.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "test_small.py").write_text("def test_cuda(): assert False\n")
    check.run("tests", lambda: check.tests(["test_small.py"]))
    assert "{'failed': 1}" in check.failures["tests"]


def test_section_after_the_deadline_is_reported(tmp_path: Path) -> None:
    check = gpu_check.Check(CPU, tmp_path, seconds=0)
    check.run("late", lambda: 1)
    assert "no time was left" in check.failures["late"]


def test_call_is_timed(check: gpu_check.Check) -> None:
    calls: list[int] = []
    timing = check.timed(lambda: calls.append(1), seconds=0, most=50)
    assert len(calls) == 5  # two to warm up, three at least
    assert 0 <= timing.low <= timing.median <= timing.high


@pytest.mark.parametrize(("rule", "state"), [(ScaleFreeLSTM, 48), (ScheduleFreeLSTM, 24)])
def test_bytes_that_must_move_are_counted_once_each(rule: type[UpdateRule], state: int) -> None:
    parameter = torch.zeros(10, requires_grad=True)
    parameter.grad = torch.ones(10)
    adam, learned = torch.optim.Adam([parameter]), LearnedOptimizer([parameter], rule())
    adam.step()
    learned.step()
    assert gpu_cases.bytes_that_must_move(adam) == 28 * 10
    assert gpu_cases.bytes_that_must_move(learned) == (12 + 2 * state) * 10


@pytest.mark.slow
@needs_triton
def test_steps_for_the_memory_checker_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu_check.a_few_steps(CPU, sizes=(3,))


def test_missing_gpu_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main([])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
