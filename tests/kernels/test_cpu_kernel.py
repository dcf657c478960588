"""The fused step in C: fallbacks where it cannot be built or loaded, threads, half precision, particles.

Its values are those of test_kernels.py; compilers are tried in test_compiler.py, what is kept in test_kernel_cache.py.
"""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.rules import Build, each, normal, randomised
from helpers.slots import PLAIN, as_slots, clones
from learned_optim import LearnedOptimizer
from learned_optim.kernels.cache import CompilationError
from learned_optim.kernels.cpu import kernel as cpu_kernel
from learned_optim.kernels.cpu.compiler import Compiler
from learned_optim.meta_train.inner.particles import ParticleRule, flat_meta_parameters
from learned_optim.meta_train.inner.training_kernels import in_place_step
from learned_optim.rules import LSTML2L, MLP, Conditions, RuleState, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule
from learned_optim.step import fused, programs

pytestmark = pytest.mark.skipif(cpu_kernel.compiler() is None, reason="needs a C compiler")

RULES: dict[str, Build] = {
    "schedule-free-lstm": ScheduleFreeLSTM,
    "scale-free-lstm": ScaleFreeLSTM,
    "lstm-l2l": lambda: LSTML2L(3),
}


@contextmanager
def as_in_a_new_process(cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """No library is loaded yet, no failure known; libraries are kept in this folder."""
    memories = cpu_kernel.compiler, cpu_kernel._kernel
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr("tempfile.tempdir", str(cache))
        monkeypatch.setattr(cpu_kernel, "_warned", set())
        for memory in memories:
            memory.cache_clear()
        yield monkeypatch
    for memory in memories:
        memory.cache_clear()


@pytest.fixture
def compiled_anew(tmp_path: Path) -> Iterator[Path]:
    """The folder of compiled libraries, an empty one."""
    with as_in_a_new_process(tmp_path):
        yield tmp_path / "learned_optim" / "kernels"


@pytest.fixture(scope="module")
def libraries_of_a_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what :func:`stepped` compiles, to be copied."""
    cache = tmp_path_factory.mktemp("cache")
    with as_in_a_new_process(cache):
        stepped(fused=True)
    return cache / "learned_optim" / "kernels"


@pytest.fixture
def compiled_before(compiled_anew: Path, libraries_of_a_step: Path) -> Path:
    """The folder of compiled libraries, with that of a step."""
    shutil.copytree(libraries_of_a_step, compiled_anew)
    compiled_anew.chmod(0o700)
    return compiled_anew


def stepped(size: int = 5, **options: object) -> Tensor:
    parameter = normal(size).float().requires_grad_()
    parameter.grad = normal(size, seed=1).float()
    LearnedOptimizer([parameter], **options).step()  # type: ignore[arg-type]
    return parameter.detach()


def compiler_that_fails(folder: Path) -> str:
    """Its path; each call is noted in the file ``calls``."""
    script = folder / "broken-cc"
    script.write_text(f"#!/bin/sh\necho call >> '{folder}/calls'\necho 'out of ink' >&2\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def cannot_compile(*arguments: object) -> bytes:
    raise CompilationError("out of ink")


def test_cached_library_is_loaded_without_a_compiler(compiled_before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in compiled_before.iterdir()}
    assert sorted(path.suffix for path in before) == [".json", ".so"]
    monkeypatch.setattr(subprocess, "Popen", None)
    assert not torch.equal(stepped(fused=True), normal(5).float())
    assert {path: path.stat().st_mtime_ns for path in compiled_before.iterdir()} == before


def test_damaged_library_is_replaced_without_a_crash(compiled_before: Path, tmp_path: Path) -> None:
    (library,) = compiled_before.glob("*.so")
    whole = library.read_bytes()
    damages = {
        "cut": whole[: 16 << 10],
        "block of zeros": whole[:8192] + bytes(4096) + whole[12288:],
        "empty": b"",
    }
    (tmp_path / "whole").write_bytes(whole)
    for name, content in damages.items():
        folder = tmp_path / name / "learned_optim" / "kernels"
        shutil.copytree(compiled_before, folder)
        folder.chmod(0o700)
        (folder / library.name).write_bytes(content)
    script = f"""
import os, pathlib, torch
from learned_optim import LearnedOptimizer
from learned_optim.kernels.cpu import kernel as cpu_kernel
from learned_optim.kernels.cpu.compiler import Compiler
Compiler.shared_library = lambda *_: pathlib.Path("whole").read_bytes()  # takes a second
for name in {list(damages)}:
    os.environ["XDG_CACHE_HOME"] = os.path.abspath(name)
    cpu_kernel._kernel.cache_clear()
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    LearnedOptimizer([parameter], fused=True).step()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    for name in damages:
        assert (tmp_path / name / "learned_optim" / "kernels" / library.name).read_bytes() == whole


@pytest.mark.slow
def test_unloadable_library_falls_back_to_the_plain_step(compiled_anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(name: str, make: object) -> ctypes.CDLL:
        raise OSError("/home: invalid ELF header")

    monkeypatch.setattr(cpu_kernel, "load_library", damaged)
    with pytest.warns(UserWarning, match="a slower one instead: .* loaded: /home: invalid ELF header"):
        stepped()
    with pytest.raises(RuntimeError, match="invalid ELF header"):
        stepped(fused=True)


def test_library_without_the_step_function_falls_back_to_the_plain_step(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernel, "load_library", lambda name, make: ctypes.CDLL(None))
    with pytest.warns(UserWarning, match="a slower one instead: .*step"):
        stepped()


def test_missing_source_falls_back_to_the_plain_step(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_kernel, "SOURCE", tmp_path / "cpu.c")
    with pytest.warns(UserWarning, match=r"a slower one instead: .*cpu\.c"):
        stepped()


def test_failing_compiler_falls_back_with_one_warning_and_one_call(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", f"{compiler_that_fails(tmp_path)} --option")
    with pytest.warns(UserWarning, match="a slower one instead: .*broken-cc --option failed: out of ink") as warned:
        slower = stepped()
    assert len(warned) == 1
    assert torch.equal(slower, stepped(fused=False))
    assert torch.equal(slower, stepped())  # nor is there another warning, which would be an error
    stepped(rule=ScheduleFreeLSTM(hidden_size=3))
    with pytest.raises(RuntimeError, match="out of ink"):
        stepped(fused=True)
    assert (tmp_path / "calls").read_text() == "call\n"
    assert not list(compiled_anew.iterdir())


def test_optimizer_steps_after_its_warning_was_raised_as_an_error(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiler, "shared_library", cannot_compile)
    parameter = normal(5).float().requires_grad_()
    parameter.grad = normal(5, seed=1).float()
    optimizer = LearnedOptimizer([parameter])
    with pytest.raises(UserWarning, match="out of ink"):
        optimizer.step()
    assert torch.equal(parameter, normal(5).float())
    optimizer.step()
    assert torch.equal(parameter, stepped(fused=False))


@pytest.mark.parametrize("fused", [None, True])
def test_failed_compilation_during_training_falls_back_or_changes_nothing(
    fused: bool | None, compiled_before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = [normal(size).float().requires_grad_() for size in (5, 4)]
    optimizer = LearnedOptimizer(parameters, "specialised-mnist", fused=fused)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    state = optimizer.state[parameters[1]]
    state["hidden"] = state["hidden"].half()
    before = [parameter.detach().clone() for parameter in parameters]
    monkeypatch.setattr(Compiler, "shared_library", cannot_compile)
    if fused:
        with pytest.raises(RuntimeError, match="out of ink"):
            step()
        assert all(map(torch.equal, before, parameters))
        return
    with pytest.warns(UserWarning, match="a slower one instead: out of ink"):
        step()
    step()  # without a warning
    for parameter, old in zip(parameters, before, strict=True):
        assert (parameter < old).all()


def test_missing_compiler_is_an_error_only_with_fused_true(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert torch.equal(stepped(), stepped(fused=False))
    with pytest.raises(RuntimeError, match=r"no C compiler was found .*CC.*use fused=None"):
        stepped(fused=True)


def test_library_is_built_without_openmp_where_it_is_missing(
    compiled_before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernel, "THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = stepped(size=3 * cpu_kernel.TILE, fused=True)
    cpu_kernel._kernel.cache_clear()
    load = ctypes.CDLL

    def without_openmp(path: str) -> ctypes.CDLL:
        if b"GOMP_parallel" in Path(path).read_bytes():
            raise OSError("undefined symbol: GOMP_parallel")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", without_openmp)
    assert torch.equal(stepped(size=3 * cpu_kernel.TILE, fused=True), expected)
    assert len(list(compiled_before.glob("*.so"))) == 2


@each(RULES)
def test_step_is_bitwise_independent_of_the_thread_count(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu_kernel, "THREADED", 1)
    rule = randomised(build()).float()
    shapes = [
        normal(size, seed=size) for size in (3 * cpu_kernel.TILE + 5, 1, cpu_kernel.TILE, 40, 2 * cpu_kernel.TILE - 1)
    ]
    slots = as_slots(rule, shapes, torch.float32, torch.bfloat16)
    slots = [slot._replace(step=torch.tensor(float(2 + place % 2))) for place, slot in enumerate(slots)]
    results = []
    for threads in (1, 2, 5, 50):
        results.append(clones(slots))
        with monkeypatch.context() as context:
            context.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            fused.apply_fused(programs.plan_of(rule), results[-1], PLAIN)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one.parameter, two.parameter)
            assert all(torch.equal(one.state[entry], two.state[entry]) for entry in one.state)
    assert not any(torch.equal(one.parameter, slot.parameter) for one, slot in zip(results[0], slots, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_every_half_precision_value_rounds_as_in_torch(
    dtype: torch.dtype, shrink: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    parameter = every.clone().requires_grad_()
    parameter.grad = torch.zeros_like(parameter)
    LearnedOptimizer([parameter], fused=True, weight_decay=1000 * shrink).step()
    expected = (every.float() * (1 - shrink)).to(dtype)  # exact in float32
    assert torch.equal(parameter.isnan(), expected.isnan() | (every.isinf() & (shrink > 0)))  # inf - inf
    number = ~parameter.isnan()
    assert torch.equal(parameter[number], expected[number])


@each(RULES)
def test_particles_match_the_plain_path(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rule = randomised(build()).float()
    weights = flat_meta_parameters(rule) + 0.1 * normal(3, len(flat_meta_parameters(rule))).float()
    particles = ParticleRule(rule, weights)
    shape = 3, 2, 9
    state = {entry: torch.zeros(3, count, *shape[1:]) for entry, count in rule.state_features.items()}
    plain_state = {entry: tensor.clone() for entry, tensor in state.items()}
    parameters, plain = torch.ones(shape), torch.ones(shape)
    shown = (torch.arange(9) % 2).float()  # of every other coordinate the rule is told the parameter
    step = in_place_step(particles, plain)
    assert step is not None
    for count in range(1, 4):
        grad = normal(2, 9, 3, seed=count).float().permute(2, 0, 1)  # any strides
        at = torch.tensor(float(count))
        step(parameters, grad, state, at, Conditions(shown, lr=0.7, progress=0.6))
        update, plain_state = particles(grad, plain_state, at, Conditions(plain * shown, lr=0.7, progress=0.6))
        plain += update
    torch.testing.assert_close(parameters, plain, rtol=1e-5, atol=1e-6)
    for entry, tensor in plain_state.items():
        torch.testing.assert_close(state[entry], tensor, rtol=1e-5, atol=1e-5)
    assert len(set(parameters[:, 0, 0].tolist())) == 3


class Centred(LSTML2L):
    """Mixes coordinates, so that no kernel can be made of it."""

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        return super().forward(grad - grad.mean(), state, step)


def test_meta_training_uses_the_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    like = torch.zeros(1)

    def served(rule: UpdateRule, like: Tensor = like) -> bool:
        return in_place_step(rule, like) is not None

    assert served(ScheduleFreeLSTM().float())
    assert not served(ScheduleFreeLSTM().double(), like.double())
    assert not served(ScheduleFreeLSTM().float(), like.to("meta"))
    assert served(MLP().float())
    assert not served(Centred().float())
    assert in_place_step(lambda grad, state, step: (grad, state), like) is None
    monkeypatch.setattr(cpu_kernel, "compiler", lambda: None)
    assert not served(ScheduleFreeLSTM().float())


def test_meta_training_falls_back_with_one_warning(compiled_anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "shared_library", cannot_compile)
    rule = ScheduleFreeLSTM().float()
    with pytest.warns(UserWarning, match="a slower one instead: out of ink"):
        assert in_place_step(rule, torch.zeros(1)) is None
    assert in_place_step(rule, torch.zeros(1)) is None
