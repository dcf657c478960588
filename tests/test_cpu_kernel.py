"""The fused step in C: compiling, threads, narrow dtypes, particles. Its values are those of test_kernels.py."""

import ctypes
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learned_optim import LearnedOptimizer, fused
from learned_optim.kernels import cpu
from learned_optim.meta_train.fused import step_in_place
from learned_optim.meta_train.particles import ParticleRule, flat_meta_parameters
from learned_optim.rules import LSTML2L, MLP, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule
from test_execution import PLAIN, as_slots, clones
from test_rules import Build, each, normal, randomised

pytestmark = pytest.mark.skipif(cpu.compiler() is None, reason="needs a C compiler")

RULES: dict[str, Build] = {
    "schedule-free-lstm": ScheduleFreeLSTM,
    "scale-free-lstm": ScaleFreeLSTM,
    "lstm-l2l": lambda: LSTML2L(3),
}


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of compiled libraries, an empty one; and no library is loaded yet."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = cpu.compiler, cpu._kernel
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "learned_optim" / "kernels"
    for cache in caches:
        cache.cache_clear()


def stepped(size: int = 5, **options: object) -> Tensor:
    parameter = normal(size).float().requires_grad_()
    parameter.grad = normal(size, seed=1).float()
    LearnedOptimizer([parameter], **options).step()  # type: ignore[arg-type]
    return parameter.detach()


def compiler_that_fails(folder: Path) -> str:
    script = folder / "broken-cc"
    script.write_text("#!/bin/sh\necho 'out of ink' >&2\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def test_library_is_compiled_once_and_kept(compiled_anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stepped(fused=True)
    (library,) = compiled_anew.iterdir()
    written = library.stat().st_mtime_ns
    cpu._kernel.cache_clear()  # as in a new process
    monkeypatch.setattr(subprocess, "run", None)
    assert torch.equal(stepped(fused=True), first)
    assert [path.stat().st_mtime_ns for path in compiled_anew.iterdir()] == [written]


def test_folder_that_cannot_be_written_to_does_not_stop_the_step(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stepped(fused=True)
    assert [path.suffix for folder in tmp_path.glob("learned_optim-*") for path in folder.iterdir()] == [".so"]


def test_library_is_not_run_from_a_folder_that_others_can_write_to(compiled_anew: Path) -> None:
    compiled_anew.mkdir(parents=True)
    compiled_anew.chmod(0o777)
    stepped(fused=True)
    assert not list(compiled_anew.iterdir())


@pytest.mark.slow
def test_library_that_cannot_be_loaded_does_not_stop_the_step(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process that has loaded a library gets it again under its name, so that a damaged one would not be noticed here.
    def damaged(path: str) -> ctypes.CDLL:
        raise OSError(f"{path}: invalid ELF header")

    monkeypatch.setattr(ctypes, "CDLL", damaged)
    with pytest.warns(UserWarning, match="a slower one instead: .* cannot be loaded: .*invalid ELF header"):
        stepped()
    with pytest.raises(RuntimeError, match="invalid ELF header"):
        stepped(fused=True)


def test_compiler_that_fails_does_not_stop_the_step(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", f"{compiler_that_fails(tmp_path)} --option")
    with pytest.warns(UserWarning, match="a slower one instead: .*broken-cc --option .* failed: out of ink"):
        slower = stepped()
    assert torch.equal(slower, stepped(fused=False))
    with pytest.raises(RuntimeError, match="out of ink"):
        stepped(fused=True)
    assert not list(compiled_anew.iterdir())


def test_machine_without_a_compiler_is_told_only_if_the_kernel_is_demanded(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert torch.equal(stepped(), stepped(fused=False))
    with pytest.raises(RuntimeError, match=r"no C compiler was found .*CC.*use fused=None"):
        stepped(fused=True)


@pytest.mark.slow
def test_shared_folder_serves_each_processor_with_its_own_library(
    compiled_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped(fused=True)
    cpu._kernel.cache_clear()
    monkeypatch.setattr(cpu, "_processor", lambda: "another one")
    stepped(fused=True)
    assert len(list(compiled_anew.iterdir())) == 2


@each(RULES)
def test_no_bit_depends_on_the_number_of_threads(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu, "THREADED", 1)
    rule = randomised(build()).float()
    shapes = [normal(size, seed=size) for size in (3 * cpu.TILE + 5, 1, cpu.TILE, 40, 2 * cpu.TILE - 1)]
    slots = as_slots(rule, shapes, torch.float32, torch.bfloat16)
    slots = [slot._replace(step=torch.tensor(float(2 + place % 2))) for place, slot in enumerate(slots)]
    results = []
    for threads in (1, 2, 5, 50):
        results.append(clones(slots))
        with monkeypatch.context() as context:
            context.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            fused.apply_fused(fused.plan_of(rule), results[-1], PLAIN)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one.parameter, two.parameter)
            assert all(torch.equal(one.state[entry], two.state[entry]) for entry in one.state)
    assert not any(torch.equal(one.parameter, slot.parameter) for one, slot in zip(results[0], slots, strict=True))


@pytest.mark.slow
def test_openmp_that_torch_does_not_have_is_done_without(compiled_anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = stepped(size=3 * cpu.TILE, fused=True)
    cpu._kernel.cache_clear()
    load = ctypes.CDLL

    def without_openmp(path: str) -> ctypes.CDLL:
        if b"GOMP_parallel" in Path(path).read_bytes():
            raise OSError("undefined symbol: GOMP_parallel")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", without_openmp)
    assert torch.equal(stepped(size=3 * cpu.TILE, fused=True), expected)
    assert len(list(compiled_anew.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_every_narrow_number_is_read_and_rounded_as_torch_does(
    dtype: torch.dtype, shrink: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    parameter = every.clone().requires_grad_()
    parameter.grad = torch.zeros_like(parameter)
    LearnedOptimizer([parameter], fused=True, weight_decay=shrink).step()
    expected = (every.float() * (1 - shrink)).to(dtype)  # exact in float32
    assert torch.equal(parameter.isnan(), expected.isnan() | (every.isinf() & (shrink > 0)))  # inf - inf
    number = ~parameter.isnan()
    assert torch.equal(parameter[number], expected[number])


@each(RULES)
def test_particles_are_not_stepped_differently_than_by_the_plain_path(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rule = randomised(build()).float()
    weights = flat_meta_parameters(rule) + 0.1 * normal(3, len(flat_meta_parameters(rule))).float()
    particles = ParticleRule(rule, weights)
    shape = 3, 2, 9
    state = {entry: torch.zeros(3, count, *shape[1:]) for entry, count in rule.state_features.items()}
    plain_state = {entry: tensor.clone() for entry, tensor in state.items()}
    parameters, plain = torch.zeros(shape), torch.zeros(shape)
    step = step_in_place(particles, plain)
    assert step is not None
    for count in range(1, 4):
        grad = normal(2, 9, 3, seed=count).float().permute(2, 0, 1)  # any strides
        step(parameters, grad, state, torch.tensor(float(count)))
        plain += particles.advance(grad, plain_state, torch.tensor(float(count)))
    torch.testing.assert_close(parameters, plain, rtol=1e-5, atol=1e-6)
    for entry, tensor in plain_state.items():
        torch.testing.assert_close(state[entry], tensor, rtol=1e-5, atol=1e-5)
    assert len(set(parameters[:, 0, 0].tolist())) == 3


def test_meta_training_takes_the_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    like = torch.zeros(1)

    def served(rule: UpdateRule, like: Tensor = like) -> bool:
        return step_in_place(rule, like) is not None

    assert served(ScheduleFreeLSTM().float())
    assert not served(ScheduleFreeLSTM().double(), like.double())
    assert not served(ScheduleFreeLSTM().float(), like.to("meta"))
    assert not served(MLP().float())
    assert step_in_place(lambda grad, state, step: (grad, state), like) is None
    monkeypatch.setattr(cpu, "compiler", lambda: None)
    assert not served(ScheduleFreeLSTM().float())
