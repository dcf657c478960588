"""Meta-training in several processes takes the course of one, exchanges little, and survives the death of a process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.paths import ROOT
from helpers.processes import run_in_processes
from helpers.small_runs import QUADRATIC, configuration, metrics, run, weights
from helpers.user_tasks import DropoutFamily, Reconstruction
from learned_optim.meta_train.config.load import Config, load_config
from learned_optim.meta_train.estimators import ESTIMATORS
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.inner.shares import Division, Share, cut, join
from learned_optim.meta_train.inner.unroll import InnerState
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.trainer.checkpoint import read_checkpoint
from learned_optim.meta_train.trainer.trainer import Trainer

HALFWAY = 3
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")
pytestmark = pytest.mark.usefixtures("one_thread")

# In float64 rounding is so small that nothing else could hide behind the tolerance: chaos of the inner trainings
# amplifies 1e-16 by less than a million in six meta-steps. The metrics are of the same size as the meta-parameters.
RTOL, ATOL = 1e-9, 1e-10

# Smooth in the meta-gradient, unlike Adam, which would blow up the rounding errors of gradients that are nearly zero.
SGD = {"name": "sgd", "lr": 0.02, "schedule": "constant", "average": 0.5}
DIVIDED_INSTANCES = {"windows_per_step": 1, "instances": 3}  # for two processes: one of them, and two
ESTIMATES: dict[str, dict[str, Any]] = {
    "truncated-bptt": {"replay_coordinates": None},
    "sampled-coordinates": {"replay_coordinates": 3},
    "second-derivatives": {"replay_coordinates": None, "second_derivatives": True},
    "reparameterization": {"name": "reparameterization", "replay_coordinates": 2, "sigma": 0.1, "pairs": 2},
    "combined": {"name": "combined", "replay_coordinates": None, "sigma": 0.1},
    "combined-averages": {"name": "combined", "replay_coordinates": None, "sigma": 0.1, "variance_decay": 0.5},
    "es": {"name": "es", "replay_coordinates": None, "sigma": 0.1, "pairs": 2},
    "pes": {"name": "pes", "replay_coordinates": None, "sigma": 0.1, "pairs": 2},
    "es-single": {"name": "es-single", "replay_coordinates": None, "sigma": 0.1},
}
DIVISIONS = {"windows": {}, "instances": DIVIDED_INSTANCES}
CASES = [f"{estimate} {division}" for estimate in ESTIMATES for division in DIVISIONS]
RESUMED = ["sampled-coordinates instances", "combined-averages windows", "pes instances", "pes windows"]


def case(name: str, steps: int = 6, **changes: Any) -> Config:
    """A pool of three, with a task that cannot be divided among the two families, to be validated twice."""
    estimate, division = name.split()
    return configuration(
        steps=steps,
        estimator={"meta_loss": "log", **ESTIMATES[estimate]},
        unroll=DIVISIONS[division],
        meta_optimizer=SGD,
        validation={"every": 3},
        **changes,
    )


# What the processes run.


def train_all(folder: Path) -> None:
    """All cases from the start; those to be resumed up to the middle as well, and from where one process has come."""
    torch.set_default_dtype(torch.float64)
    world = World(dist.get_rank(), dist.get_world_size())
    for name in CASES:
        trainer = Trainer(case(name), folder / name, world=world)
        steps = [weights(trainer.module) for _ in trainer.run()]
        save_file({"weights": torch.stack(steps)}, folder / f"{name} {world.rank}.safetensors")
    for name in RESUMED:
        trainer = Trainer(case(name), folder / f"{name} halfway", world=world)
        for progress in trainer.run():
            if progress.meta_step == HALFWAY:
                trainer.save_checkpoint()
                break
        run(Trainer.resume(folder / f"{name} resumed", world=world))


def count_bytes(folder: Path) -> None:
    """Bytes of two meta-steps by estimator and size of the rule."""
    counts = {}
    for estimate in ESTIMATES:
        for size in (2, 6):
            world = World(dist.get_rank(), dist.get_world_size())
            rule = {"settings": {"hidden_size": size, "momentum_decays": [0.9]}}
            run(Trainer(case(f"{estimate} windows", steps=2, rule=rule), world=world))
            counts[f"{estimate} {size}"] = torch.tensor(world.bytes_exchanged)
    if dist.get_rank() == 0:
        save_file(counts, folder / "bytes.safetensors")


def drift(folder: Path) -> None:
    """One process's meta-parameters move by one bit."""
    world = World(dist.get_rank(), dist.get_world_size())
    replica = [torch.ones(3)]
    assert world.agree(save=True, replica=replica) == (True, False)
    if not world.leads:
        replica[0][1] += 2**-23
    with pytest.raises(RuntimeError, match="no longer hold the same meta-parameters"):
        world.agree(save=False, replica=replica)


def one_is_told_to_stop(folder: Path) -> None:
    """A signal to one process stops both, after the same step; a resumed run takes the same course."""
    torch.set_default_dtype(torch.float64)
    world = World(dist.get_rank(), dist.get_world_size())
    trainer = Trainer(case("pes windows"), folder / "stopped", world=world)

    def run_until_stopped() -> None:
        for progress in trainer.run():
            if progress.meta_step == 2 and not world.leads:
                world.signals.append(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run_until_stopped()
    assert trainer.meta_step == HALFWAY


def all_of_this(folder: Path) -> None:
    """In one start of the processes, which takes longer than the work."""
    for function in (count_bytes, drift, one_is_told_to_stop, train_all):
        function(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Runs of one process, and halves of runs to be resumed by two."""
    folder = tmp_path_factory.mktemp("alone")
    torch.set_default_dtype(torch.float64)
    try:
        for name in CASES:
            run(Trainer(case(name), folder / name))
        for name in RESUMED:
            for progress in Trainer(case(name), folder / f"{name} halfway").run():
                if progress.meta_step == HALFWAY:
                    break
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


@pytest.fixture(scope="module")
def together(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two processes."""
    folder = tmp_path_factory.mktemp("together")
    for name in RESUMED:
        (folder / f"{name} resumed").symlink_to(alone / f"{name} halfway")
    run_in_processes(all_of_this, 2, folder)
    return folder


def assert_close(folder: Path, expected: Path) -> None:
    """Same metrics and same checkpoint, up to rounding."""
    for row, expected_row in zip(metrics(folder), metrics(expected), strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in row.items():
            assert bool(value) == bool(expected_row[name]), name
            assert float(value or 0) == pytest.approx(float(expected_row[name] or 0), rel=1e-8, abs=1e-9), name
    first, second = read_checkpoint(folder), read_checkpoint(expected)
    for name, value in second.progress.items():
        if name not in ("seconds", "best_validation"):
            assert first.progress[name] == value, name
    assert first.progress["best_validation"] == pytest.approx(second.progress["best_validation"], rel=1e-8)
    torch.testing.assert_close(first.tensors, second.tensors, rtol=RTOL, atol=ATOL)


@needs_gloo
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("double")
class TestTwoProcesses:
    @pytest.mark.parametrize("name", CASES)
    def test_two_processes_match_one(self, name: str, alone: Path, together: Path) -> None:
        assert_close(together / name, alone / name)

    @pytest.mark.parametrize("name", CASES)
    def test_two_processes_hold_equal_meta_parameters_bitwise(self, name: str, together: Path) -> None:
        first, second = (load_file(together / f"{name} {rank}.safetensors")["weights"] for rank in range(2))
        assert len(first.unique(dim=0)) == 6  # they are trained
        assert torch.equal(first, second)

    @pytest.mark.parametrize("name", RESUMED)
    def test_one_process_resumes_a_run_of_two(self, name: str, alone: Path, together: Path) -> None:
        folder = together / f"{name} halfway"
        run(Trainer.resume(folder))
        assert_close(folder, alone / name)

    @pytest.mark.parametrize("name", RESUMED)
    def test_two_processes_resume_a_run_of_one(self, name: str, alone: Path, together: Path) -> None:
        assert_close(together / f"{name} resumed", alone / name)

    def test_evolution_strategies_exchange_no_meta_parameters(self, together: Path) -> None:
        counts = {name: int(count) for name, count in load_file(together / "bytes.safetensors").items()}
        grows = {estimate: counts[f"{estimate} 6"] > counts[f"{estimate} 2"] for estimate in ESTIMATES}
        assert {estimate for estimate, does in grows.items() if not does} == {"es", "pes", "es-single"}
        # Two meta-steps: two headers of five, slopes of two windows, and an agreement of three. A validation of two,
        # and before the first step as many each for the start, the default and Adam.
        instances, steps, windows = 2, 2, 2
        assert counts["es 6"] == 8 * (steps * (windows * (5 + 2 * instances) + 3) + 2 + 3 * 2)

    def test_signal_to_one_process_stops_both(self, alone: Path, together: Path) -> None:
        run(Trainer.resume(together / "stopped"))
        assert_close(together / "stopped", alone / "pes windows")


# The real torchrun.

CONFIG = """
steps = {steps}
[rule]
architecture = "scale-free-lstm"
[rule.settings]
hidden_size = 2
momentum_decays = [0.9]
[[tasks]]
family = "helpers.user_tasks:{family}"
{options}
[unroll]
truncation = 2
horizon = [4, 4]
instances = 2
pool = 2
windows_per_step = 2
[meta_optimizer]
name = "sgd"
[validation]
every = 100
horizon = 2
instances = 2
"""
CHECKPOINT_EVERY_STEP = """
import sys
from learned_optim.cli import main
from learned_optim.meta_train.trainer import loop
loop.CHECKPOINT_SECONDS = 0.0
if __name__ == "__main__":
    sys.exit(main())
"""


def torchrun(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    script = folder / "checkpoint_every_step.py"
    script.write_text(CHECKPOINT_EVERY_STEP)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [argument for argument in arguments if argument.startswith("--max-restarts")]
    rest = [argument for argument in arguments if argument not in options]
    return subprocess.Popen(
        [sys.executable, *command, *options, str(script), "meta-train", *rest],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_gloo
@pytest.mark.slow
@pytest.mark.timeout(600)
class TestTorchrun:
    def test_torchrun_restarts_from_the_checkpoint(self, tmp_path: Path) -> None:
        path, folder = tmp_path / "config.toml", tmp_path / "run"
        path.write_text(CONFIG.format(steps=5, family="DeadlyFamily", options=""))
        # First gradients of two members take a batch, a window takes two: the second process dies in its fourth.
        process = torchrun(tmp_path, "--max-restarts=1", str(path), "--output", str(folder), DIE_AT="9")
        try:
            _, messages = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 0, messages
        lines = [line for line in messages.splitlines() if "learned-optim: error" in line]
        assert len(lines) == 1, messages
        assert "another process of this run has ended" in lines[0]
        assert "--resume" in lines[0]
        run(Trainer(load_config(path), tmp_path / "alone"))
        rows, expected = metrics(folder), metrics(tmp_path / "alone")
        assert [row["meta_step"] for row in rows] == [row["meta_step"] for row in expected] == list("12345")
        for row, expected_row in zip(rows, expected, strict=True):  # windows are whole: only sums are rounded otherwise
            assert float(row["meta_loss"]) == pytest.approx(float(expected_row["meta_loss"]), rel=1e-4)

    def test_torchrun_saves_on_sigterm(self, tmp_path: Path) -> None:
        path, folder = tmp_path / "config.toml", tmp_path / "run"
        path.write_text(CONFIG.format(steps=40, family="HeldFamily", options=f'folder = "{tmp_path}"'))
        process = torchrun(tmp_path, str(path), "--output", str(folder), HOLD_AT="6")
        try:
            deadline = time.monotonic() + 250
            while not (tmp_path / "reached").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            (tmp_path / "go on").touch()
            _, messages = process.communicate(timeout=200)
        finally:
            process.kill()
        assert (tmp_path / "reached").exists(), messages
        assert process.returncode != 0
        assert messages.count(f"saved; continue with: learned-optim meta-train --resume {folder}") == 1, messages
        assert 1 <= Trainer.resume(folder).meta_step < 40


# Who does what, without any process.


@pytest.mark.parametrize("pieces", [1, 3, 4])
@pytest.mark.parametrize("windows", [1, 2, 5])
def test_every_piece_has_one_process_and_every_process_a_piece(windows: int, pieces: int) -> None:
    for processes in range(1, windows * pieces + 1):
        division = Division(processes, windows, pieces)
        taken = []
        for window in range(windows):
            team = division.team(window)
            for place, rank in enumerate(team):
                share = division.share(World(place, len(team)))
                taken += [(window, piece, rank) for piece in range(share.first, share.end)]
        assert sorted((window, piece) for window, piece, _ in taken) == [
            (window, piece) for window in range(windows) for piece in range(pieces)
        ]
        assert {rank for _, _, rank in taken} == set(range(processes))


def test_more_processes_than_pieces_are_refused() -> None:
    message = r"7 processes, but a meta-step has only 6 parts: 2 windows .* of 3 instances or groups"
    with pytest.raises(ValueError, match=message):
        Division(7, 2, 3)


@pytest.mark.parametrize("particles", [False, True])
def test_parts_of_a_state_join_to_the_whole(particles: bool) -> None:
    """Six instances or, of three groups, four copies of each: particles of two instances."""
    shape = (12, 2) if particles else (6,)
    numbers = torch.arange(12.0 * 2).view(12, 2) if particles else torch.arange(6.0)

    def entry(*after: int) -> Tensor:
        return numbers.view(*shape, *[1] * len(after)).expand(*shape, *after).clone()

    features = entry(5, 4).movedim(len(shape), 1 if particles else 0)  # ([P,] features, b, N)
    state = InnerState(entry(4), -entry(4), {"moment": features}, torch.tensor(7.0), entry())
    shares = [Share(0, 1, 3), Share(1, 3, 3)]
    parts = [cut(state, share) for share in shares]
    joined = join(parts, 3)
    torch.testing.assert_close(joined._asdict(), state._asdict(), rtol=0, atol=0)
    assert parts[1].initial_loss.shape == ((8, 2) if particles else (4,))
    if particles:  # in the order (copy, group): of every copy the second and the third group
        assert parts[1].initial_loss[:, 0].tolist() == [
            2.0 * (3 * copy + group) for copy in range(4) for group in (1, 2)
        ]


@pytest.mark.usefixtures("double")
def test_part_of_a_task_matches_the_whole() -> None:
    task = VectorizedTask(Reconstruction(), 5, seed=3, random_signs=True, scale=torch.rand(5, 1) + 0.5)
    part = task.part(slice(1, 4))
    random = [torch.Generator().manual_seed(8) for _ in range(2)]
    for _ in range(2):
        batches = [each.batch(generator) for each, generator in zip((task, part), random, strict=True)]
        losses, grads = task.losses_and_grads(task.initial_parameters, batches[0])
        part_losses, part_grads = part.losses_and_grads(part.initial_parameters, batches[1])
        torch.testing.assert_close(part_losses, losses[1:4])
        torch.testing.assert_close(part_grads, grads[1:4])


def test_stochastic_loss_is_detected() -> None:
    dropout = DropoutFamily().sample(np.random.default_rng(0), "train")
    assert VectorizedTask(dropout, 2, seed=0).draws_random_numbers
    assert not VectorizedTask(Reconstruction(), 2, seed=0).draws_random_numbers


def test_one_process_needs_no_process_group() -> None:
    trainer = Trainer(configuration(tasks=[QUADRATIC], steps=1))
    run(trainer)
    assert not dist.is_initialized()
    assert trainer.world.bytes_exchanged == 0
    divisible = {name for name, estimator in ESTIMATORS.items() if estimator.divisible}
    assert divisible == {options.get("name", "truncated-bptt") for options in ESTIMATES.values()}
