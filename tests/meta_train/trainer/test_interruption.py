"""A meta-training process that is interrupted or killed saves its run, and the resumed run takes the same course."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from helpers.paths import ROOT
from helpers.small_runs import assert_same_outcome, metrics, plain, run
from learned_optim.cli import main
from learned_optim.meta_train.config.load import load_config
from learned_optim.meta_train.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def sigint() -> Iterator[None]:
    """Ctrl-C does what Python makes of it, also where the tests are a shell's background job, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def sigterm() -> Iterator[None]:
    """The command line changes the handler of SIGTERM."""
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


HELD = """
steps = 12
[rule]
architecture = "scale-free-lstm"
settings = {{ hidden_size = 2, momentum_decays = [0.9] }}
[[tasks]]
family = "helpers.user_tasks:HeldFamily"
folder = "{folder}"
[unroll]
truncation = 2
horizon = [3, 9]
instances = 2
pool = 3
windows_per_step = 2
[meta_optimizer]
lr = 1e-2
average = 0.9
[validation]
every = 4
horizon = 4
instances = 2
baselines = false
"""
HOLD_AT = 35  # the batch at which the process is held: in the middle of a window of the sixth meta-step
# The command line with a checkpoint at every step instead of every minute.
CHECKPOINT_EVERY_STEP = """
import sys
from learned_optim.cli import main
from learned_optim.meta_train.trainer import loop
loop.CHECKPOINT_SECONDS = -1.0
sys.exit(main())
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration whose runs can be held, and the folder of a run that was not."""
    folder = tmp_path_factory.mktemp("held")
    path = folder / "held.toml"
    path.write_text(HELD.format(folder=folder))
    run(Trainer(load_config(path), folder / "whole"))
    return path, folder / "whole"


LEFT_OPEN = """
import sys
from pathlib import Path
from learned_optim.meta_train.config.load import load_config
from learned_optim.meta_train.trainer.trainer import Trainer
steps = Trainer(load_config(sys.argv[1]), Path(sys.argv[2])).run()
next(steps)
"""


@pytest.mark.slow
def test_script_that_ends_within_the_loop_saves_silently(held: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", LEFT_OPEN, str(held[0]), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=250)
    assert done.stderr == ""
    assert Trainer.resume(tmp_path).meta_step == 1


@pytest.mark.timeout(600)  # longer than the two deadlines within
class TestInterruptedProcess:
    """The real command line in a process of its own, interrupted in the middle of a window, then resumed."""

    def interrupt(self, number: signal.Signals, config: Path, folder: Path, command: list[str]) -> tuple[int, str]:
        """Run the command, send the signal when it is held, and let it continue; return its status and messages."""
        reached, go_on = config.parent / "reached", config.parent / "go on"
        reached.unlink(missing_ok=True)
        go_on.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "HOLD_AT": str(HOLD_AT),
        }
        process = subprocess.Popen(
            [sys.executable, *command, "meta-train", str(config), "--output", str(folder), "--threads", "1"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + 250  # seconds; imports take a few on an idle machine
            while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(number)
            go_on.touch()
            _, messages = process.communicate(timeout=150)
        finally:
            process.kill()
        assert reached.exists(), messages
        return process.returncode, messages

    @pytest.mark.slow
    @pytest.mark.usefixtures("sigterm")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
    def test_signal_finishes_the_step_and_saves(
        self, number: signal.Signals, held: tuple[Path, Path], tmp_path: Path
    ) -> None:
        config, whole = held
        status, messages = self.interrupt(number, config, tmp_path, ["-m", "learned_optim.cli"])
        assert status == 130
        assert f"saved; continue with: learned-optim meta-train --resume {tmp_path}" in messages
        assert "Traceback" not in messages
        assert [int(row["meta_step"]) for row in metrics(tmp_path)] == list(range(1, 7))
        assert main(["meta-train", "--resume", str(tmp_path)]) == 0
        assert_same_outcome(tmp_path, whole)

    @pytest.mark.slow
    @pytest.mark.usefixtures("sigterm")
    def test_killed_run_resumes_from_the_checkpoint(self, held: tuple[Path, Path], tmp_path: Path) -> None:
        config, whole = held
        status, _ = self.interrupt(signal.SIGKILL, config, tmp_path, ["-c", CHECKPOINT_EVERY_STEP])
        assert status == -signal.SIGKILL
        assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
            "best.safetensors",
            "checkpoint.safetensors",
            "latest.safetensors",
        ]
        assert main(["meta-train", "--resume", str(tmp_path)]) == 0
        assert_same_outcome(tmp_path, whole)

    @pytest.mark.usefixtures("sigterm")
    def test_existing_run_is_never_overwritten(
        self, held: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, whole = held
        before = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
        assert main(["meta-train", str(config), "--output", str(whole)]) == 1
        message = capsys.readouterr().err
        assert f"{whole} holds a run already; continue it with --resume {whole}, or choose --output" in message
        assert {path: path.read_bytes() for path in whole.iterdir() if path.is_file()} == before


def test_signal_during_the_last_save_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(plain(steps=3), tmp_path)
    save = trainer.save_checkpoint

    def interrupted_save() -> None:
        signal.raise_signal(signal.SIGINT)
        save()

    monkeypatch.setattr(trainer, "save_checkpoint", interrupted_save)
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    assert Trainer.resume(tmp_path).meta_step == 3


def test_signal_during_a_step_keeps_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(plain(steps=5), tmp_path)
    step = trainer.meta_optimizer.step

    def interrupted_step(grads: list[Tensor], meta_step: int) -> None:
        if meta_step == 2:
            signal.raise_signal(signal.SIGINT)
        step(grads, meta_step)

    monkeypatch.setattr(trainer.meta_optimizer, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    assert [row["meta_step"] for row in metrics(tmp_path)] == ["1", "2", "3"]
    assert Trainer.resume(tmp_path).meta_step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_trainer_runs_outside_the_main_thread() -> None:
    trainer = Trainer(plain(steps=2))
    thread = threading.Thread(target=lambda: run(trainer))
    thread.start()
    thread.join()
    assert trainer.meta_step == 2
