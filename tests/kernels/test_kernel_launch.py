"""Launches of the fused step: tables of addresses, the choice of a path, arguments, and resources of machine code."""

import csv
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed import kernel_resources
from helpers.rules import Build, each, normal, randomised
from helpers.slots import FIRST, PLAIN, as_slots, clones
from helpers.triton import HAS_TRITON, ONE_UNIT, StandInDriver
from learned_optim import LearnedOptimizer
from learned_optim.kernels import launch
from learned_optim.kernels.gpu import launch as gpu_launch
from learned_optim.kernels.gpu import modules, tables
from learned_optim.kernels.gpu.modules import step_module
from learned_optim.kernels.slots import StepSettings
from learned_optim.rules import (
    LSTML2L,
    RuleState,
    ScaleFreeLSTM,
    ScheduleFreeLSTM,
)
from learned_optim.step import fused, programs
from learned_optim.step.plain import apply_per_tensor

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (pip install learned-optim[gpu])")


class TestTables:
    def test_table_made_in_a_graph_equals_the_uploaded_one(self) -> None:
        rows = (5, 0, 2**47 + 8, 3, 0, 7, 300, 1, 2**46, 4, 0, 9)
        cpu = torch.device("cpu")
        uploaded, of_programs = tables.tables(rows, 2, 4, cpu)
        assert uploaded.tolist() == list(rows)
        assert of_programs.tolist() == [0, 1, 1, 1]
        assert torch.equal(tables.in_graph(rows, cpu), uploaded)

    def test_tables_are_cached_by_address_up_to_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables, "TABLES", 2)
        tables._cache.clear()
        cpu = torch.device("cpu")
        first, _ = tables.tables((1, 0, 10), 1, 1, cpu)
        assert tables.tables((1, 0, 10), 1, 1, cpu)[0] is first
        other, _ = tables.tables((1, 0, 11), 1, 1, cpu)
        assert other.tolist() == [1, 0, 11]
        tables.tables((1, 0, 12), 1, 1, cpu)
        assert len(tables._cache) == 2

    def test_gradient_at_a_new_address_is_read(self, interpreted: None) -> None:
        rule = randomised(ScaleFreeLSTM()).float()
        (slot,) = as_slots(rule, [normal(10)], torch.float32)
        kept, expected = [slot.grad], clones([slot])
        plan = programs.plan_of(rule)
        for index in range(3):
            kept.append(normal(10, seed=index).float())  # keeps the old one alive, so that its address stays taken
            fused.apply_fused(plan, [slot._replace(grad=kept[-1])], PLAIN)
            apply_per_tensor(rule, [expected[0]._replace(grad=kept[-1])], PLAIN)
        torch.testing.assert_close(slot.parameter, expected[0].parameter, rtol=0, atol=1e-6)  # three steps of roundings


class TestDispatch:
    def test_fused_optimizer_matches_the_plain_one(self, on_cpu: None) -> None:
        results = []
        for choice in (False, True):
            parameters = [normal(3, 4).float().requires_grad_(), normal(5).bfloat16().requires_grad_()]
            optimizer = LearnedOptimizer(parameters, weight_decay=0.01, fused=choice, state_dtype=torch.float32)
            for count in range(3):
                for index, parameter in enumerate(parameters):
                    parameter.grad = normal(*parameter.shape, seed=10 * count + index).to(parameter.dtype)
                optimizer.step()
            results.append([parameter.detach() for parameter in parameters])
        for one, other in zip(*results, strict=True):
            # Roundings of three steps; the interpreter cuts bfloat16 off, three times one spacing of values below 4.
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if one.dtype == torch.float32 else 3 * 2**-6)

    @pytest.mark.parametrize("choice", [None, True])
    def test_interpreter_runs_only_with_fused_true(
        self, choice: bool | None, interpreted: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        monkeypatch.setattr("learned_optim.step.dispatch.apply_fused_to_columns", lambda *_: calls.append(1))
        parameter = normal(3).float().requires_grad_()
        parameter.grad = parameter.detach().clone()
        LearnedOptimizer([parameter], fused=choice).step()
        assert bool(calls) == bool(choice)

    def test_missing_kernel_is_explained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Mean(LSTML2L):
            def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
                return super().forward(grad - grad.mean(), state, step)

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        host, gpu = torch.device("cpu"), torch.device("cuda")
        assert programs.unsupported_reason(ScaleFreeLSTM(), host, torch.bfloat16) is None
        reason = str(programs.unsupported_reason(Mean(), host, torch.float32))
        assert "no fused kernel can be made of the rule 'lstm-l2l' (Mean): " in reason
        assert "(in `return super().forward(grad - grad.mean(), state, step)`) mixes coordinates" in reason
        assert "torch.float64" in str(programs.unsupported_reason(ScaleFreeLSTM(), host, torch.float64))
        assert "16,384 multiply-adds a coordinate; the rule 'lstm-l2l' has 30,450" in str(
            programs.unsupported_reason(LSTML2L(50), host, torch.float32)
        )
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert "triton is not installed" in str(programs.unsupported_reason(LSTML2L(), gpu, torch.float32))
        assert "need a GPU or a CPU" in str(programs.unsupported_reason(LSTML2L(), torch.device("mps"), torch.float32))

    def test_unwritable_cache_falls_back_to_the_plain_step(
        self, interpreted: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(name: str, text: str) -> Path:
            raise OSError("No space left on device")

        monkeypatch.setattr(modules, "keep_text", full)
        monkeypatch.setattr(programs, "is_faster_fused", lambda device: True)
        rule = randomised(ScheduleFreeLSTM(7)).float()  # which no other test has made a module of
        stepped = []
        for choice in (None, False, True):
            parameter = normal(5).float().requires_grad_()
            parameter.grad = normal(5, seed=1).float()
            optimizer = LearnedOptimizer([parameter], rule, fused=choice)
            if choice:
                with pytest.raises(RuntimeError, match="in Triton cannot be kept: No space left"):
                    optimizer.step()
            elif choice is None:
                with pytest.warns(UserWarning, match="a slower one instead: .*No space left"):
                    optimizer.step()
            else:
                optimizer.step()
            stepped.append(parameter.detach())
        assert torch.equal(stepped[0], stepped[1])
        assert torch.equal(stepped[2], normal(5).float())

    def test_untraceable_rule_is_stepped_by_its_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Peculiar(LSTML2L):
            def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
                if grad.numel() == 3:  # as in the trace
                    raise OSError("out of ink")
                return super().forward(grad, state, step) if float(step) < 2 else (-grad, state)

        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        parameter = normal(5).float().requires_grad_()
        parameter.grad = torch.ones(5)
        with pytest.raises(RuntimeError, match="fails in a trace: OSError: out of ink; use fused=None"):
            LearnedOptimizer([parameter], Peculiar(2), fused=True)
        optimizer = LearnedOptimizer([parameter], Peculiar(2))
        optimizer.step()
        before = parameter.detach().clone()
        optimizer.step()
        assert torch.equal(parameter, before - 1)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # by torch, in its own files
    def test_compiled_step_equals_the_eager_one(self, on_cpu: None) -> None:
        def trained(compiled: bool) -> Tensor:
            parameter = normal(6).float().requires_grad_()
            optimizer = LearnedOptimizer([parameter], fused=True)
            step: Callable[[], Any] = optimizer.step
            if compiled:
                step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
            for count in range(2):
                parameter.grad = normal(6, seed=count).float()
                step()
            return parameter.detach()

        assert torch.equal(trained(True), trained(False))

    def test_step_counts_as_an_inplace_change_for_autograd(self, on_cpu: None) -> None:
        parameter = normal(3).float().requires_grad_()
        loss = parameter.square().sum()
        parameter.grad = normal(3).float()
        LearnedOptimizer([parameter], fused=True).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.slow
    def test_import_of_the_optimizer_does_not_load_triton(self) -> None:
        script = "import sys, learned_optim.step.fused; sys.exit('triton' in sys.modules)"
        subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
@each(ONE_UNIT)
def test_launch_arguments_compile(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter does not look at types, specialisation and options of a launch; this does all but launch.
    from triton.runtime import driver

    compiled: list[Any] = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in (launch, programs):
        monkeypatch.setattr(module, "uses_c", lambda device: False)

    class Compiling:
        def __init__(self, kernel: Any) -> None:
            self.step = self
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda **arguments: compiled.append(self.kernel.warmup(grid=grid, **arguments))

    monkeypatch.setattr(gpu_launch, "step_module", lambda *which: Compiling(step_module(*which).step))
    rule = randomised(build()).float()
    every = StepSettings(torch.tensor(0.5), 0.1, False, True, torch.tensor(2.0), torch.tensor(0.0))
    monkeypatch.setattr(driver, "_active", StandInDriver())
    for settings, count in ((PLAIN, 1), (every, 2)):
        slots = as_slots(rule, [normal(5), normal(0), normal(3)], torch.float32, torch.bfloat16)
        slots = [slot._replace(step=torch.tensor(1.0) if count > 1 else FIRST) for slot in slots]
        fused.apply_fused(programs.plan_of(rule), slots, settings)
        assert len(compiled) == count
    assert all("cubin" in kernel.asm for kernel in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("capability", kernel_resources.COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("name", kernel_resources.CASES)
def test_machine_code_has_no_spills_and_matches_the_record(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with kernel_resources.TABLE.open() as file:
        recorded = {(row["kernel"], row["compute_capability"]): row for row in csv.DictReader(file)}
    for values in kernel_resources.rows([name], [capability]):
        row = dict(zip(kernel_resources.HEADER, values, strict=True))
        assert row["spill_stores"] == row["spill_loads"] == "0", row
        before = recorded[row["kernel"], str(capability)]
        if before["triton"] == row["triton"]:  # another version brings another assembler
            assert row == before, "run: python -m benchmarks.speed.kernel_resources"
